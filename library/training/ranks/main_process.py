"""What the main process does for all of them, so that an error of it is one of all."""

from collections.abc import Callable
from typing import TypeVar

from accelerate import Accelerator
from accelerate.utils import broadcast_object_list

from library.errors import InputError

Result = TypeVar("Result")


def on_main_process(accelerator: Accelerator, act: Callable[[], Result]) -> Result:
    """Have the main process do something and give its result to all. A collective, that every process must call.

    Without it the others would wait in their next collective for a main process that has ended with an error.

    Args:
        act: called on the main process alone; its result must be something that pickle takes.

    Raises:
        InputError: `act` has raised it; on every process.
    """
    outcome: list[Result | InputError | None] = [None]
    if accelerator.is_main_process:
        try:
            outcome = [act()]
        except InputError as error:
            outcome = [error]
    (result,) = broadcast_object_list(outcome)
    if isinstance(result, InputError):
        raise result
    return result
