"""A .toml or .json file of options, as a table of keys and values."""

import json
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.redaction import remember_all
from library.user_text import parse_toml, read_user_text


def read_config(path: Path, flag: str) -> dict[str, Any]:
    """The file's table.

    Args:
        flag: that named the file, for messages.

    Raises:
        InputError: it cannot be read, is not TOML or JSON, or is no table.
    """
    if path.suffix.lower() not in (".toml", ".json"):
        raise InputError(f"{flag} {path} must be a .toml or a .json file.")
    text = read_user_text(path, flag)
    try:
        content = parse_toml(text) if path.suffix.lower() == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{flag} {path} is no valid {path.suffix[1:].upper()}: {error}") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path} must be a table of keys and values.")
    remember_all(content)
    return content
