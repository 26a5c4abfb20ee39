"""Writing states: beside training, over several ranks, and through kills, power cuts, full and read-only disks."""

import contextlib
import re
import resource
import shutil
import subprocess
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.errors import TrainingError
from library.training.state import files as state_files
from library.training.state import states as states_module
from library.training.state import writer as state_writer
from library.training.state.choice import clear_left_behind, newest_valid
from library.training.state.files import StateInfo, read_state
from library.training.state.lineage import new_lineage
from library.training.state.names import step_name
from library.training.state.retention import Retention
from library.training.state.run_lock import RunLock
from library.training.state.states import StateCadence, States
from library.training.state.writer import StateWriter
from test.training.state.power_cut import run_until


def info(step: int) -> StateInfo:
    return StateInfo(step, 7, "abc", {}, {}, {}, new_lineage(None, 0, []))


def weights(value: float, numbers: int = 50) -> dict:
    return {"unet": {"weight": torch.full((numbers,), value)}}


def value_of(folder: Path) -> float:
    found = read_state(folder).whole["unet"]["weight"]
    assert found.eq(found[0]).all()
    return float(found[0])


def snapshot(writer: StateWriter, step: int, value: float | None = None, numbers: int = 50) -> None:
    writer.snapshot(step_name(None, step), info(step), {}, weights(step if value is None else value, numbers))


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


@contextlib.contextmanager
def tmpfs(folder: Path, size: str):
    folder.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], capture_output=True)
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


# Beside training -----------------------------------------------------------------------------------------------------


def test_what_is_saved_is_what_was_there_at_the_snapshot(tmp_path, monkeypatch):
    go = threading.Event()
    real = state_writer.write_tensors
    monkeypatch.setattr(state_writer, "write_tensors", lambda *a: (go.wait(30), real(*a))[1])
    parameter = torch.ones(1000)
    with StateWriter(tmp_path) as writer:
        writer.snapshot("last", info(1), {}, {"unet": {"weight": parameter}})
        parameter.fill_(2.0)  # training goes on
        assert not (tmp_path / "last-state").exists()
        go.set()
    assert value_of(tmp_path / "last-state") == 1.0


def test_one_copy_is_held_and_used_again(tmp_path, monkeypatch):
    seen = []
    real = state_writer.write_tensors
    monkeypatch.setattr(
        state_writer, "write_tensors", lambda p, t: (seen.append([x.data_ptr() for x in t.values()]), real(p, t))[1]
    )
    with StateWriter(tmp_path) as writer:
        for step in (1, 2, 3):
            snapshot(writer, step)
    assert len(seen) == 3
    assert seen[0] == seen[1] == seen[2]


def test_memory_reserved_beforehand_is_what_the_first_snapshot_uses(tmp_path):
    with StateWriter(tmp_path) as writer:
        own = {"training": {"weight": torch.full((50,), 3.0)}}
        writer.reserve(own)
        writer._reserving.join()
        reserved = {key: buffer.data_ptr() for key, buffer in writer._buffers.items()}
        writer.snapshot("last", info(1), own)
        assert len(reserved) == 1
        assert {key: buffer.data_ptr() for key, buffer in writer._buffers.items()} == reserved
    assert read_state(tmp_path / "last-state").own[0]["training"]["weight"].eq(3.0).all()


