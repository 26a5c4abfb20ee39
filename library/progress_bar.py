"""Progress bars that do no harm where nobody reads them any more."""

from contextlib import suppress
from typing import Any

from tqdm import tqdm


class ProgressBar(tqdm):
    """tqdm's bar, which is switched off once its line cannot be written: the terminal is gone, the log's disk is full.

    tqdm keeps its lock where writing fails. Whoever logs beside the bar, a thread that writes a training state say,
    would then wait for ever.
    """

    def display(self, msg: str | None = None, pos: int | None = None) -> Any:
        """As tqdm's."""
        try:
            return super().display(msg, pos)
        except OSError:
            self.disable = True
            return False

    def close(self) -> None:
        """As tqdm's."""
        with suppress(OSError):
            super().close()
