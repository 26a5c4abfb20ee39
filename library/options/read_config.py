"""A .toml or .json file of options, as a table of keys and values."""

import json
from pathlib import Path
from typing import Any

from library.errors import InputError
from library.redaction import remember_all
from library.user_text import parse_toml, read_user_text

KINDS = (".toml", ".json")  # extensions of files of options


def read_config(path: Path, flag: str) -> dict[str, Any]:
    """The file's table.

    Args:
        flag: that named the file, for messages.

    Raises:
        InputError: it cannot be read, is not TOML or JSON, or is no table.
    """
    kind = path.suffix.lower()
    if kind not in KINDS:
        raise InputError(f"{flag} {path} must be a .toml or a .json file.")
    text = read_user_text(path, flag)
    try:
        content = parse_toml(text) if kind == ".toml" else json.loads(text)
    except (ValueError, RecursionError) as error:
        hint = ""
        if "\\" in text:
            hint = ". In double quotes a backslash begins an escape: write paths with / or doubled backslashes"
            hint += ", or in single quotes" if kind == ".toml" else ""
        raise InputError(f"{flag} {path} is no valid {kind[1:].upper()}: {error}{hint}") from error
    if not isinstance(content, dict):
        raise InputError(f"{flag} {path} must be a table of keys and values.")
    remember_all(content)
    return content
