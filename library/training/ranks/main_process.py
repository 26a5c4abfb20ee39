"""What the main process does for all of them, so that an error of it is one of all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.training.ranks.rank_failure import together

Result = TypeVar("Result")


def on_main_process(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """Have the main process do something and give its result to all. A collective, that every process must call.

    Args:
        act: called on the main process alone, and without collectives of its own; its result must be something that
            pickle takes.

    Raises:
        InputError, TrainingError, Stopped: `act` has raised it, or what stands for another error of it; on every
            process.
    """
    outcome: list[Result | None] = [None]
    with together(accelerator):
        if accelerator.is_main_process:
            outcome = [act()]
    (result,) = broadcast_object_list(outcome)
    return result
