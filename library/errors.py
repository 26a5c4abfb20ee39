"""The exceptions that end a script in order: the user can mend it, training cannot go on, a signal came."""

import signal


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a data set.

    The message names the flag or file, says what is wrong with it and what to do. Scripts print it on one line to
    standard error and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (loss not finite, loss scale exhausted). Scripts print the message, exit status 1."""


class Stopped(Exception):  # noqa: N818
    """A signal has asked the run to end, and it has. Scripts exit with 128 plus the signal's number (143, 130)."""

    def __init__(self, signal_number: int) -> None:
        super().__init__(f"stopped by {signal.Signals(signal_number).name}")
        self.exit_status = 128 + signal_number
