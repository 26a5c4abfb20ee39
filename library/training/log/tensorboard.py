"""TensorBoard events of a run; a disk or a library that fails costs events and never the run."""

import logging
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

logger = logging.getLogger(__name__)

_RETRY_AFTER_S = 60


class Board:
    """Writes scalars to a folder of TensorBoard events. A minute after a failure it opens a new file of them."""

    def __init__(self, folder: Path, purge_step: int | None = None) -> None:
        """
        Args:
            purge_step: events of this step and later ones, of an earlier start, are not shown any more.
        """
        from torch.utils.tensorboard import SummaryWriter

        self._folder, self._make = folder, SummaryWriter
        self._failed_at = 0.0
        self._writer: Any = None
        self._guarded(lambda: self._open(purge_step))

    def add(self, values: Mapping[str, float], step: int) -> None:
        """Record values at a step."""
        if self._writer is None:
            if time.monotonic() - self._failed_at < _RETRY_AFTER_S:
                return
            self._guarded(lambda: self._open(None))

        def write() -> None:
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

        if self._writer is not None:
            self._guarded(write)

    def close(self) -> None:
        """Flush and close; safe to call twice."""
        if self._writer is not None:
            self._guarded(self._writer.close)
            self._writer = None

    def _open(self, purge_step: int | None) -> None:
        self._writer = self._make(str(self._folder), purge_step=purge_step)

    def _guarded(self, act: Callable[[], object]) -> None:
        """Do something with the writer; any failure of it is a warning. Its own thread's failures come up here, too."""
        try:
            act()
        except Exception as error:
            broken, self._writer, self._failed_at = self._writer, None, time.monotonic()
            logger.warning("TensorBoard: %s cannot be written (%s); training goes on without it", self._folder, error)
            if broken is not None:
                with suppress(Exception):
                    broken.close()
