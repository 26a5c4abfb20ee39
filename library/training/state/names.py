"""When a run saves and samples, what it keeps, and what files are called (formats.md, "Names of what is written")."""

from collections.abc import Iterable
from dataclasses import dataclass

STATE_SUFFIX = "-state"
AVERAGE_SUFFIX = "-ema"  # of a checkpoint of the moving averages
DEFAULT_EPOCH_NAME, DEFAULT_STEP_NAME, DEFAULT_LAST_NAME = "epoch", "at", "last"


@dataclass(frozen=True)
class Cadence:
    """Every so many steps and every so many epochs; None means never."""

    every_n_steps: int | None = None
    every_n_epochs: int | None = None

    def step_is_due(self, steps_done: int) -> bool:
        """True after a step whose number the cadence names."""
        return bool(self.every_n_steps) and steps_done % (self.every_n_steps or 1) == 0

    def epoch_is_due(self, epochs_done: int) -> bool:
        """True after an epoch whose number the cadence names."""
        return bool(self.every_n_epochs) and epochs_done % (self.every_n_epochs or 1) == 0


@dataclass(frozen=True)
class Retention:
    """What a later save leaves of the earlier ones, in the field's two ways of counting; None keeps all.

    Attributes:
        last_n_epochs: of those saved at an epoch's end, so many are kept (--save_last_n_epochs, _state).
        last_n_steps: of those saved at a step, the ones at most so many steps back (--save_last_n_steps, _state):
            with saves each 10 steps and 30 here, those of steps 20, 30, 40 and 50 are there after step 50.
    """

    last_n_epochs: int | None = None
    last_n_steps: int | None = None

    def obsolete_epochs(self, epochs: Iterable[int], saved: int) -> list[int]:
        """Of what lies there, what may go once epoch `saved` is durable. Later ones (another run's) are left alone."""
        if self.last_n_epochs is None:
            return []
        earlier = sorted({epoch for epoch in epochs if epoch < saved}, reverse=True)
        return sorted(earlier[max(self.last_n_epochs - 1, 0) :])

    def obsolete_steps(self, steps: Iterable[int], saved: int) -> list[int]:
        """Of what lies there, what may go once step `saved` is durable. Later ones (another run's) are left alone."""
        if self.last_n_steps is None:
            return []
        return sorted({step for step in steps if step < saved - self.last_n_steps})


def step_name(output_name: str | None, steps_done: int) -> str:
    """'NAME-step00000500'."""
    return f"{output_name or DEFAULT_STEP_NAME}-step{steps_done:08d}"


def epoch_name(output_name: str | None, epochs_done: int) -> str:
    """'NAME-000020'."""
    return f"{output_name or DEFAULT_EPOCH_NAME}-{epochs_done:06d}"


def last_name(output_name: str | None) -> str:
    """'NAME' or 'last'."""
    return output_name or DEFAULT_LAST_NAME


def state_name(stem: str) -> str:
    """'NAME-step00000500-state': the folder of the training state that belongs to a checkpoint's stem."""
    return f"{stem}{STATE_SUFFIX}"


def sample_name(output_name: str | None, time: str, position: str, index: int, seed: int | None) -> str:
    """'NAME_20240131235959_e000020_00_42.png'; `position` is the epoch as 'e000020' or the step as '000500'."""
    parts = [
        *([output_name] if output_name else []),
        time,
        position,
        f"{index:02d}",
        *([] if seed is None else [str(seed)]),
    ]
    return "_".join(parts) + ".png"
