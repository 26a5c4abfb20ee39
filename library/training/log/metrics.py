"""What a run measures of itself: speed without warm-up, average loss, metrics.jsonl, TensorBoard, the bar."""

import json
import math
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from library.progress_bar import ProgressBar
from library.training.log.appended_lines import AppendedLines
from library.training.log.tensorboard import Board
from library.training.state.names import METRICS

AVERAGE_WINDOW = 100  # steps in the average loss that the bar and the final block show
WARMUP_STEPS = 5  # left out of the speed: first-time allocations, kernel choices, workers starting


@dataclass(frozen=True)
class StepMetrics:
    """One optimizer step, a line of metrics.jsonl. Seconds and bytes; what is not finite is None."""

    step: int
    epoch: int
    loss: float | None
    average_loss: float | None
    lr: dict[str, float]
    grad_norm: float | None
    loss_scale: float | None
    overflows: int
    images_per_second: float
    images_per_second_without_wait: float
    data_wait_seconds: float
    memory_bytes: int
    updated: bool
    quarantined: int = 0  # samples replaced so far, over all processes


@dataclass
class SpeedMeter:
    """Images per second over the steps after warm-up, or over the last step of a run that is shorter.

    Time spent between steps on samples and checkpoints is not counted: callers time steps, not the run.
    """

    warmup_steps: int = WARMUP_STEPS
    _images: int = 0
    _seconds: float = 0.0
    _steps: int = 0
    _last: tuple[int, float] | None = None

    def add(self, images: int, seconds: float) -> None:
        """Count one step, its wait for data included."""
        self._steps += 1
        self._last = (images, seconds)
        if self._steps > self.warmup_steps:
            self._images += images
            self._seconds += seconds

    @property
    def measured_steps(self) -> int:
        """How many steps the figure stands on."""
        return max(self._steps - self.warmup_steps, min(self._steps, 1))

    @property
    def images_per_second(self) -> float:
        """The figure of the final block; 0 before the first step."""
        images, seconds = (self._images, self._seconds) if self._steps > self.warmup_steps else (self._last or (0, 0.0))
        return images / seconds if seconds > 0 else 0.0


@dataclass
class MovingAverage:
    """Mean of the last `window` finite values."""

    window: int = AVERAGE_WINDOW
    _values: deque[float] = field(default_factory=deque)

    @property
    def values(self) -> list[float]:
        """What the mean is of, oldest first."""
        return list(self._values)

    def add(self, value: float) -> None:
        """Take in one value; one that is not finite is passed over."""
        if math.isfinite(value):
            self._values.append(value)
            if len(self._values) > self.window:
                self._values.popleft()

    @property
    def value(self) -> float:
        """The mean; NaN before the first value."""
        return sum(self._values) / len(self._values) if self._values else math.nan


class MetricsWriter:
    """Writes each step to metrics.jsonl and TensorBoard and shows it in the bar; only on the main process.

    It adds to the metrics.jsonl that is there (`library.training.state.branch` has left in it what the run goes on
    from). Each line names the start that wrote it.
    """

    def __init__(
        self,
        output_dir: Path,
        logging_dir: Path | None,
        total_steps: int,
        main: bool = True,
        steps_done: int = 0,
        board_folder: str | None = None,
        run_id: str = "",
    ) -> None:
        """
        Args:
            steps_done: by the run that goes on.
            board_folder: where that run's TensorBoard events are, below `logging_dir`; None if it had none.
            run_id: of this start.
        """
        self.main, self.run_id = main, run_id
        self.board_folder: str | None = None
        if not main:
            return
        self._lines = AppendedLines(output_dir / METRICS)
        self._board: Board | None = None
        if logging_dir is not None:
            goes_on = board_folder is not None and (logging_dir / board_folder).is_dir()
            self.board_folder = board_folder if goes_on else f"{time.strftime('%Y%m%d%H%M%S')}/finetuning"
            self._board = Board(logging_dir / str(self.board_folder), steps_done + 1 if goes_on else None)
        self.bar = ProgressBar(
            total=total_steps, initial=steps_done, desc="steps", smoothing=0.1, dynamic_ncols=True, mininterval=0.5
        )

    def write(self, metrics: StepMetrics) -> None:
        """Record one step."""
        if not self.main:
            return
        self._lines.add([json.dumps({**asdict(metrics), "run": self.run_id})])
        if self._board is not None:
            self._board.add(_scalars(metrics), metrics.step)
        self._on_screen(lambda: self._advance(metrics))

    def _advance(self, metrics: StepMetrics) -> None:
        """Show the step in the bar."""
        shown = {"loss": metrics.loss, "avr_loss": metrics.average_loss, "img/s": metrics.images_per_second}
        if metrics.quarantined:
            shown["replaced"] = metrics.quarantined
        self.bar.set_postfix(
            {name: "nan" if value is None else f"{value:.4g}" for name, value in shown.items()}, refresh=False
        )
        self.bar.update(1)

    def write_values(self, step: int, epoch: int, values: Mapping[str, float | None]) -> None:
        """Record what is measured besides at a step, by TensorBoard's names: a line of its own in metrics.jsonl."""
        if not self.main:
            return
        self._lines.add([json.dumps({"step": step, "epoch": epoch, **values, "run": self.run_id})])
        if self._board is not None:
            self._board.add({name: value for name, value in values.items() if value is not None}, step)

    def write_text(self, line: str) -> None:
        """Print a line above the bar."""
        if self.main:
            self._on_screen(lambda: self.bar.write(line))

    def sync(self) -> None:
        """Make what was written durable: a state that follows should not know of more steps than the file does."""
        if self.main:
            self._lines.sync()

    def close(self) -> None:
        """Flush and close everything; safe to call twice."""
        if self.main:
            self._on_screen(self.bar.close)
            self._lines.close()
            if self._board is not None:
                self._board.close()

    def _on_screen(self, show: Callable[[], object]) -> None:
        """Show something. A terminal that is gone, or a full disk under the file that takes the output, ends no run."""
        with suppress(OSError):
            show()


def _scalars(metrics: StepMetrics) -> dict[str, float]:
    """TensorBoard's scalars, by the names that the field uses."""
    scalars: dict[str, Any] = {
        "loss": metrics.loss,
        "avr_loss": metrics.average_loss,
        "grad_norm": metrics.grad_norm,
        "loss_scale": metrics.loss_scale,
        "images_per_second": metrics.images_per_second,
        "data_wait_seconds": metrics.data_wait_seconds,
        "memory_bytes": metrics.memory_bytes,
        **{f"lr/{name}": rate for name, rate in metrics.lr.items()},
    }
    return {name: value for name, value in scalars.items() if value is not None}


def finite_or_none(value: float) -> float | None:
    """JSON has no NaN: what is not finite is null."""
    return value if math.isfinite(value) else None
