"""Texts that users write: configurations, prompts, metadata, captions."""

import codecs
import re
import sys
from pathlib import Path
from typing import Any

from library.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

# Marks that editors put before a text, and the codecs that read it with its mark; UTF-32's begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)
_ALL_MARKS = tuple(mark for mark, _ in _MARKS)


def decode_text(data: bytes) -> str:
    """The text of bytes in UTF-8, with or without its mark, or in UTF-16 or UTF-32 with theirs.

    Raises:
        ValueError: it is in no such encoding; a sentence about it, without its full stop, with the way out.
    """
    encoding = "utf-8"
    if data.startswith(_ALL_MARKS):
        encoding = next(encoding for mark, encoding in _MARKS if data.startswith(mark))
    try:
        text = data.decode(encoding)
    except UnicodeDecodeError as error:
        if encoding not in ("utf-8", "utf-8-sig"):
            raise ValueError(f"is no whole {encoding.upper()} text; save it as UTF-8") from error
        found = f"byte {error.start} is {error.object[error.start]:#04x}"
        guess, command = _guess(data)
        raise ValueError(f"is not UTF-8 ({found}, perhaps {guess}); convert it: iconv -f {command} -t UTF-8") from error
    if "\0" in text:
        raise ValueError("has zero bytes, as UTF-16 without its mark; convert it: iconv -f UTF-16LE -t UTF-8")
    return text


def _guess(data: bytes) -> tuple[str, str]:
    """What an encoding may be that is not Unicode's, and a name of one that iconv knows."""
    runs = re.findall(rb"[\x80-\xff]+", data)
    if sum(len(run) for run in runs if len(run) > 1) > sum(len(run) == 1 for run in runs):
        return "GBK, Shift-JIS or a like one", "GBK"
    return "Windows' CP1252 or a like one", "CP1252"  # where letters above 0x7f mostly stand alone


def read_user_text(path: Path, flag: str) -> str:
    """The text of a file in UTF-8, with or without the mark that Windows' editors put before it, or in marked UTF-16.

    Args:
        flag: that named the file, for messages.

    Raises:
        InputError: it cannot be read, or is in another encoding.
    """
    try:
        data = path.read_bytes()
    except OSError as error:
        raise InputError(f"{flag} {path} cannot be read: {error.strerror}.") from error
    try:
        # Line ends as Python's text files have them, whatever system they were written on.
        return decode_text(data).replace("\r\n", "\n").replace("\r", "\n")
    except ValueError as error:
        raise InputError(f"{flag} {path} {error}.") from error


def parse_toml(text: str) -> dict[str, Any]:
    """A TOML text's table; ValueError with line and column where it is none."""
    return tomllib.loads(text)
