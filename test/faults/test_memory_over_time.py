"""A long run needs no more memory and no more files at its end than after its first steps, its workers included."""

import os
from pathlib import Path

import numpy as np
import pytest

from test.faults.figures import write_section
from test.faults.runs import steps_done

STEPS, WARMUP = 2000, 300
_PAGE = os.sysconf("SC_PAGE_SIZE")


def _processes(pid: int) -> list[int]:
    """A process and its children."""
    children = Path(f"/proc/{pid}/task/{pid}/children").read_text().split()
    return [pid, *map(int, children)]


def _measured(pid: int) -> tuple[int, int] | None:
    """Resident bytes and open files over a run's processes; shared pages count in each."""
    try:
        processes = _processes(pid)
        resident = sum(int(Path(f"/proc/{p}/statm").read_text().split()[1]) for p in processes) * _PAGE
        return resident, sum(len(os.listdir(f"/proc/{p}/fd")) for p in processes)  # noqa: PTH208
    except (FileNotFoundError, ProcessLookupError):
        return None


@pytest.mark.all
def test_memory_and_files_do_not_grow_over_two_thousand_steps(start, tmp_path):
    out, found = tmp_path / "out", []
    run = start(
        out, f"--max_train_steps={STEPS}", "--save_state_every_n_steps=200", "--save_last_n_steps_state=200",
        "--gradient_accumulation_steps=1", "--save_every_n_steps=500", f"--logging_dir={tmp_path / 'logs'}",
    )  # fmt: skip
    while not run.ended_within(0.5):
        measured = _measured(run.pid)
        if measured is not None:
            found.append((steps_done(out), *measured))
    assert run.status == 0, run.text
    steps, resident, files = np.array([row for row in found if WARMUP <= row[0] < STEPS], float).T
    assert len(steps) > 30
    slope_mb = np.polyfit(steps, resident / 2**20, 1)[0] * 100
    half = len(steps) // 2
    write_section(
        "Memory over time",
        [
            f"{STEPS} steps with one worker, TensorBoard, a state each 200 and a checkpoint each 500 steps; sampled "
            f"{len(steps)} times after step {WARMUP}: resident memory {resident.mean() / 2**20:.0f} MB over both "
            f"processes, slope {slope_mb:+.2f} MB per 100 steps (bound: 1); open files at most "
            f"{files[:half].max():.0f} in the first half, {files[half:].max():.0f} in the second.",
        ],
    )
    assert slope_mb < 1
    assert files[half:].max() <= files[:half].max()
