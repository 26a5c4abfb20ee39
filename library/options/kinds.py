"""Kinds of values that flags take: how one is read from a word of the command line or from a file, and written back."""

import math
import re
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from library.address import Address, user_path
from library.redaction import redacted

_CONTROL = re.compile(r"[\x00-\x1f]")  # no character of a path or name that anybody means
_ESCAPED = re.compile(r'["\\\x00-\x1f\x7f]')  # what a TOML text cannot hold as it is
Read = Callable[[str], Any]  # a value from its text; ValueError with a sentence that begins with "must"


@dataclass(frozen=True)
class Kind:
    """Values of one kind.

    Attributes:
        read: a value from its text.
        metavar: what --help shows for the value; "" where the flag is a switch.
        choices: all values, where they are few.
        is_text: a file must give a text, for a number there would be a mistake.
        many: the flag takes a list of texts.
        switch: the flag stands alone on the command line, and is true or false in a file.
        comma_list: a list in a file is the same as its entries with commas between.
        empty_is_unset: an empty text means that the flag is not given: a path of no letters is the current folder.
    """

    read: Read
    metavar: str = ""
    choices: tuple[Any, ...] = ()
    is_text: bool = False
    many: bool = False
    switch: bool = False
    comma_list: bool = False
    empty_is_unset: bool = False

    def from_text(self, text: str) -> Any:
        """The value of one word of the command line; None where it says that the flag is not given.

        Raises:
            ValueError: the text is no such value; a sentence that begins with "must".
        """
        return self._value(text, repr(redacted(text)))

    def _value(self, text: str, as_written: str) -> Any:
        if self.empty_is_unset and not text.strip():
            return None
        try:
            if self.empty_is_unset and _CONTROL.search(text):
                raise ValueError(
                    "has a tab or line break in it, as TOML and JSON read \\t and \\n in double quotes: write paths "
                    "with /, with doubled backslashes or, in TOML, in single quotes"
                )
            return self.read(text)
        except ValueError as error:
            raise ValueError(f"{error}, got {as_written:.80}") from None

    def from_file(self, value: Any) -> Any:
        """The value of what a TOML or JSON file holds; raises ValueError as `from_text`."""
        if self.switch:
            wanted = isinstance(value, bool)
        elif self.many:
            wanted = isinstance(value, list) and all(isinstance(entry, str) for entry in value)
        else:
            types_of_one = (str,) if self.is_text else (str, int, float, *[list] * self.comma_list)
            wanted = isinstance(value, types_of_one) and not isinstance(value, bool)
        if not wanted:
            what = "true or false" if self.switch else "a list of texts" if self.many else self.what
            raise ValueError(f"must be {what}, got {in_toml(value):.80}")
        if self.switch:
            return value
        if self.many:
            return tuple(value)
        text = ",".join(map(str, value)) if isinstance(value, list) else str(value)
        return self._value(text, in_toml(value))

    @property
    def what(self) -> str:
        """What a value must be, for messages: as reading an empty text complains."""
        if self.is_text:
            return "a text"
        try:
            self.read("")
        except ValueError as error:
            return str(error).removeprefix("must be ")
        return "one value"


def in_toml(value: Any) -> str:
    """A value as a user writes it in a file, for messages."""
    if isinstance(value, bool):
        return "true" if value else "false"
    return redacted(repr(value))


def toml_line(name: str, value: Any) -> str:
    """A flag's line in a TOML file; what cannot stand there is a comment.

    An address that holds keys is shown without them, and bytes of a path that are no UTF-8 by what stands for them.
    """
    if isinstance(value, Address) and str(value) != value.text:
        return f"# {name} = {_as_toml(str(value))}  # without its credentials: give it on the command line"
    line = f"{name} = {_as_toml(to_file(value))}"
    try:
        line.encode()
    except UnicodeEncodeError:
        shown = line.encode(errors="backslashreplace").decode()
        return f"# {shown}  # no UTF-8: give it on the command line"
    return line


