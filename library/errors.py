"""The exceptions that end a script with a message: bad input, training that cannot continue, a signal."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager

from library.redaction import redacted


class InputError(ValueError):
    """Bad input from the user: a flag, a file, a data set.

    The message names the flag or file, says what is wrong with it and what to do; where several things are wrong, each
    stands on a line of its own. Addresses in it lose their secrets. Scripts print it to standard error and exit with
    status 2.
    """

    def __init__(self, *problems: str) -> None:
        super().__init__(*(redacted(str(problem)) for problem in problems))

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, a sentence or two each."""
        return tuple(map(str, self.args))

    def __str__(self) -> str:
        return "\n".join(self.problems)


class Problems:
    """Gathers what is wrong with what the user gave, so that one error names all of it."""

    def __init__(self) -> None:
        self.found: list[str] = []

    @contextmanager
    def noted(self) -> Iterator[None]:
        """Take note of an InputError in a block; the work goes on behind the block."""
        try:
            yield
        except InputError as error:
            self.found += error.problems

    def raise_any(self) -> None:
        """Raise InputError if anything was found, each problem once."""
        if self.found:
            raise InputError(*dict.fromkeys(self.found))


class TrainingError(RuntimeError):
    """Training cannot continue (loss not finite, loss scale exhausted). Scripts print the message and exit with 1."""

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


class Stopped(Exception):  # noqa: N818
    """The run has ended because a signal asked for it. Scripts exit with 128 plus the signal's number (143, 130)."""

    def __init__(self, signal_number: int, saved: str = "") -> None:
        """
        Args:
            saved: what a later start goes on from, in words; empty where there is nothing.
        """
        name = signal.Signals(signal_number).name
        super().__init__(f"stopped by {name}; {saved}" if saved else f"stopped by {name}")
        self.exit_status, self.saved = 128 + signal_number, saved
