"""Texts that users write: configurations, prompts, metadata."""

from pathlib import Path

from library.errors import InputError


def read_user_text(path: Path, flag: str) -> str:
    """The text of a file in UTF-8, with or without the mark that Windows' editors put before it.

    Args:
        flag: that named the file, for messages.

    Raises:
        InputError: it cannot be read, or is not UTF-8.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    except UnicodeDecodeError as error:
        raise InputError(
            f"{flag} {path} is not UTF-8: byte {error.start} is {error.object[error.start]:#04x}. Save it as UTF-8."
        ) from error