def _as_toml(value: Any) -> str:
    """A text, number, truth value or list of such as TOML 1.0 has it; in texts controls and quotes are escaped."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return f"[{', '.join(map(_as_toml, value))}]"
    if isinstance(value, str):
        return '"' + _ESCAPED.sub(lambda match: f"\\u{ord(match[0]):04x}", value) + '"'
    return repr(value)


def to_file(value: Any) -> Any:
    """A flag's value as a value that TOML and JSON have; addresses whole: `toml_line` keeps credentials out."""
    if isinstance(value, tuple):
        texts = all(isinstance(entry, str) for entry in value)
        return list(value) if texts else ",".join(map(str, value))
    if isinstance(value, Address):
        return value.text
    return str(value) if isinstance(value, Path) else value


def _no_switch(text: str) -> Any:
    raise ValueError("must be true or false")


SWITCH = Kind(_no_switch, switch=True)
TEXT = Kind(str, "TEXT", is_text=True)
PATH = Kind(user_path, "PATH", is_text=True, empty_is_unset=True)
TEXTS = Kind(str, "TEXT", is_text=True, many=True)


def whole(least: float | None = None, below: int | None = None) -> Kind:
    """Whole numbers."""
    of = "" if least is None else f" of at least {least}"
    what = f"must be a whole number{of}" + ("" if below is None else f" and less than {_power(below)}")

    def read(text: str) -> int:
        try:
            value = int(text)
        except ValueError:
            raise ValueError(what) from None
        if (least is not None and value < least) or (below is not None and value >= below):
            raise ValueError(what)
        return value

    return Kind(read, "N")


def number(least: float | None = None, above: float | None = None, most: float | None = None) -> Kind:
    """Finite numbers."""
    if most is not None:
        range_ = f" from {least:g} to {most:g}"
    else:
        range_ = f" above {above:g}" if above is not None else "" if least is None else f" of at least {least:g}"
    what = f"must be a number{range_}"

    def read(text: str) -> float:
        try:
            value = float(text)
        except ValueError:
            raise ValueError(what) from None
        outside = (
            not math.isfinite(value)
            or (least is not None and value < least)
            or (above is not None and value <= above)
            or (most is not None and value > most)
        )
        if outside:
            raise ValueError(what)
        return value

    return Kind(read, "X")


def choice(choices: Sequence[Any]) -> Kind:
    """One of a few values, each written as its text."""
    by_text = {str(value): value for value in choices}

    def read(text: str) -> Any:
        if text not in by_text:
            raise ValueError(f"must be one of {', '.join(by_text)}")
        return by_text[text]

    return Kind(read, f"{{{','.join(by_text)}}}", choices=tuple(choices))


def kind_of(annotation: Any, **limits: Any) -> Kind:
    """The kind of a field's values by its annotation; `X | None` is X.

    Args:
        limits: least, above, most and below, for numbers.

    Raises:
        TypeError: the annotation is not a plain one: the flag needs a `read` of its own.
    """
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        plain = [each for each in typing.get_args(annotation) if each is not type(None)]
        if len(plain) != 1:
            raise TypeError(f"{annotation}: values of several kinds need a function that reads them")
        one = kind_of(plain[0], **limits)
        return Kind(str, "TEXT", is_text=True, empty_is_unset=True) if one is TEXT else one
    if typing.get_origin(annotation) is Literal:
        return choice(typing.get_args(annotation))
    if annotation is int:
        return whole(**limits)
    if annotation is float:
        return number(**limits)
    if annotation == tuple[str, ...]:
        return TEXTS
    kinds: dict[Any, Kind] = {bool: SWITCH, str: TEXT, Path: PATH}
    if annotation not in kinds:
        raise TypeError(f"{annotation}: such values need a function that reads them")
    return kinds[annotation]


def _power(value: int) -> str:
    """A power of two as one writes it."""
    power = value.bit_length() - 1
    return f"2**{power}" if value == 2**power and power > 16 else str(value)
