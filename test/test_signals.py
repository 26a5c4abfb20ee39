"""Signals as flags, a second one that ends at once, and workers that leave them to their parent."""

import ctypes
import os
import signal
import subprocess
import threading
import time
from types import SimpleNamespace

import pytest

from library import signals as module
from library.errors import Stopped, TrainingError
from library.exit_status import run_main
from library.signals import DUPLICATE_S, Signals, leave_signals_to_parent


def _fork(work) -> int:
    """A child that does this work, which is told how to say that it is ready; returns the child's pid once it has."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            work(lambda: os.close(write))
        finally:
            os._exit(99)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        file.read()
    return child


def _status(work) -> int:
    """How a child ends that does this work: exit status, or minus the signal's number."""
    child = os.fork()
    if child == 0:
        try:
            os._exit(work() or 0)
        except BaseException:
            os._exit(99)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_the_first_one_is_a_flag_and_gives_the_exit_status(number, status, capsys):
    before = signal.getsignal(number)

    def work():
        with Signals() as signals:
            signals.stop_if_requested()
            assert not signals.stop_requested
            os.kill(os.getpid(), number)
            assert signals.stop_requested
            signals.stop_if_requested()

    assert run_main(work) == status
    assert f"stopped by {number.name}" in capsys.readouterr().err
    assert signal.getsignal(number) is before


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("second", [signal.SIGTERM, signal.SIGINT])
def test_a_second_one_ends_the_process_at_once(first, second):
    def work():
        with Signals():
            os.kill(os.getpid(), first)
            time.sleep(1.1 * DUPLICATE_S)
            os.kill(os.getpid(), second)
            time.sleep(10)
            return 5

    began = time.monotonic()
    assert _status(work) == 128 + second
    assert time.monotonic() - began < 5


def test_a_second_one_ends_a_process_whose_main_thread_never_comes_back():
    """As one that waits in a collective operation for a process that is gone: no Python code runs there."""

    def work(ready):
        with Signals():
            c, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
            c.pthread_mutex_lock(mutex)
            ready()
            c.pthread_mutex_lock(mutex)
        os._exit(5)

    child = _fork(work)
    time.sleep(0.3)  # until the thread waits in C
    for _ in range(2):
        os.kill(child, signal.SIGTERM)
        time.sleep(1.1 * DUPLICATE_S)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 143


def test_the_first_one_is_answered_at_once(capfd):
    with Signals() as signals:
        signals.at_stop = "saving after this step, then ending"
        os.kill(os.getpid(), signal.SIGINT)
        _wait(lambda: signals.stop_requested)
        time.sleep(0.2)
        assert (
            capfd.readouterr().err.strip()
            == "SIGINT: saving after this step, then ending; again within 8 s ends now without saving"
        )
        signals.stop_signal = None
        signals.stop_as_another_process(signal.SIGTERM)
        assert "SIGTERM of another process: saving after this step" in capfd.readouterr().err


def test_one_that_comes_late_is_a_repetition(monkeypatch, capfd):
    """Some batch systems send a second signal after ten seconds; nobody has asked to lose anything."""
    monkeypatch.setattr(module, "DUPLICATE_S", 0.1)
    monkeypatch.setattr(module, "AGAIN_S", 0.3)

    def work():
        with Signals():
            for _ in range(3):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.5)
            return 5

    assert _status(work) == 5
    assert capfd.readouterr().err.count("SIGTERM: ending as soon as") == 3


def test_a_state_that_has_begun_is_written_to_its_end(tmp_path, monkeypatch, capfd):
    monkeypatch.setattr(module, "DUPLICATE_S", 0.1)
    monkeypatch.setattr(module, "_END_S", 0.1)
    end_s = time.monotonic() + 1.5

    def work():
        with Signals() as signals:
            state = SimpleNamespace(
                what="a training state", is_writing=lambda: time.monotonic() < end_s, leave=lambda: None
            )
            signals.unfinished.append(state)
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGTERM)
                time.sleep(0.3)
            time.sleep(10)
            return 5

    assert _status(work) == 143
    assert 0 <= time.monotonic() - end_s < 5
    assert "a second signal: a training state is being written" in capfd.readouterr().err


def test_what_the_main_thread_writes_is_waited_for_until_it_is_whole():
    with Signals() as signals:
        waits = threading.Thread(target=signals.finish_unfinished)
        with signals.writing("a checkpoint"):
            waits.start()
            waits.join(0.3)
            assert waits.is_alive()
        waits.join(5)
        assert not waits.is_alive() and not signals.unfinished


def test_another_processs_failure_ends_what_a_signal_ends():
    signals = Signals()
    signals.stop_if_requested()
    signals.failure = TrainingError("rank 1 has failed")
    with pytest.raises(TrainingError, match="rank 1 has failed"):
        signals.stop_if_requested()


def test_one_ends_at_once_what_only_waits(capfd):
    def work():
        with Signals() as signals, signals.ending_at_once("waiting for rank 1"):
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(10)
            return 5

    began = time.monotonic()
    assert _status(work) == 143
    assert time.monotonic() - began < 5
    assert "SIGTERM: ended at once while waiting for rank 1" in capfd.readouterr().err


def test_one_that_comes_twice_within_a_second_is_one():
    def work():
        with Signals() as signals:
            for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
                os.kill(os.getpid(), number)
                time.sleep(0.1)
            return 5 if signals.stop_signal == signal.SIGTERM else 6

    assert _status(work) == 5


def test_usr1_asks_for_a_state_and_training_goes_on():
    with Signals() as signals:
        assert not signals.take_save_request()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert not signals.stop_requested
        assert signals.take_save_request()
        assert not signals.take_save_request()
        os.kill(os.getpid(), signal.SIGUSR1)
        assert signals.take_save_request()
        signals.stop_if_requested()


def test_an_exception_says_its_status():
    assert Stopped(signal.SIGTERM).exit_status == 143


def _wait(true) -> None:
    deadline = time.monotonic() + 10
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def _worker() -> int:
    def work(ready):
        leave_signals_to_parent()
        ready()
        time.sleep(60)
        os._exit(7)

    return _fork(work)


def test_a_worker_passes_over_signals_to_the_group_and_obeys_its_parent():
    child = _worker()
    for name in ("TERM", "INT", "USR1"):
        subprocess.run(["kill", f"-{name}", str(child)], check=True)  # from a stranger, as a terminal or Slurm sends it
    time.sleep(0.3)
    assert os.waitpid(child, os.WNOHANG) == (0, 0)
    os.kill(child, signal.SIGTERM)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_a_worker_ends_with_its_parent():
    read, write = os.pipe()
    parent = os.fork()
    if parent == 0:
        os.close(read)
        _worker()
        os.kill(os.getpid(), signal.SIGKILL)
    os.close(write)
    os.waitpid(parent, 0)
    began = time.monotonic()
    with os.fdopen(read, "rb") as file:
        assert file.read() == b""  # the end of the file comes when the last holder of the other end has gone
    assert time.monotonic() - began < 5
