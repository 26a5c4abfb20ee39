"""Writes that fail while a run trains, and two runs at once: what ends, and what the run that goes on is equal to."""

import errno

import pytest

from test.faults.figures import write_section
from test.faults.runs import assert_undisturbed, states

EACH_STEP = "--save_state_every_n_steps=1"
WRITER = "library.training.state.writer"
# What fails, at which call, with which number of the system's.
WRITES = {
    "a state's tensors: no space": (f"{WRITER}:write_tensors", 3, errno.ENOSPC),
    "a state's structure: over the quota": (f"{WRITER}:write_json", 4, errno.EDQUOT),
    "a state's manifest: input/output error": (f"{WRITER}:write_manifest", 2, errno.EIO),
    "a state's renaming: permission denied": (f"{WRITER}:replace_folder", 2, errno.EACCES),
    "an old state's removal: read-only file system": (f"{WRITER}:remove_state", 1, errno.EROFS),
    "a checkpoint: no space": ("library.training.task:Task.save", 1, errno.ENOSPC),
}


@pytest.mark.all
def test_writes_that_fail_cost_at_most_what_they_write(start, undisturbed, tmp_path):
    lines = ["| What fails once | Exit status | States at the end | Continued or finished run |", "|---|---|---|---|"]
    for number, (what, planted) in enumerate(WRITES.items()):
        out = tmp_path / f"out{number}"
        run = start(out, EACH_STEP, "--save_last_n_steps_state=2", faults=[("fail", *planted)])
        status = run.wait()
        assert status == ("checkpoint" in what), run.text
        assert "Traceback" not in run.text
        assert "planted" in run.text or "cannot be " in run.text
        assert f"at-step{6:08d}-state" in states(out)
        found = len(states(out))
        if status:
            assert start(out, EACH_STEP).wait() == 0
        assert_undisturbed(out, undisturbed)
        lines.append(f"| {what} | {status} | {found} | equal |")
    write_section(
        "Writes that fail",
        [
            "Runs of 6 steps with a state each step and `--save_last_n_steps_state=2`; one write fails once. A state "
            "that could not be written is written at the next step.",
            "",
            *lines,
        ],
    )


@pytest.mark.all
def test_two_runs_at_once_leave_each_other_alone(start, undisturbed, small_shard, tmp_path):
    together = tmp_path / "together"
    ranks = [start(together, EACH_STEP, log=f"log{number}") for number in range(2)]
    assert sorted(run.wait() for run in ranks) == [0, 2], ranks[0].text
    assert "another run writes there" in ranks[0].text + ranks[1].text
    assert_undisturbed(together, undisturbed)
    caches = ("--cache_latents", "--cache_latents_to_disk")
    runs = [start(tmp_path / f"out{number}", *caches) for number in range(2)]
    assert [run.wait() for run in runs] == [0, 0], runs[0].text
    assert_undisturbed(tmp_path / "out0", tmp_path / "out1")
    write_section(
        "Two runs at once",
        [
            "Two runs started together in one output folder: one trained and was equal to the undisturbed run, the "
            "other was refused with exit status 2 before it wrote anything. Two runs in folders of their own that "
            "filled one cache on disk together: both trained, and were equal to each other.",
        ],
    )
