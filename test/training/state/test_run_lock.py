"""The lock on an output_dir: one run at a time, and nobody blocked by the dead."""

import os
import signal
import socket
import subprocess
import time

import pytest

from library.errors import InputError
from library.training.state.run_lock import RunLock


def _holder(folder, grandchild: bool = False) -> tuple[int, int]:
    """A process that holds the lock until it is killed; its pid, and that of a child which outlives it."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        RunLock(folder)
        second = os.fork() if grandchild else 1
        if second:
            os.write(write, f"{second}\n".encode())
        time.sleep(60)
        os._exit(0)
    os.close(write)
    with os.fdopen(os.dup(read)) as file:
        other = int(file.readline())
    os.close(read)
    return child, other


def test_a_second_run_is_refused_and_told_who_has_it(tmp_path):
    holder, _ = _holder(tmp_path / "out")
    try:
        with pytest.raises(InputError, match=rf"out: another run .*process {holder} on {socket.gethostname()}"):
            RunLock(tmp_path / "out")
    finally:
        os.kill(holder, signal.SIGKILL)
        os.waitpid(holder, 0)
    RunLock(tmp_path / "out").release()


def test_children_that_outlive_a_killed_run_do_not_hold_its_lock(tmp_path):
    holder, survivor = _holder(tmp_path, grandchild=True)
    os.kill(holder, signal.SIGKILL)
    os.waitpid(holder, 0)
    try:
        os.kill(survivor, 0)  # it lives
        RunLock(tmp_path).release()
    finally:
        os.kill(survivor, signal.SIGKILL)


def test_a_forked_child_leaves_the_parents_lock_alone(tmp_path):
    with RunLock(tmp_path):
        child = os.fork()
        if child == 0:
            os._exit(0)
        os.waitpid(child, 0)
        with pytest.raises(InputError, match=f"process {os.getpid()}"):
            RunLock(tmp_path)
    with RunLock(tmp_path), pytest.raises(InputError):
        RunLock(tmp_path)


def test_an_old_lock_file_with_anything_in_it_blocks_nobody(tmp_path):
    (tmp_path / ".lock").write_text("x" * 5000)
    with RunLock(tmp_path), pytest.raises(InputError, match=f"process {os.getpid()}"):
        RunLock(tmp_path)


def test_a_folder_that_cannot_be_written_is_named(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"--output_dir .*file: cannot be written"):
        RunLock(tmp_path / "file")


def test_programs_started_while_it_is_held_do_not_inherit_it(tmp_path):
    lock = RunLock(tmp_path)
    program = subprocess.Popen(["sleep", "60"], close_fds=False)
    try:
        lock.release()
        RunLock(tmp_path).release()
    finally:
        program.kill()
        program.wait()


def test_a_lock_that_is_a_link_is_refused_and_what_it_leads_to_stays(tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "precious").write_text("mine")
    (tmp_path / "out" / ".lock").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"--output_dir .*out: \.lock in it is a link; remove it"):
        RunLock(tmp_path / "out")
    assert (tmp_path / "precious").read_text() == "mine"
