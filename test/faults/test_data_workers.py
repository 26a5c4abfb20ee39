"""Processes that read the data and die or have no memory left, and a batch with a number that is none."""

import os
import signal
from pathlib import Path

from test.faults.runs import assert_undisturbed, metrics, steps_done, wait_until

EACH_STEP = "--save_state_every_n_steps=1"


def _ends_clearly(run, *said: str) -> None:
    """Exit status 1 and one clear sentence."""
    assert run.wait(60) == 1, run.text
    assert "Traceback" not in run.text
    last = run.text.splitlines()[-1]
    assert last.startswith("training stopped: ")
    for words in (*said, "--max_data_loader_n_workers", "--resume=auto"):
        assert words in last


def test_a_worker_that_is_killed_ends_the_run_with_a_sentence(start, undisturbed, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "there"
    run = start(out, EACH_STEP, faults=[("hold_step", 2, str(marker), 60)])
    wait_until(marker.exists, run)
    (worker,) = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    os.kill(int(worker), signal.SIGKILL)
    _ends_clearly(run, "a process that reads the data has died", worker)
    run = start(out, EACH_STEP)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)


def test_no_memory_to_decode_is_told_and_no_sample_is_blamed_for_it(start, undisturbed, tmp_path):
    out = tmp_path / "out"
    run = start(out, EACH_STEP, faults=[("no_memory_to_decode", 9)])
    _ends_clearly(run, "no memory left to read and decode images")
    run = start(out, EACH_STEP)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)
    assert not list(out.glob("quarantine*"))


def test_a_step_that_is_no_number_is_left_alone_counted_and_the_same_after_resuming(start, tmp_path):
    reference, out = tmp_path / "reference", tmp_path / "out"
    planted = [("nan_in_batch", 2)]
    run = start(reference, faults=planted)
    assert run.wait() == 0, run.text
    assert "step 3: loss not finite, weights left alone; samples: " in run.text
    assert "Steps without update (loss not finite) : 1\n" in run.text
    lines = metrics(reference)
    assert [line["updated"] for line in lines] == [True, True, False, True, True, True]
    assert lines[2]["loss"] is None and all(line["loss"] > 0 for line in lines if line["step"] != 3)
    run = start(out, EACH_STEP, faults=planted)
    wait_until(lambda: steps_done(out) >= 3, run)
    run.send(signal.SIGKILL)
    run.wait()
    run = start(out, EACH_STEP, faults=planted)
    assert run.wait() == 0, run.text
    assert_undisturbed(out, reference)
