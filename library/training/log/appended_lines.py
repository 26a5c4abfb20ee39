"""A file to which a run appends lines, and which never ends it: what cannot be written now is written later."""

import logging
import os
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from pathlib import Path

logger = logging.getLogger(__name__)

_MOST_WAITING_BYTES = 64 << 20  # some 100,000 lines of metrics.jsonl; beyond it the oldest lines are dropped


class AppendedLines:
    """Appends whole lines to a file, in order. Lines that a full or failing disk refuses wait in memory."""

    def __init__(self, path: Path) -> None:
        """
        Args:
            path: the file; it is made with the first line.
        """
        self.path = path
        self._descriptor: int | None = None
        self._waiting = b""
        self._warned = False

    def add(self, lines: Iterable[str]) -> None:
        """Append lines, after those that are still waiting; a failure is a warning, said once until it is over."""
        self._waiting += "".join(f"{line}\n" for line in lines).encode()
        self._guarded(self._write)

    def sync(self) -> None:
        """Make the file durable, as far as the disk lets it."""
        self._guarded(self._write)
        if self._descriptor is not None:
            self._guarded(partial(os.fsync, self._descriptor))

    def close(self) -> None:
        """Write what is waiting, and close the file; safe to call twice."""
        self._guarded(self._write)
        self._let_go()

    def _write(self) -> None:
        """Write what is waiting; what the disk has taken, parts of lines too, is not written again."""
        if self._waiting and self._descriptor is None:
            self._descriptor = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
        while self._waiting and self._descriptor is not None:
            self._waiting = self._waiting[os.write(self._descriptor, self._waiting) :]

    def _guarded(self, act: Callable[[], object]) -> None:
        try:
            act()
        except OSError as error:
            if not self._warned:
                logger.warning("%s: cannot be written (%s); its lines wait in memory", self.path, error.strerror)
            self._warned = True
            self._let_go()  # a network disk that comes back wants the file opened anew
            if len(self._waiting) > _MOST_WAITING_BYTES:
                self._waiting = self._waiting[self._waiting.index(b"\n", _MOST_WAITING_BYTES // 2) + 1 :]
            return
        if self._warned and not self._waiting:
            logger.warning("%s: is written again", self.path)
            self._warned = False

    def _let_go(self) -> None:
        if self._descriptor is not None:
            with suppress(OSError):
                os.close(self._descriptor)
        self._descriptor = None
