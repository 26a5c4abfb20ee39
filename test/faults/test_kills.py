"""kill -9 at any moment: the same command goes on, and ends with the weights and metrics of a run left alone."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import pytest
from safetensors import safe_open

from test.faults.figures import write_section
from test.faults.runs import ENV, ROOT, assert_undisturbed, metrics, states, steps_done, wait_until

EACH_STEP = ("--save_state_every_n_steps=1", "--save_last_n_steps_state=2")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


def test_a_run_that_is_killed_three_times_reaches_the_same_weights(start, undisturbed, tmp_path):
    out, when = tmp_path / "out", random.Random(6)
    for step in (1, 2, 4):
        run = start(out, *EACH_STEP)
        wait_until(lambda step=step: steps_done(out) >= step, run)
        time.sleep(when.uniform(0, 0.2))
        run.send(signal.SIGKILL)
        run.wait()
    run = start(out, *EACH_STEP)
    assert run.wait() == 0, run.text
    assert "resumed from" in run.text
    assert_undisturbed(out, undisturbed)


@pytest.mark.all
def test_fifty_kills_at_random_moments(start, tmp_path):
    steps, kills, longest_s, when = 100, 50, 4.0, random.Random(50)
    more = (*EACH_STEP, f"--max_train_steps={steps}")
    reference = tmp_path / "reference"
    assert start(reference, f"--max_train_steps={steps}").wait() == 0
    out, phases = tmp_path / "out", Counter()
    while phases.total() < kills:
        run = start(out, *more)
        before = steps_done(out)
        if run.ended_within(when.uniform(0.1, longest_s)):
            assert run.status == 0, run.text  # it came to its end before
            run = start(tmp_path / f"out{phases.total()}", *more)  # so the rest is done to another
            assert_undisturbed(out, reference)
            out = run.log.with_suffix("")
            continue
        run.send(signal.SIGKILL)
        run.wait()
        saving = any(path.name.startswith(".at-step") for path in out.glob(".*"))
        phases[
            "while a state was written"
            if saving
            else "in training"
            if steps_done(out) > before
            else "before a step was done"
        ] += 1
    run = start(out, *more)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, reference)
    write_section(
        "Kill -9 at random moments",
        [
            f"{kills} kills of runs of {steps} steps with {' '.join(EACH_STEP)} --resume=auto, each 0.1 to "
            f"{longest_s:g} s after its start (seed 50), until the run ended:",
            "",
            *(f"- {count} {phase}" for phase, count in sorted(phases.items())),
            "",
            "Every run that came to its end was equal to the undisturbed run.",
        ],
    )


def test_a_kill_of_one_process_of_two_ends_the_other_and_both_go_on(start_two, undisturbed_two, tmp_path):
    out = tmp_path / "out"
    first, second = start_two(out, *EACH_STEP)
    wait_until(lambda: steps_done(out) >= 3, first)
    second.send(signal.SIGKILL)
    assert first.wait(120) == 1, first.text  # it waits for the other's part of a state for 60 s
    assert second.wait() == 128 + signal.SIGKILL
    ranks = start_two(out, *EACH_STEP)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert "resumed from" in ranks[0].text
    assert_undisturbed(out, undisturbed_two)


@pytest.mark.all
def test_torchrun_ends_when_one_process_of_two_is_killed(arguments, undisturbed_two, tmp_path):
    out = tmp_path / "out"
    command = [*TORCHRUN, str(ROOT / "sdxl_pretrain.py"), *arguments(out, "--gradient_accumulation_steps=1")]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen([*command, *EACH_STEP], cwd=ROOT, env=ENV, stdout=log, stderr=log)
        wait_until(lambda: steps_done(out) >= 2)
        os.kill(_rank(run.pid, 1), signal.SIGKILL)
        began = time.monotonic()
        assert run.wait(60) != 0
        seconds = time.monotonic() - began
        again = subprocess.run([*command, *EACH_STEP], cwd=ROOT, env=ENV, stdout=log, stderr=log, timeout=600)
        assert again.returncode == 0
    assert_undisturbed(out, undisturbed_two)
    write_section(
        "Kill -9 of one process of two",
        [
            f"`torchrun --standalone --nproc_per_node=2`, rank 1 killed after step 2: torchrun ended {seconds:.1f} s "
            "later. The same command went on and was equal to the undisturbed run of two.",
        ],
    )


def _rank(torchrun: int, rank: int) -> int:
    """The pid of a rank that torchrun has started."""
    children = Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()
    for child in children:
        if f"\0RANK={rank}\0" in "\0" + Path(f"/proc/{child}/environ").read_text():
            return int(child)
    raise AssertionError(f"torchrun has no rank {rank}")


@pytest.mark.all
def test_a_process_that_stalls_ends_the_run_after_the_timeout(start_two, undisturbed_two, tmp_path):
    out = tmp_path / "out"
    first, second = start_two(out, *EACH_STEP, "--ddp_timeout=1")
    wait_until(lambda: steps_done(out) >= 2, first)
    second.send(signal.SIGSTOP)
    began = time.monotonic()
    try:
        assert first.wait(150) == 1, first.text
    finally:
        second.send(signal.SIGKILL)
    seconds = time.monotonic() - began
    named = r"training stopped: rank 1 on \S+ \(last heard of: \w+, step \d\) no longer answers"
    assert re.search(named, first.text), first.text
    second.wait()
    ranks = start_two(out, *EACH_STEP)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert_undisturbed(out, undisturbed_two)
    write_section(
        "A process that stalls",
        [
            f"Two processes, `--ddp_timeout=1`, rank 1 stopped by SIGSTOP in training: rank 0 ended with exit status 1 "
            f"{seconds:.0f} s later. The same command went on and was equal to the undisturbed run of two.",
        ],
    )


def _killed_in_save(start, out: Path, operation: int, power_cut: bool) -> tuple[bool, int]:
    """A run that dies in its third save, and the one that goes on; whether it died, the step that was gone on from."""
    run = start(out, *EACH_STEP, faults=[("die_in_save", 3, operation, power_cut)])
    died = run.wait() == 128 + signal.SIGKILL
    assert died or run.status == 0, run.text
    there = metrics(out)
    run = start(out, *EACH_STEP)
    assert run.wait() == 0, run.text
    assert not died or there[-1]["step"] >= 3
    assert not [path.name for path in out.iterdir() if path.name.startswith(".at")]
    resumed = [line for line in run.text.splitlines() if "resumed from" in line]
    return died, int(resumed[-1].split(":")[-1].split()[0])


def test_a_kill_in_mid_save_goes_on_from_the_state_before(start, undisturbed, tmp_path):
    died, step = _killed_in_save(start, tmp_path / "out", 9, power_cut=True)
    assert died
    assert step == 2
    assert_undisturbed(tmp_path / "out", undisturbed)


def _operations(state: Path) -> int:
    """How many operations on files a save of that state takes, its renaming included, and a few more."""
    tensors = 0
    for path in state.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            tensors += len(file.keys())
    return tensors + 3 * len(list(state.iterdir())) + 8


@pytest.mark.all
def test_kills_at_thirty_points_of_a_save(start, undisturbed, tmp_path):
    resumed = Counter()
    assert start(tmp_path / "whole", *EACH_STEP).wait() == 0
    last = _operations(tmp_path / "whole" / states(tmp_path / "whole")[-1])
    for power_cut in (False, True):
        for point in range(15):
            out = tmp_path / f"out{power_cut}{point}"
            died, step = _killed_in_save(start, out, last * point // 14, power_cut)
            assert died
            assert_undisturbed(out, undisturbed)
            resumed[step] += 1
    assert set(resumed) == {2, 3}
    write_section(
        "Kill -9 and power cuts in mid-save",
        [
            f"30 runs of 6 steps, each ended in its third save before a chosen operation on files, at equal distances "
            f"from the first to number {last}, beyond the renaming: 15 by kill -9, 15 by a power cut, "
            "after which only what was fsynced is there.",
            "",
            *(f"- {count} went on from step {step}" for step, count in sorted(resumed.items())),
            "",
            "All were equal to the undisturbed run.",
        ],
    )
