"""The parser that the scripts share: strict about spelling, helpful about near misses, and able to fill dataclasses."""

import argparse
import dataclasses
import difflib
import re
from typing import Any, NoReturn, TypeVar

Options = TypeVar("Options")


class StrictParser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose error for an unknown flag names the nearest known one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        unknown = re.match(r"unrecognized arguments: (--[\w-]+)", message)
        if unknown:
            known = [option for action in self._actions for option in action.option_strings]
            near = difflib.get_close_matches(unknown.group(1), known, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags"
            message = f"{message}: this script does not take it; {hint}"
        self.exit(2, f"{self.prog}: error: {message}\n")


def fill(options_type: type[Options], args: Any, **overrides: Any) -> Options:
    """Build a dataclass from attributes of the same names, as of parsed arguments; `overrides` replace or add some."""
    names = [field.name for field in dataclasses.fields(options_type)]  # type: ignore[arg-type]
    values = {name: getattr(args, name) for name in names if name not in overrides}
    return options_type(**values, **overrides)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {text}")
    return value


def non_negative_int(text: str) -> int:
    """An argparse type: a whole number of at least 0."""
    value = int(text)
    if value < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {text}")
    return value


def non_negative_float(text: str) -> float:
    """An argparse type: a finite number of at least 0."""
    value = float(text)
    if not 0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number of at least 0, got {text}")
    return value


def positive_float(text: str) -> float:
    """An argparse type: a finite number above 0."""
    value = float(text)
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"must be a number above 0, got {text}")
    return value


def seed(text: str) -> int:
    """An argparse type: a whole number that 64 bits hold."""
    value = non_negative_int(text)
    if value >= 2**64:
        raise argparse.ArgumentTypeError(f"must be less than 2**64, got {text}")
    return value


def file_stem(text: str) -> str:
    """An argparse type: a name for files, without folders."""
    if not text or text in (".", "..") or "/" in text or "\0" in text:
        raise argparse.ArgumentTypeError(f"must be a file name without '/', got {text!r}")
    return text


def rate(text: str) -> float:
    """An argparse type: a share from 0 to 1."""
    value = float(text)
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"must lie in 0 .. 1, got {text}")
    return value
