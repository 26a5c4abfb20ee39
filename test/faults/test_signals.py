"""SIGTERM, SIGINT and SIGUSR1 in each phase of a run, to one process of two, twice within a second and later."""

import errno
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from test.faults.figures import write_section
from test.faults.runs import ENV, ROOT, assert_undisturbed, states, steps_done, wait_until

STATUS = {signal.SIGTERM: 143, signal.SIGINT: 130}
HELD_S = 1.0
# What is slow in a phase, so that a signal meets it there, and the flags that lead into it.
PHASES = {
    "finding the images": ("hold_index", (), ()),
    "loading the model": ("hold_model_loading", (), ()),
    "training": ("hold_step", (1,), ()),
    "writing a checkpoint": ("hold_checkpoint", (), ("--save_every_n_steps=2",)),
    "writing a state": ("hold_state", (), ("--save_state_every_n_steps=1",)),
}
BEFORE_TRAINING = ("finding the images", "loading the model")


def _held(phase: str, marker: Path) -> tuple[list[tuple], tuple[str, ...]]:
    """The fault that keeps a run in a phase for a while, and the flags that lead there."""
    fault, values, flags = PHASES[phase]
    return [(fault, *values, str(marker), HELD_S)], flags


def _stopped_in(start, out: Path, phase: str, number: int, times: int = 1) -> float:
    """Start a run, signal it in a phase; returns how long it took to end, beyond the time that the phase was held."""
    marker = out.with_name("there")
    marker.unlink(missing_ok=True)
    faults, flags = _held(phase, marker)
    before = steps_done(out) if states(out) else 0
    run = start(out, *flags, faults=faults)
    wait_until(marker.exists, run)
    began = time.monotonic()
    for _ in range(times):
        run.send(number)
        time.sleep(0.1)
    assert run.wait() == STATUS[number], run.text
    assert f"stopped by {signal.Signals(number).name}" in run.text and "Traceback" not in run.text
    done = steps_done(out)
    if phase in BEFORE_TRAINING:
        assert done == before or not before
    else:
        assert done > before and f"at-step{done:08d}-state" in states(out)
    return time.monotonic() - began - HELD_S


def _stopped_in_sampling(start, out: Path, number: int) -> float:
    """The same while a long list of prompts is sampled."""
    prompts = out.with_name("prompts.txt")
    prompts.write_text("a red photo --w 32 --h 32 --s 20 --l 2 --d 1\n" * 500)
    run = start(out, f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    pictures = out / "sample"
    known = len(list(pictures.glob("*.png"))) if pictures.exists() else 0
    wait_until(lambda: pictures.exists() and len(list(pictures.glob("*.png"))) > known, run)
    began = time.monotonic()
    run.send(number)
    assert run.wait() == STATUS[number], run.text
    assert f"at-step{steps_done(out):08d}-state" in states(out)
    assert len(list(pictures.glob("*.png"))) < known + 400
    return time.monotonic() - began


def test_a_run_stopped_in_every_phase_one_after_the_other_is_the_undisturbed_run(start, undisturbed, tmp_path):
    out = tmp_path / "out"
    for number, phase in enumerate(PHASES):
        if phase == "training":
            _stopped_in_sampling(start, out, signal.SIGTERM)
        _stopped_in(start, out, phase, (signal.SIGTERM, signal.SIGINT)[number % 2], times=1 + number % 2)
    run = start(out)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


@pytest.mark.all
def test_each_signal_in_each_phase(start, undisturbed, tmp_path):
    lines = ["| Phase | Signal | Exit status | Ended after | Continued run |", "|---|---|---|---|---|"]
    for number, status in STATUS.items():
        for phase in (*PHASES, "sampling"):
            out = tmp_path / f"{phase.replace(' ', '_')}{status}" / "out"
            out.parent.mkdir()
            sampling = phase == "sampling"
            seconds = _stopped_in_sampling(start, out, number) if sampling else _stopped_in(start, out, phase, number)
            run = start(out)
            assert run.wait() == 0, run.text
            assert_undisturbed(out, undisturbed)
            lines.append(f"| {phase} | {signal.Signals(number).name} | {status} | {max(seconds, 0):.1f} s | equal |")
    write_section("Signals by phase", lines)


def test_usr1_saves_and_goes_on_in_every_phase(start, undisturbed, tmp_path):
    out, faults, flags = tmp_path / "out", [], []
    markers = {phase: tmp_path / phase.replace(" ", "_") for phase in PHASES if phase != "writing a state"}
    for phase, marker in markers.items():
        held, needed = _held(phase, marker)
        faults, flags = faults + held, [*flags, *needed]
    run = start(out, *flags, faults=faults)
    for phase, marker in markers.items():
        wait_until(marker.exists, run)
        run.send(signal.SIGUSR1)
        if phase in ("loading the model", "training"):
            step = {"loading the model": 1, "training": 2}[phase]
            wait_until((out / f"at-step{step:08d}-state").exists, run)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.all)])
