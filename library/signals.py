"""SIGTERM, SIGINT and SIGUSR1 as flags that long work asks for; workers that leave them to their parent."""

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any

from library.errors import Stopped

STOPPING = (signal.SIGTERM, signal.SIGINT)
_PARENT_CHECK_S = 1.0


class Signals:
    """Within its `with` block the signals only set flags, to be asked for between two pieces of work.

    The first SIGTERM or SIGINT asks to save and stop, SIGUSR1 to save and go on. After a first one that stops, SIGTERM
    and SIGINT have the system's own effect again: a second one ends the process at once. On leaving the block
    everything is as it was before. Only the main thread may use it.
    """

    def __init__(self) -> None:
        self.stop_signal: signal.Signals | None = None
        self.save_requested = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def stop_requested(self) -> bool:
        """True from the first SIGTERM or SIGINT on."""
        return self.stop_signal is not None

    def take_save_request(self) -> bool:
        """True once for every SIGUSR1 (several that came since the last call count as one)."""
        requested, self.save_requested = self.save_requested, False
        return requested

    def stop_if_requested(self) -> None:
        """For work that has nothing to save (indexing, caching): end it.

        Raises:
            Stopped: a signal has asked for it.
        """
        if self.stop_signal is not None:
            raise Stopped(self.stop_signal)

    def __enter__(self) -> "Signals":
        for number in (*STOPPING, signal.SIGUSR1):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)
        self._before.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGUSR1:
            self.save_requested = True
            return
        self.stop_signal = signal.Signals(number)
        for stopping in STOPPING:
            signal.signal(stopping, signal.SIG_DFL)


def leave_signals_to_parent() -> None:
    """Call it in a worker process: it takes no part in signals to the whole group, and ends when its parent does.

    A terminal's Ctrl-C and a batch system's SIGTERM reach every process; the parent still needs its workers to finish
    its step. SIGTERM of the parent itself (`Process.terminate`) ends the worker.
    """
    parent = os.getppid()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGUSR1, signal.SIG_IGN)
    # Blocked in every thread, and taken in one that can see who sent it.
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})
    threading.Thread(target=_end_with_parent, args=(parent,), daemon=True, name="end with parent").start()


def _end_with_parent(parent: int) -> None:
    while os.getppid() == parent:
        received = signal.sigtimedwait({signal.SIGTERM}, _PARENT_CHECK_S)
        if received is not None and received.si_pid == parent:
            break
    os._exit(0)
