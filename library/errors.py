"""The exceptions that end a script with a message: bad input, training that cannot continue, a signal."""

import signal


class InputError(ValueError):
    """Bad input from the user: a flag, a file, a data set.

    The message names the flag or file, says what is wrong with it and what to do. Scripts print it on one line to
    standard error and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot continue (loss not finite, loss scale exhausted). Scripts print the message and exit with 1."""


class Stopped(Exception):  # noqa: N818
    """The run has ended because a signal asked for it. Scripts exit with 128 plus the signal's number (143, 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number
