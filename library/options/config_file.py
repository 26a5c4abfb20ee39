"""`--config_file FILE.toml`: the flags of a run in a file, and `--output_config`, which writes them there.

Any long flag without its dashes is a key; sections only order them. What the command line gives wins.
"""

import difflib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from library.atomic_write import write_file
from library.errors import InputError
from library.options.flag import Flags, OptionGroup, flag
from library.options.kinds import in_toml, toml_line
from library.options.read_config import read_config
from library.options.refused import REFUSED


def toml_path(text: str) -> Path:
    """The path of a file whose extension may be left out."""
    path = Path(text)
    return path if path.suffix else path.with_suffix(".toml")


@dataclass(frozen=True, kw_only=True)
class ConfigFileOptions(OptionGroup):
    """Flags from a file."""

    title: ClassVar[str] = "configuration file"

    config_file: Path | None = flag(
        None,
        ".toml with any flags as keys; what the command line gives wins",
        read=toml_path,
        told_on_resume=False,
        in_config_file=False,
    )
    output_config: bool = flag(
        False,
        "write the flags that differ from their defaults to --config_file, and stop",
        told_on_resume=False,
        in_config_file=False,
    )


def read_values(path: Path, flags: Flags, script: str) -> dict[str, Any]:
    """The values that a file has for flags, by their names.

    Raises:
        InputError: the file cannot be read, or has unknown keys or values that their flags do not take: all are named.
    """
    values: dict[str, Any] = {}
    wrong: list[str] = []
    for key, value in _flat(read_config(path, "--config_file")):
        try:
            values |= _of_key(key, value, flags, script, values)
        except ValueError as error:
            wrong.append(str(error))
    if wrong:
        raise InputError(f"--config_file {path}: {'; '.join(wrong)}")
    return values


def write_values(path: Path, flags: Flags, values: Mapping[str, Any]) -> None:
    """Write those values that are not their flags' defaults to a file; no credentials of addresses.

    Raises:
        InputError: there is a file of that name, or it cannot be written.
    """
    if path.suffix.lower() != ".toml":
        raise InputError(f"--output_config writes TOML, and --config_file {path} is named otherwise; name a .toml file")
    if path.exists():
        raise InputError(f"--output_config: {path} is there already; move it away, or name another file")
    written = [
        toml_line(each.name, values[each.name]) + "\n"
        for each in flags
        if each.on_command_line and each.in_config_file and values[each.name] not in (None, each.default)
    ]
    text = "".join(written)
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _flat(table: Mapping[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(value)
        else:
            yield key, value


def _of_key(key: str, value: Any, flags: Flags, script: str, before: Mapping[str, Any]) -> dict[str, Any]:
    """What one key says; ValueError with what is wrong with it."""
    if key in flags.shorthands:
        of, short_for = flags.shorthands[key]
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {in_toml(value):.80} must be true or false")
        if not value:
            return {}
        found, result = of, short_for
    else:
        known = flags.by_key.get(key)
        if known is None or not (known.on_command_line and known.in_config_file):
            if key not in REFUSED:
                raise ValueError(_unknown(key, flags, script))
            if refusal := REFUSED[key].refusal(str(value)):
                raise ValueError(refusal)
            return {}
        found = known
        try:
            result = known.kind.from_file(value)
        except ValueError as error:
            raise ValueError(f"{key} {error}") from error
    if found.name in before and before[found.name] != result:
        raise ValueError(f"{key} = {in_toml(value):.80} is a second value of {found.name}; keep one of them")
    return {found.name: result}


def _unknown(key: str, flags: Flags, script: str) -> str:
    """That a key is none, and which one may be meant."""
    keys = [name for name, each in flags.by_key.items() if each.on_command_line and each.in_config_file]
    near = difflib.get_close_matches(key, [*keys, *flags.shorthands], n=1)
    hint = f"did you mean {near[0]}?" if near else "--help lists the flags, each of which can be a key"
    return f"{key} is no flag of {script}; {hint}"
