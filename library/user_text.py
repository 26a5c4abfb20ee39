"""Texts that users write: configurations, prompts, metadata."""

import sys
from pathlib import Path
from typing import Any

from library.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib


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


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML text's table; ValueError with line and column where it is none."""
    return tomllib.loads(text)
