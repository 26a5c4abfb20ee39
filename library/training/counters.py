"""What a step did, what the loop has counted, and the figures that a run ends with."""

import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from library.training.log.metrics import MovingAverage
from library.training.ranks.rank_watch import Requests


@dataclass
class Counters:
    """What the loop has counted since the run began, through all its starts; a named object of training states."""

    average: MovingAverage = field(default_factory=MovingAverage)  # of the loss
    overflows: int = 0
    not_updated: int = 0  # steps
    not_finite_running: int = 0  # the last steps, one after another, whose loss or gradient was not finite
    quarantined: int = 0  # samples, over all processes
    pictures: list[str] = field(default_factory=list)  # positions of those that are due at this step and not drawn yet
    saved_at: float = 0.0  # the clock's time when the state was saved that the run has gone on from

    def state_dict(self) -> dict[str, Any]:
        """Plain values."""
        return {**vars(self), "average": self.average.values, "saved_at": time.time()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on counting."""
        for loss in state["average"]:
            self.average.add(loss)
        self.overflows, self.not_updated = state["overflows"], state["not_updated"]
        self.not_finite_running, self.quarantined = state["not_finite_running"], state["quarantined"]
        self.pictures, self.saved_at = list(state["pictures"]), state["saved_at"]


@dataclass(frozen=True)
class StepNumbers:
    """What the host learns of a step, over all processes, when its gradients are there."""

    loss: float
    grad_norm: float
    replaced: int  # samples
    requests: Requests


@dataclass(frozen=True)
class StepResult:
    """What one optimizer step did. `updated` is False where the weights were left alone."""

    numbers: StepNumbers
    overflows: int
    updated: bool
    lr: dict[str, float]  # by parameter group, as this step used it

    @property
    def loss(self) -> float:
        """The mean over all micro-batches and processes."""
        return self.numbers.loss

    @property
    def grad_norm(self) -> float:
        """Before clipping."""
        return self.numbers.grad_norm


@dataclass(frozen=True)
class RunReport:
    """The figures of the final block."""

    images_per_second: float
    average_loss: float
    steps: int
    overflows: int
    steps_not_updated: int
    quarantined: int
