"""How many of the earlier states and checkpoints a later save leaves."""

from collections.abc import Iterable
from dataclasses import dataclass


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
