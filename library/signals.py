"""SIGTERM, SIGINT, SIGHUP and SIGUSR1 as flags that long work checks; workers leave them to their parent."""

import os
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType, TracebackType
from typing import Any, Protocol

from library.errors import Stopped

STOPPING = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)
DUPLICATE_S = 1.0  # a stop signal so soon after the first is the same one, delivered twice
AGAIN_S = 8.0  # a later one within this time of the last means: now, without saving
_LOOK_S = 0.1
_END_S = 5.0  # so long a process may take to end by itself once its training state is durable
_PARENT_CHECK_S = 1.0
_NO_MORE = b"\0"


class Unfinished(Protocol):
    """Writing that neither a signal nor another process's failure may cut off.

    Attributes:
        what: is written, in words: "a training state".
    """

    what: str

    def is_writing(self) -> bool:
        """Whether something is being written. Any thread may call it."""

    def leave(self) -> None:
        """The process ends once this is written: other processes are not waited for any longer than they write."""


class Signals:
    """A context in which the signals only set flags, which the work checks between two of its units.

    The first SIGTERM, SIGINT or SIGHUP (a closed terminal, but not under nohup) asks to save and stop, SIGUSR1 to save
    and continue, and what will be done is said at once. Another stop signal within DUPLICATE_S of the last one counts
    as the same (terminals, launchers and batch systems signal both the group and the process). One within AGAIN_S of
    the last ends the process at once with its exit status, even if the main thread waits for another machine or a
    device; a training state or checkpoint that has begun is written before. A later one is a repetition, as some batch
    systems send it, and says again what is waited for. The context restores the earlier handlers at its end. Only the
    main thread may use it.

    Attributes:
        at_stop: what is done at a stop signal, for the message.
        at_once: the first stop signal ends the process, since there is nothing to save and nobody checks the flags.
        unfinished: what is written to its end, whatever comes.
        failure: what another process of the run has ended with, as an error of this one; ends what a signal ends.
    """

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.save_requested = False
        self.at_stop, self.at_once = "ending as soon as the work at hand can be left", False
        self.unfinished: list[Unfinished] = []
        self.failure: Exception | None = None
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = self._wakeup = -1
        self._watcher: threading.Thread | None = None
        self._over = threading.Event()

    @property
    def stop_requested(self) -> bool:
        """True from the first stop signal on."""
        return self.stop_signal is not None

    def take_save_request(self) -> bool:
        """True if a SIGUSR1 has come since the last call; several count as one."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def stop_if_requested(self) -> None:
        """End work that has nothing to save (indexing, caching) if a stop signal came or another process has failed.

        Raises:
            Stopped: a stop signal has come.
            Exception: `failure`.
        """
        if self.failure is not None:
            raise self.failure
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)

    def stop_as_another_process(self, number: int) -> None:
        """Set the stop flag for a signal that another process of the run has received. Any thread may call it."""
        if self.stop_signal is None:
            self.stop_signal = signal.Signals(number)
            self._say(number, " of another process")

    def ending_at_once(self, what: str) -> "_AtOnce":
        """A context in which the main thread waits for others and there is nothing to save: a signal ends it.

        Args:
            what: the process does, for the message: "waiting for rank 1".
        """
        return _AtOnce(self, what)

    @contextmanager
    def writing(self, what: str) -> Iterator[None]:
        """A context in which the main thread writes what must not be cut off.

        Args:
            what: it is, in words: "a checkpoint".
        """
        block = _WritingBlock(what)
        self.unfinished.append(block)
        try:
            yield
        finally:
            self.unfinished.remove(block)

    def finish_unfinished(self) -> None:
        """Wait until what is being written is complete, at the end of the process. Any thread may call it."""
        for one in list(self.unfinished):
            one.leave()
        while self._being_written():
            time.sleep(_LOOK_S)

    def _being_written(self) -> list[str]:
        """What is, in words."""
        return [one.what for one in list(self.unfinished) if one.is_writing()]

    def __enter__(self) -> "Signals":
        read, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._watcher = threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals")
        self._watcher.start()
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGUSR1):
            if number == signal.SIGHUP and signal.getsignal(number) == signal.SIG_IGN:
                continue  # nohup
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._over.set()
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()
        signal.set_wakeup_fd(self._wakeup_before)
        os.write(self._wakeup, _NO_MORE)
        if self._watcher is not None:
            self._watcher.join()
        os.close(self._wakeup)

    def _note(self, number: int, frame: FrameType | None = None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
        elif self.stop_signal is None:
            self.stop_signal = signal.Signals(number)

    def _watch(self, read: int) -> None:
        """Note a stop signal and answer it, and end the process when a second one comes.

        This runs in a thread, because Python's handlers run in the main thread only, which may be waiting for another
        machine or a device.

        Args:
            read: the pipe into which the C signal handler writes the number of every signal.
        """
        last_s = None
        with os.fdopen(read, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) not in (_NO_MORE, b""):
                if number[0] == signal.SIGUSR1:
                    self._write("SIGUSR1: saving a training state after this step, training goes on")
                if number[0] not in STOPPING:
                    continue
                now_s, before_s = time.monotonic(), last_s
                if before_s is not None and now_s - before_s < DUPLICATE_S:
                    continue
                last_s = now_s
                if before_s is not None and now_s - before_s < AGAIN_S:
                    self._end_now(number[0], "a second signal: ")
                self._note(number[0])
                if self.at_once:
                    self._end_now(number[0], "")
                self._say(number[0])

    def _say(self, number: int, whose: str = "") -> None:
        """Say what the process does because of a stop signal."""
        again = f"again within {AGAIN_S:.0f} s ends now without saving"
        self._write(f"{signal.Signals(number).name}{whose}: {self.at_stop}; {again}")

    def _end_now(self, number: int, why: str) -> None:
        """End the process; a training state that has begun is completed first."""
        if being_written := self._being_written():
            self._write(f"{why}{being_written[0]} is being written; the process ends when it is durable")
            self.finish_unfinished()
            if self._over.wait(_END_S):  # the main thread has come to its end by itself, and says more
                return
        name, doing = signal.Signals(number).name, f" while {self.at_stop}" if self.at_once else ""
        self._write(f"{why or f'{name}: '}ended at once{doing}; what was written before is complete")
        os._exit(128 + number)

    def _write(self, line: str) -> None:
        """A line on standard error, from the first process of each machine: the others would repeat it."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with suppress(OSError):  # the terminal may be gone
                os.write(2, f"\n{line}\n".encode())  # a progress bar may stand in the line


class _WritingBlock:
    """`Signals.writing`; there for as long as something is written."""

    def __init__(self, what: str) -> None:
        self.what = what

    def is_writing(self) -> bool:
        return True

    def leave(self) -> None:
        """It waits for no other process."""


class _AtOnce:
    """`Signals.ending_at_once`."""

    def __init__(self, signals: Signals, what: str) -> None:
        self._signals, self._what = signals, what

    def __enter__(self) -> None:
        self._before = self._signals.at_stop, self._signals.at_once
        self._signals.at_stop, self._signals.at_once = self._what, True
        self._signals.stop_if_requested()  # one that came before

    def __exit__(self, *_: object) -> None:
        self._signals.at_stop, self._signals.at_once = self._before


def leave_signals_to_parent() -> None:
    """Make a worker process ignore signals that are sent to the whole group, and end when its parent ends.

    A terminal's Ctrl-C and a batch system's SIGTERM reach every process; the parent still needs its workers to finish
    its step. SIGTERM of the parent itself (`Process.terminate`) ends the worker.
    """
    parent = os.getppid()
    signal.set_wakeup_fd(-1)  # the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    # SIGTERM is blocked in every thread; the thread below receives it, which tells it the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True, name="end with parent").start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_CHECK_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
