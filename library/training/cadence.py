"""How often a run saves, samples and validates."""

from dataclasses import dataclass


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
