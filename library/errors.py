"""The one exception that means "the user can mend this": its message is shown without a traceback."""


class InputError(ValueError):
    """Bad input from outside: a flag, a file, a data set.

    The message names the flag or file, says what is wrong with it and what to do. Scripts print it on one line to
    standard error and exit with status 2.
    """


class TrainingError(RuntimeError):
    """Training cannot go on (loss not finite, loss scale exhausted). Scripts print the message, exit status 1."""
