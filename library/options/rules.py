"""Rules of a script's options, checked once, before anything loads: `needs` of each flag, then each group's own."""

from collections.abc import Mapping
from typing import Any

from library.errors import InputError
from library.options.flag import Flag, Flags
from library.options.values import values_of


def check_options(flags: Flags, options: Any) -> None:
    """Raise InputError where a flag has nothing to act on, or a group's rules forbid what was given."""
    values = values_of(options)
    for flag in flags:
        check_needs(flag, values)
    for name in flags.groups:
        getattr(options, name).check(options)


def check_needs(flag: Flag, values: Mapping[str, list[Any]]) -> None:
    """Raise InputError if a flag is given and nothing of what it acts on is.

    Args:
        values: those of each flag; several of one that differs between subsets.
    """
    given = [value for value in values[flag.name] if value != flag.default]
    if flag.needs and given and not any(_holds(needed, values) for needed in flag.needs):
        value = f"={given[0]}" if flag.kind.choices and flag.default is not None else ""
        raise InputError(
            f"--{flag.name}{value} has nothing to act on without {flag.needs_in_words}; add that, or leave it out"
        )


def _holds(needed: str, values: Mapping[str, list[Any]]) -> bool:
    """Whether everything of `name & name=value` is given."""
    for condition in needed.split(" & "):
        name, is_value, value = condition.partition("=")
        if not any(str(each) == value if is_value else each for each in values[name]):
            return False
    return True
