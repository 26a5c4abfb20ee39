"""accelerate's scheduler wrapper: the schedule counts optimizer steps, on any number of processes."""

from collections.abc import Callable
from typing import Any

from third_patch.registry import Patch


def _step(original: Callable[..., Any]) -> Callable[..., Any]:
    def step(self: Any, *args: Any, **kwargs: Any) -> None:
        """Step the schedule once, unless the optimizer's step was skipped."""
        if self.step_with_optimizer and any(optimizer.step_was_skipped for optimizer in self.optimizers):
            return
        if self.step_with_optimizer and not self.gradient_state.sync_gradients:
            original(self, *args, **kwargs)
            return
        self.scheduler.step(*args, **kwargs)

    return step


PATCHES = (
    Patch(
        target="accelerate.scheduler:AcceleratedScheduler.step",
        why="accelerate steps the schedule once for each process, so that it ends n times too early on n of them; here "
        "it counts optimizer steps",
        versions=">=1.11,<=1.15",
        signature="(self, *args, **kwargs)",
        replace=_step,
        remove_when="accelerate lets the schedule count optimizer steps without its data loader's split_batches",
    ),
)
