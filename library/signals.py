"""SIGTERM, SIGINT and SIGUSR1 as flags that long work checks; workers leave them to their parent."""

import os
import signal
import threading
import time
from types import FrameType, TracebackType
from typing import Any

from library.errors import Stopped

STOPPING = (signal.SIGTERM, signal.SIGINT)
DUPLICATE_S = 1.0  # a stop signal so soon after the first is the same one, delivered twice
_PARENT_CHECK_S = 1.0
_NO_MORE = b"\0"


class Signals:
    """A context in which the signals only set flags, which the work checks between two of its units.

    The first SIGTERM or SIGINT asks to save and stop, SIGUSR1 to save and continue. A second SIGTERM or SIGINT within
    DUPLICATE_S of the first counts as the same signal (terminals, launchers and batch systems signal both the group and
    the process); a later signal ends the process at once with its exit status, even if the main thread waits for
    another machine or a device. The context restores the earlier handlers at its end. Only the main thread may use it.
    """

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.save_requested = False
        self._before: dict[signal.Signals, Any] = {}
        self._wakeup_before = self._wakeup = -1
        self._watcher: threading.Thread | None = None

    @property
    def stop_requested(self) -> bool:
        """True from the first SIGTERM or SIGINT on."""
        return self.stop_signal is not None

    def take_save_request(self) -> bool:
        """True if a SIGUSR1 has come since the last call; several count as one."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def stop_if_requested(self) -> None:
        """End work that has nothing to save (indexing, caching) if a stop signal has come.

        Raises:
            Stopped: a stop signal has come.
        """
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)

    def stop_as_another_process(self, number: int) -> None:
        """Set the stop flag for a signal that another process of the run has received. Any thread may call it."""
        if self.stop_signal is None:
            self.stop_signal = signal.Signals(number)

    def __enter__(self) -> "Signals":
        read, self._wakeup = os.pipe()
        os.set_blocking(self._wakeup, False)
        self._watcher = threading.Thread(target=self._watch, args=(read,), daemon=True, name="signals")
        self._watcher.start()
        self._wakeup_before = signal.set_wakeup_fd(self._wakeup, warn_on_full_buffer=False)
        for number in (*STOPPING, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
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
        """Note a stop signal, and end the process when a second one comes.

        This runs in a thread, because Python's handlers run in the main thread only, which may be waiting for another
        machine or a device.

        Args:
            read: the pipe into which the C signal handler writes the number of every signal.
        """
        first_s = None
        with os.fdopen(read, "rb", buffering=0) as numbers:
            while (number := numbers.read(1)) not in (_NO_MORE, b""):
                if number[0] not in STOPPING:
                    continue
                now_s = time.monotonic()
                if first_s is None:
                    first_s = now_s
                    self._note(number[0])
                elif now_s - first_s >= DUPLICATE_S:
                    os.write(2, b"a second signal: ended at once; what was written before is complete\n")
                    os._exit(128 + number[0])


def leave_signals_to_parent() -> None:
    """Make a worker process ignore signals that are sent to the whole group, and end when its parent ends.

    A terminal's Ctrl-C and a batch system's SIGTERM reach every process; the parent still needs its workers to finish
    its step. SIGTERM of the parent itself (`Process.terminate`) ends the worker.
    """
    parent = os.getppid()
    signal.set_wakeup_fd(-1)  # the parent's
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # SIGTERM is blocked in every thread; the thread below receives it, which tells it the sender.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True, name="end with parent").start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_CHECK_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
