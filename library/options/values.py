"""The values of all flags of a script, out of its option groups."""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from library.options.flag import OptionGroup, flag_names, nested_group

Filled = TypeVar("Filled")


def fill(filled_type: type[Filled], source: object, **overrides: Any) -> Filled:
    """Build a dataclass from an object's attributes of the same names; `overrides` replace or add some."""
    names = [field.name for field in dataclasses.fields(filled_type)]  # type: ignore[arg-type]
    values = {name: getattr(source, name) for name in names if name not in overrides}
    return filled_type(**values, **overrides)


def values_of(options: Any) -> dict[str, list[Any]]:
    """Each flag's values by its name: one, or one a subset."""
    found: dict[str, list[Any]] = {}
    for group in _groups(options):
        for name in flag_names(type(group)):
            found.setdefault(name, []).append(getattr(group, name))
    return found


def run_values(options: Any) -> dict[str, Any]:
    """The flags of the whole run by their names: all but those of subsets."""
    groups = [getattr(options, field.name) for field in dataclasses.fields(options)]
    return {name: getattr(group, name) for group in groups for name in flag_names(type(group))}


def subset_values(options: Any) -> list[dict[str, Any]]:
    """Each subset's fields by their names: its flags, and the number of its data set."""
    return [
        {field.name: getattr(group, field.name) for field in dataclasses.fields(group)} for group in _subsets(options)
    ]


def plain_values(options: Any) -> dict[str, Any]:
    """All flags by their names as JSON has them, without credentials; several subsets stand as a list."""
    plain = {name: _plain(value) for name, value in run_values(options).items()}
    subsets = [_plain(values) for values in subset_values(options)]
    return plain | (subsets[0] if len(subsets) == 1 else {"subsets": subsets})


def _groups(options: Any) -> Iterator[OptionGroup]:
    yield from (getattr(options, field.name) for field in dataclasses.fields(options))
    yield from _subsets(options)


def _subsets(options: Any) -> Iterator[OptionGroup]:
    for field in dataclasses.fields(options):
        group = getattr(options, field.name)
        nested = nested_group(type(group))
        if nested is not None:
            yield from getattr(group, nested[0])


def _plain(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(inner) for inner in value]
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)
