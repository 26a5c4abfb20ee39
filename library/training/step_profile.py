"""--profile: a trace of some steps by the device's own profiler, for TensorBoard or Chrome."""

import logging
from pathlib import Path
from typing import Any

import torch

from library import device as devices
from library.errors import InputError
from library.options.logs import profiled_steps

logger = logging.getLogger(__name__)


def check_profile(steps: str | None, end_step: int) -> None:
    """Raise InputError if a run of so many steps has none of those that --profile names."""
    if steps is not None and profiled_steps(steps)[0] > end_step:
        raise InputError(f"--profile={steps}: the run ends after step {end_step}; name earlier steps, or leave it out")


class StepProfiler:
    """Records the steps of a run that --profile names, and writes them once the last of them is done."""

    def __init__(
        self, steps: str, folder: Path, device: torch.device, rank: int, start_step: int, end_step: int
    ) -> None:
        """
        Args:
            steps: as the flag has them, `a..b`, counted from 1.
            folder: that gets a trace of each process.
            start_step: steps that are done before the loop begins.
            end_step: steps that are done when it ends.
        """
        self.first, self.last = profiled_steps(steps)
        self.folder, self.device, self.rank = folder, device, rank
        self._running: Any = None
        if self.last <= start_step:
            logger.warning("--profile=%s: these steps were done before this start; nothing is recorded", steps)
        self.last = min(self.last, end_step)
        self.first = max(self.first, start_step + 1)

    def begin(self, step: int) -> None:
        """Start to record if it is the first of the steps; called before a step's data are read."""
        if step != self.first or self.first > self.last:
            return
        devices.synchronize(self.device)
        self._running = devices.step_profiler(self.device, self.folder, f"rank{self.rank}", self.last - self.first + 1)
        self._running.start()

    def end(self, step: int) -> None:
        """Mark the end of a step, and write the trace if it is the last."""
        if self._running is None:
            return
        devices.synchronize(self.device)
        if step < self.last:
            self._running.step()
        else:
            self.close()

    def close(self) -> None:
        """Write what was recorded so far, if anything; a run that ends early does so, too."""
        if self._running is not None:
            running, self._running = self._running, None
            try:
                running.stop()
            except (OSError, RuntimeError) as error:  # a full disk must not end a run
                logger.warning("--profile: the trace cannot be written: %s", error)
                return
            logger.info("profile written: %s", self.folder)
