"""Rules of a script's options, checked once, before anything loads: those of each flag, then each group's own."""

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from library.options.flag import Flag, Flags, in_words
from library.options.values import values_of

logger = logging.getLogger(__name__)


def problems_of(flags: Flags, options: Any) -> Iterator[str]:
    """A sentence for each flag that has nothing to act on, and for each of the groups' rules that is not kept."""
    values = values_of(options)
    for flag in flags:
        if is_idle(flag, flag.needs, values):
            given, needed = _with_value(flag, values), in_words(flag.needs)
            yield f"{given} has nothing to act on without {needed}; add that, or leave it out"
    for name in flags.groups:
        yield from getattr(options, name).check(options)


def log_idle_flags(flags: Flags, options: Any) -> None:
    """A line of the log for each flag that is given and does nothing, as in sd-scripts, where it is no error either."""
    values = values_of(options)
    for flag in flags:
        if is_idle(flag, flag.idle_without, values):
            logger.warning("%s does nothing without %s", _with_value(flag, values), in_words(flag.idle_without))


def is_idle(flag: Flag, conditions: Sequence[str], values: Mapping[str, list[Any]]) -> bool:
    """Whether a flag is given, and of the conditions under which it acts none holds.

    Args:
        values: those of each flag; several of one that differs between subsets.
    """
    given = any(value != flag.default for value in values.get(flag.name, ()))
    return bool(conditions) and given and not any(_holds(needed, values) for needed in conditions)


def _with_value(flag: Flag, values: Mapping[str, list[Any]]) -> str:
    """The flag, with its value where that is one of few."""
    given = next(value for value in values[flag.name] if value != flag.default)
    return f"--{flag.name}={given}" if flag.kind.choices and flag.default is not None else f"--{flag.name}"


def _holds(needed: str, values: Mapping[str, list[Any]]) -> bool:
    """Whether everything of `name & name=value` is given."""
    for condition in needed.split(" & "):
        name, is_value, value = condition.partition("=")
        if name not in values:  # of subsets, of which none could be read: that is said
            continue
        if not any(str(each) == value if is_value else each for each in values[name]):
            return False
    return True