def test_a_failure_is_told_at_once_and_does_not_stop_the_next_save(tmp_path, monkeypatch, caplog):
    with StateWriter(tmp_path) as writer:
        snapshot(writer, 1)
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(state_files.os, "fsync", lambda fd: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            for failures in (1, 2):
                snapshot(writer, 2)
                writer.join()
                assert writer.failed() and writer.failures == failures
        assert re.search(rf"{tmp_path}.*Input/output error.*earlier ones are whole", caplog.text)
        with pytest.raises(TrainingError, match=rf"{tmp_path}.*Input/output error.*earlier ones are whole"):
            writer.wait()
        assert names_in(tmp_path) == ["at-step00000001-state"]
        snapshot(writer, 3)
        writer.wait()
        assert not writer.failed() and writer.failures == 0
    assert names_in(tmp_path) == ["at-step00000001-state", "at-step00000003-state"]


def test_a_failed_state_is_tried_again_at_once_and_then_less_often(tmp_path, monkeypatch):
    clock = [100.0]
    monkeypatch.setattr(states_module.time, "monotonic", lambda: clock[0])
    writer = StateWriter(tmp_path)
    parts = SimpleNamespace(own_parts=dict)
    states = States(writer, parts, {}, StateCadence(), lambda step, _: info(step), lambda step: step_name(None, step))
    with monkeypatch.context() as patch:
        patch.setattr(state_writer, "write_manifest", lambda *_: (_ for _ in ()).throw(OSError(28, "No space left")))
        for step, waits_s in enumerate([0, 30, 60, 120, 240, 480, 600, 600], start=1):
            states.save(step, {})
            writer.join()
            assert states.try_again() == (waits_s == 0)
            clock[0] += waits_s - 1 if waits_s else 0
            assert states.try_again() == (waits_s == 0)
            clock[0] += 1
            assert states.try_again()
    states.save(10, {})
    writer.join()
    assert not states.try_again()
    assert names_in(tmp_path) == ["at-step00000010-state"]


def test_a_run_that_fails_still_writes_the_state_under_way(tmp_path):
    with pytest.raises(ZeroDivisionError), StateWriter(tmp_path) as writer:
        snapshot(writer, 1)
        _ = 1 / 0
    assert value_of(tmp_path / "at-step00000001-state") == 1.0


def test_old_states_go_after_the_new_one_is_there(tmp_path):
    with StateWriter(tmp_path, retention=Retention(last_n_steps=20)) as writer:
        for step in (10, 20, 30, 40, 50):
            snapshot(writer, step)
    assert names_in(tmp_path) == [f"at-step000000{step}-state" for step in (30, 40, 50)]


# Several ranks -------------------------------------------------------------------------------------------------------


def test_each_rank_writes_its_own_part_into_one_state(tmp_path):
    writers = [StateWriter(tmp_path, rank=rank, ranks=3) for rank in range(3)]
    for step in (1, 2):
        for writer in reversed(writers):  # rank 0 last; any order does
            writer.snapshot(
                step_name(None, step), info(step), {"optimizer": {"part": torch.full((4,), writer.rank + 10.0 * step)}},
                weights(step) if writer.rank == 0 else None,
            )  # fmt: skip
    for writer in writers:
        writer.finish()
    for step in (1, 2):
        state = read_state(tmp_path / f"at-step0000000{step}-state")
        assert [float(own["optimizer"]["part"][0]) for own in state.own] == [10.0 * step + rank for rank in range(3)]
        assert list(state.whole) == ["unet"]
    assert "rank00002-of-00003.optimizer.safetensors" in names_in(tmp_path / "at-step00000002-state")
    with pytest.raises(ValueError, match="rank 0"):
        writers[1].snapshot("x", info(1), {}, weights(1))


def test_rank_0_tells_which_other_could_not_write_or_never_came(tmp_path, monkeypatch):
    writers = [StateWriter(tmp_path, rank=rank, ranks=2, timeout_s=0.3) for rank in range(2)]
    snapshot(writers[0], 1)
    with pytest.raises(TrainingError, match=r"rank 1 has written nothing.*share"):
        writers[0].finish()
    assert list(tmp_path.iterdir()) == []
    writers[0].timeout_s = 30
    writers[1]._saves = 1
    real = state_writer.write_json

    def full(path, content):
        if "rank00001" in path.name:
            raise OSError(28, "No space left on device")
        return real(path, content)

    monkeypatch.setattr(state_writer, "write_json", full)
    writers[1].snapshot(step_name(None, 2), info(2), {"optimizer": {"part": torch.zeros(3)}})
    snapshot(writers[0], 2)
    with pytest.raises(TrainingError, match=r"rank 1 could not write its state.*No space left"):
        writers[0].finish()
    with pytest.raises(TrainingError, match="No space left"):
        writers[1].finish()
    assert newest_valid(tmp_path, None) is None


@pytest.mark.parametrize("late", [False, True], ids=["it writes", "it never comes"])
def test_where_all_fail_at_once_rank_0_waits_for_what_another_rank_is_writing(tmp_path, monkeypatch, late):
    """A checkpoint fails on all ranks while one of them still writes its part of a state."""
    monkeypatch.setattr(state_writer, "_QUIET_S", 0.3 if late else 60.0)
    go, real, failing = threading.Event(), state_writer.write_tensors, threading.Event()

    def slow(path, tensors):
        if path.name.startswith("rank00001"):
            go.wait(30)
        return real(path, tensors)

    monkeypatch.setattr(state_writer, "write_tensors", slow)
    first, second = (StateWriter(tmp_path, rank=rank, ranks=2) for rank in range(2))

    def fail_on_rank_0():
        with contextlib.suppress(ZeroDivisionError), first:
            snapshot(first, 1)
            failing.set()
            _ = 1 / 0

    ends = threading.Thread(target=fail_on_rank_0)
    second.snapshot(step_name(None, 1), info(1), {"optimizer": {"part": torch.zeros(3)}})
    ends.start()
    assert failing.wait(30)
    time.sleep(0.3)  # longer than it takes to give up
    if late:
        ends.join(20)
        assert not ends.is_alive() and first.failed()
    go.set()
    second.join()
    ends.join(20)
    assert (newest_valid(tmp_path, None) is None) == late


def test_rank_0_does_not_wait_for_one_that_could_not_begin(tmp_path, monkeypatch):
    first, second = (StateWriter(tmp_path, rank=rank, ranks=2, timeout_s=20) for rank in range(2))
    monkeypatch.setattr(second, "_copied", lambda *_: (_ for _ in ()).throw(RuntimeError("no pinned memory")))
    snapshot(first, 1)
    with pytest.raises(RuntimeError, match="pinned"):
        second.snapshot(step_name(None, 1), info(1), {"optimizer": {"part": torch.zeros(3)}})
    with pytest.raises(TrainingError, match="rank 1 could not write its state: no pinned memory"):
        first.finish()


# Kills and power cuts ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("power_cut", [False, True], ids=["killed", "power cut"])
def test_whenever_a_save_is_cut_off_the_last_durable_state_resumes(tmp_path, power_cut):
    start = tmp_path / "start"
    start.mkdir()
    with StateWriter(start) as writer:
        snapshot(writer, 5)
    expected = [(5, 5.0), (10, 10.0), (15, 15.0), (15, 16.0)]  # step and value after each part of the work
    ends = set()
    for last in range(0, 1000, 1 if power_cut else 5):  # a power cut is a kill, and worse
        folder = tmp_path / f"{last}"
        shutil.copytree(start, folder)

        def work(durable, folder=folder):
            lock = RunLock(folder)
            clear_left_behind(folder, lock)
            writer = StateWriter(folder, retention=Retention(last_n_steps=5))
            for step, value in expected[1:]:  # adds one; adds one and lets one go; replaces one
                snapshot(writer, step, value)
                writer.wait()
                durable()

        parts, finished = run_until(work, last, power_cut)
        ends.add(parts)
        with RunLock(folder) as lock:
            clear_left_behind(folder, lock)
        newest = newest_valid(folder, None)
        assert newest is not None, last
        found = (read_state(newest).info.step, value_of(newest))
        assert found in expected[parts : parts + 2], f"cut off before operation {last}"
        assert [path.name for path in folder.iterdir() if path.name[0] == "." and path.name != ".lock"] == []
        if finished:
            break
        shutil.rmtree(folder)
    assert finished
    assert ends == {0, 1, 2, 3}, ends
    assert last > 60


# Disks ---------------------------------------------------------------------------------------------------------------


def test_space_is_asked_for_in_advance(tmp_path):
    with tmpfs(tmp_path / "small", "4m") as small, StateWriter(small) as writer:
        snapshot(writer, 1)
        snapshot(writer, 2, numbers=2_000_000)
        with pytest.raises(TrainingError, match=r"training state at-step00000002-state needs \d+ bytes .* are free"):
            writer.wait()
        writer.snapshot("at-step00000003", info(3), {}, weights(3), other_ranks_bytes=10_000_000)
        with pytest.raises(TrainingError, match="needs"):
            writer.wait()
        assert names_in(small) == ["at-step00000001-state"]


def test_a_disk_that_fills_up_in_mid_save_leaves_the_earlier_state(tmp_path, monkeypatch):
    with tmpfs(tmp_path / "small", "4m") as small:
        writer = StateWriter(small, retention=Retention(last_n_steps=0))
        snapshot(writer, 1)
        monkeypatch.setattr(state_writer, "check_space", lambda *_: None)  # another program takes it meanwhile
        snapshot(writer, 2, numbers=2_000_000)
        with pytest.raises(TrainingError, match=r"small.*No space left on device"):
            writer.finish()
        assert names_in(small) == ["at-step00000001-state"]
        assert value_of(newest_valid(small, None)) == 1.0
        snapshot(writer, 3)
        writer.finish()
        assert names_in(small) == ["at-step00000003-state"]


def test_a_limit_on_file_size_is_an_error_that_names_the_folder(tmp_path):
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    writer = StateWriter(tmp_path)
    snapshot(writer, 1)
    writer.wait()
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, hard))
    try:
        snapshot(writer, 2, numbers=100_000)
        with pytest.raises(TrainingError, match=rf"{tmp_path}.*File too large"):
            writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert value_of(newest_valid(tmp_path, None)) == 1.0


def test_a_read_only_folder_is_named(tmp_path):
    with tmpfs(tmp_path / "frozen", "4m") as frozen:
        writer = StateWriter(frozen)
        snapshot(writer, 1)
        writer.wait()
        subprocess.run(["mount", "-o", "remount,ro", frozen], check=True)
        snapshot(writer, 2)
        with pytest.raises(TrainingError, match=r"frozen.*Read-only file system"):
            writer.finish()
        assert value_of(newest_valid(frozen, None)) == 1.0


def test_old_states_that_cannot_be_looked_for_are_no_failure_of_the_new_one(tmp_path, monkeypatch, caplog):
    real = Path.iterdir

    def refuse(self):
        if self == tmp_path:
            raise OSError(5, "Input/output error")
        return real(self)

    with StateWriter(tmp_path, retention=Retention(last_n_steps=0)) as writer:
        snapshot(writer, 1)
        writer.wait()
        with monkeypatch.context() as patch:
            patch.setattr(Path, "iterdir", refuse)
            snapshot(writer, 2)
            writer.wait()
    assert "old training states cannot be removed (Input/output error)" in caplog.text
    assert names_in(tmp_path) == ["at-step00000001-state", "at-step00000002-state"]