def test_a_signal_to_one_process_of_two_saves_on_both(start_two, undisturbed_two, tmp_path, number):
    """None leaves before the state is there: a launcher ends the others at once, and must find nothing to lose."""
    out, step, saving = tmp_path / "out", tmp_path / "step", tmp_path / "saving"
    ranks = start_two(out, faults_of=([("hold_state", str(saving), 2.0)], [("hold_step", 2, str(step), HELD_S)]))
    wait_until(step.exists, ranks[1])
    ranks[1].send(number)
    assert ranks[1].wait() == STATUS[number], ranks[1].text
    assert states(out) == ["at-step00000003-state"]
    assert ranks[0].wait() == STATUS[number], ranks[0].text
    ranks = start_two(out)
    assert [rank.wait() for rank in ranks] == [0, 0], ranks[0].text
    assert_undisturbed(out, undisturbed_two)


def test_a_signal_to_a_process_that_waits_for_the_one_that_samples_ends_the_sampling(start_two, tmp_path):
    out, prompts = tmp_path / "out", tmp_path / "prompts.txt"
    prompts.write_text("a red photo --w 32 --h 32 --s 20 --l 2 --d 1\n" * 500)
    ranks = start_two(out, f"--sample_prompts={prompts}", "--sample_every_n_steps=1")
    wait_until(lambda: list(out.glob("sample/*.png")), ranks[0])
    ranks[1].send(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text
    assert states(out) == ["at-step00000001-state"]
    assert len(list(out.glob("sample/*.png"))) < 400


def test_a_signal_to_one_process_ends_the_other_while_it_finds_the_images(start_two, tmp_path):
    out, there = tmp_path / "out", tmp_path / "there"
    ranks = start_two(out, faults_of=([("hold_index", str(there), 5.0)], []))
    wait_until(there.exists, ranks[0])
    ranks[1].send(signal.SIGTERM)
    assert [rank.wait() for rank in ranks] == [143, 143], ranks[0].text
    assert "Traceback" not in ranks[0].text + ranks[1].text


def test_a_second_signal_ends_a_run_that_does_not_come_to_the_end_of_its_step(start, undisturbed, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "there"
    run = start(out, "--save_state_every_n_steps=1", faults=[("hold_step", 3, str(marker), 600)])
    wait_until(marker.exists, run)
    run.send(signal.SIGTERM)
    assert not run.ended_within(1.2)
    run.send(signal.SIGTERM)
    assert run.wait(10) == 143, run.text
    assert "a second signal" in run.text
    run = start(out)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


def test_a_process_that_waits_for_nobody_says_for_whom_and_a_signal_ends_it(start, tmp_path):
    """WORLD_SIZE from a cluster, and no other process comes."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    env = {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    run = start(tmp_path / "out", env=env)
    wait_until(lambda: f"waiting for rank 1 of 2 processes at 127.0.0.1:{port}" in run.text, run)
    assert "LOCAL_RANK is not set" in run.text
    run.send(signal.SIGTERM)
    assert run.wait(5) == 143, run.text
    assert "SIGTERM: ended at once while waiting for the other processes" in run.text


def test_a_second_signal_lets_a_state_that_has_begun_become_durable(start, undisturbed, tmp_path):
    """A second Ctrl-C 1.6 s after the first one, while nothing seems to happen."""
    out, marker = tmp_path / "out", tmp_path / "there"
    run = start(out, faults=[("hold_state", str(marker), 3.0), ("hold_step", 2, str(tmp_path / "step"), HELD_S)])
    wait_until((tmp_path / "step").exists, run)
    run.send(signal.SIGINT)
    wait_until(lambda: "SIGINT: saving after this step" in run.text, run, 5)
    assert "again within 8 s ends now without saving" in run.text
    wait_until(marker.exists, run)
    time.sleep(1.6)
    run.send(signal.SIGINT)
    assert run.wait() == 130, run.text
    assert "a second signal: a training state is being written" in run.text
    assert states(out) == ["at-step00000003-state"]
    assert f"3 steps are done and in {out}/at-step00000003-state" in run.text
    command = shlex.split(run.text.partition("to go on: ")[2].splitlines()[0])
    assert command[2] == "--resume=auto" and command.count("--resume=auto") == 1
    run = start(out, *command[3:])
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


def test_a_state_that_cannot_be_written_at_a_signal_is_tried_again(start, undisturbed, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "there"
    disk = ("fail", "library.training.state.writer:write_tensors", 2, errno.ENOSPC)
    flags = ("--save_state_every_n_steps=2",)
    run = start(out, *flags, faults=[disk, ("hold_step", 2, str(marker), HELD_S)])
    wait_until(marker.exists, run)
    run.send(signal.SIGTERM)
    assert run.wait() == 143, run.text
    assert "No space left on device" in run.text
    assert "at-step00000003-state" in states(out)
    run = start(out)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


def test_signals_are_heard_from_the_start_on(arguments, tmp_path):
    """While torch is imported, too, a matter of many seconds on a busy machine."""
    command = [sys.executable, str(ROOT / "sdxl_pretrain.py"), *arguments(tmp_path / "out")]
    run = subprocess.Popen(command, cwd=ROOT, env=ENV, stderr=subprocess.PIPE, text=True)
    try:
        status = Path(f"/proc/{run.pid}/status")
        bit = 1 << (signal.SIGUSR1 - 1)
        wait_until(lambda: int(re.search(r"SigCgt:\s*(\w+)", status.read_text())[1], 16) & bit)
        os.kill(run.pid, signal.SIGUSR1)
        os.kill(run.pid, signal.SIGTERM)
        _, printed = run.communicate(timeout=300)
    finally:
        run.kill()
    assert run.returncode == 143, printed
    assert "stopped by SIGTERM" in printed and "Traceback" not in printed
    assert "running training" not in printed


@pytest.mark.all
def test_ctrl_c_at_the_launcher_of_two_processes_is_answered_and_saves(arguments, undisturbed_two, tmp_path):
    out, log = tmp_path / "out", tmp_path / "screen"
    command = [
        sys.executable, "-m", "library.processes.launch", "--nnodes=1", "--nproc_per_node=2", "--node_rank=0",
        "--master_ip=", "--master_port=0", "--start_timeout=60", f"--log={tmp_path / 'train'}", "--",
        str(ROOT / "sdxl_pretrain.py"), *arguments(out, "--gradient_accumulation_steps=1"),
    ]  # fmt: skip
    env = {**ENV, "LAUNCHER_COMMAND": "bash test/launcher.sh --output_dir=out"}
    with log.open("w") as screen:
        run = subprocess.Popen(command, cwd=ROOT, env=env, stdout=screen, stderr=screen)
        wait_until(lambda: steps_done(out) >= 2)
        run.send_signal(signal.SIGINT)
        assert run.wait(100) == 130, log.read_text()
        printed = log.read_text()
        assert printed.count("SIGINT: saving after this step, then ending; again within 8 s") == 1
        assert "to go on: bash test/launcher.sh --resume=auto --output_dir=out" in printed
        assert states(out) == [f"at-step{steps_done(out):08d}-state"]
        assert subprocess.run(command, cwd=ROOT, env=env, stdout=screen, stderr=screen, timeout=300).returncode == 0
    assert_undisturbed(out, undisturbed_two)
