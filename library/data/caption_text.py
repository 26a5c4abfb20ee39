"""The text of a caption as training takes it, out of the bytes of a file or a tar's member, or out of a table."""

import json
import re

from library.data.bad_samples import SampleError
from library.user_text import decode_text

MAX_CAPTION_BYTES = 1 << 20  # of a caption file or JSON member; more is no caption
_LINE_END = re.compile(r"\r\n|\r|\n")
# What Python's str.splitlines takes for the end of a line, and no editor: white space.
_OTHER_SEPARATORS = str.maketrans(dict.fromkeys("\v\f\x1c\x1d\x1e\x85\u2028\u2029", " "))


def is_json_name(extension: str) -> bool:
    """Whether caption files of an extension hold JSON with a "caption"."""
    return extension.lower() == ".json"


def caption_lines(text: str) -> str:
    """A caption's lines that are not empty, without the white space around them, with line feeds between.

    Lines end with a line feed, a carriage return or both. Other separators that Unicode has are white space.
    """
    if text.isprintable():  # then it is one line: all that ends or separates lines is not printable
        return text.strip()
    lines = _LINE_END.split(text.translate(_OTHER_SEPARATORS))
    return "\n".join(line.strip() for line in lines if line.strip())


def caption_text(data: bytes, is_json: bool) -> str:
    """The caption in a file, as `caption_lines` has it: all of its text, or the "caption" of its JSON; "" if blank.

    Raises:
        SampleError: it is in an unknown encoding, or is no JSON, or its "caption" is no text.
    """
    try:
        text = decode_text(data)
    except ValueError as error:
        raise SampleError(f"its caption {error}") from error
    if is_json:
        text = _of_json(text)
    return caption_lines(text)


def check_characters(text: str) -> str:
    """The text, if it can be written.

    Raises:
        SampleError: it has halves of characters, which JSON can spell.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise SampleError(f"its caption has half a character, {error.object[error.start]!a}") from error
    return text


def _of_json(text: str) -> str:
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise SampleError(f"its caption is no JSON ({error})") from error
    caption = content.get("caption") if isinstance(content, dict) else None
    if caption is None or caption != caption:  # NaN: what tables write where a value is missing
        return ""
    if not isinstance(caption, str):
        raise SampleError(f'the "caption" of its JSON must be a text, got {caption!r:.60}')
    return check_characters(caption)
