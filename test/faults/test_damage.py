"""Training states that are damaged, disks that are full or read-only, a clock set back, two runs in one folder."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from test.faults.runs import assert_undisturbed, states, steps_done, wait_until

EACH_STEP = "--save_state_every_n_steps=1"


def _state(out: Path, step: int) -> Path:
    return out / f"at-step{step:08d}-state"


def _weights(state: Path) -> Path:
    """The largest file of a state."""
    return max(state.glob("*.safetensors"), key=lambda path: path.stat().st_size)


def _truncate(state: Path) -> None:
    os.truncate(_weights(state), 1000)


def _flip_a_bit(state: Path) -> None:
    with _weights(state).open("r+b") as file:
        file.seek(100_000)
        byte = file.read(1)[0]
        file.seek(100_000)
        file.write(bytes([byte ^ 1]))


def _lose_a_file(state: Path) -> None:
    (state / "loop.json").unlink()


def _make_newer(state: Path) -> None:
    manifest = json.loads((state / "manifest.json").read_text())
    (state / "manifest.json").write_text(json.dumps({**manifest, "format": 99}))


DAMAGE = {
    6: (_truncate, "cut off or grown"),
    5: (_flip_a_bit, "its bytes have changed"),
    4: (_lose_a_file, "the file loop.json is missing"),
    3: (_make_newer, "written by a newer version"),
}


def test_damaged_states_are_passed_over_and_the_log_says_which_and_why(start, undisturbed, tmp_path):
    """And step numbers decide, not times: the oldest state looks the newest, and the clock is a year back."""
    out = tmp_path / "out"
    run = start(out, EACH_STEP)
    assert run.wait() == 0, run.text
    assert len(states(out)) == 6
    for step, (damage, _) in DAMAGE.items():
        damage(_state(out, step))
    for step in (1, 2):
        os.utime(_state(out, step), (2e9 - step, 2e9 - step))
    run = start(out, EACH_STEP, faults=[("clock_set_back", 365 * 86400)])
    assert run.wait() == 0, run.text
    passed_over = [line for line in run.text.splitlines() if "state passed over" in line]
    assert len(passed_over) == len(DAMAGE)
    for step, (_, reason) in DAMAGE.items():
        assert any(f"at-step{step:08d}-state" in line and reason in line for line in passed_over), (step, passed_over)
    assert f"resumed from {_state(out, 2)}: 2 steps are done" in run.text
    assert_undisturbed(out, undisturbed)


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 96 MB."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=96m", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_disk_that_fills_up_in_mid_save_ends_the_run_and_costs_nothing(start, undisturbed, small_disk):
    out, filler = small_disk / "out", small_disk / "filler"
    flags = (EACH_STEP, "--save_last_n_steps_state=1")
    run = start(out, *flags, faults=[("disk_full_in_save", 3, str(filler), 6 << 20)])
    assert run.wait() == 1, run.text
    assert "Traceback" not in run.text
    assert "No space left on device" in run.text and str(out) in run.text
    assert states(out) == ["at-step00000001-state", "at-step00000002-state"]
    filler.unlink()
    run = start(out, *flags)
    assert run.wait() == 0, run.text
    assert "2 steps are done" in run.text
    assert_undisturbed(out, undisturbed)


@pytest.mark.all
def test_a_disk_that_has_room_again_gets_the_next_state(start, undisturbed, small_disk, tmp_path):
    out, filler, there = small_disk / "out", small_disk / "filler", tmp_path / "there"
    faults = [("disk_full_in_save", 3, str(filler), 6 << 20), ("hold_step", 3, str(there), 3.0)]
    run = start(out, EACH_STEP, "--save_last_n_steps_state=1", faults=faults)
    wait_until(lambda: there.exists() and "the training state cannot be written" in run.text, run)
    filler.unlink()
    assert run.wait() == 0, run.text
    assert states(out) == ["at-step00000005-state", "at-step00000006-state"]
    assert_undisturbed(out, undisturbed)


@pytest.mark.all
def test_a_file_system_that_turns_read_only_costs_the_states_alone(start, undisturbed, tmp_path):
    """Each step's state is tried; what else is written may lie elsewhere."""
    out = tmp_path / "out"
    run = start(out, EACH_STEP, faults=[("read_only_in_save", 3)])
    assert run.wait() == 0, run.text
    assert "Traceback" not in run.text
    assert run.text.count("the training state cannot be written (Read-only file system)") == 4
    assert states(out) == ["at-step00000001-state", "at-step00000002-state"]
    assert_undisturbed(out, undisturbed)


def test_a_read_only_output_folder_is_refused_at_the_start(start, small_disk):
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    run = start(small_disk)
    assert run.wait() == 2, run.text
    assert f"--output_dir {small_disk}: cannot be written to (Read-only file system)" in run.text


def test_a_second_run_in_the_same_folder_is_refused_and_the_first_goes_on(start, undisturbed, tmp_path):
    out, marker = tmp_path / "out", tmp_path / "there"
    first = start(out, EACH_STEP, faults=[("hold_step", 2, str(marker), 600)])
    wait_until(lambda: marker.exists() and len(states(out)) == 2, first)
    before = {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"}
    second = start(out, EACH_STEP, log="second")
    assert second.wait() == 2, second.text
    assert f"--output_dir {out}: another run writes there (process {first.pid} on " in second.text
    assert {path: path.stat().st_mtime_ns for path in out.rglob("*") if path.name != ".lock"} == before
    first.end()
    assert steps_done(out) == 2
    run = start(out, EACH_STEP)  # a lock that a killed run has left blocks nobody
    assert run.wait() == 0, run.text
    assert_undisturbed(out, undisturbed)
