"""`--config_file FILE.toml`: the flags of a run in a file, and `--output_config`, which writes them there.

Any long flag without its dashes is a key; sections only order them. What the command line gives wins.
"""

import difflib
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from library.atomic_write import write_file
from library.errors import InputError, Problems
from library.options.flag import Flags, OptionGroup, flag
from library.options.kinds import in_toml, toml_line
from library.options.read_config import KINDS, read_config
from library.options.refused import REFUSED


def toml_path(text: str) -> Path:
    """The path of a file whose extension may be left out; other dots in its name are no extension (run_v1.2)."""
    path = Path(text)
    return path if path.suffix.lower() in KINDS else Path(f"{text}.toml")


@dataclass(frozen=True, kw_only=True)
class ConfigFileOptions(OptionGroup):
    """Flags from a file."""

    title: ClassVar[str] = "configuration file"

    config_file: Path | None = flag(
        None,
        "Read flags from this .toml file, whose keys are flags; what the command line gives wins",
        read=toml_path,
        told_on_resume=False,
        in_config_file=False,
    )
    output_config: bool = flag(
        False,
        "Write the flags that differ from their defaults to --config_file, and stop",
        told_on_resume=False,
        in_config_file=False,
    )


@dataclass
class FileValues:
    """What a file says of flags.

    Attributes:
        values: by the flags' names.
        wrong: names of flags whose values could not be read, or that may have been meant.
    """

    values: dict[str, Any] = field(default_factory=dict)
    wrong: set[str] = field(default_factory=set)


def read_values(path: Path, flags: Flags, script: str, line_has: Collection[str], problems: Problems) -> FileValues:
    """The values that a file has for flags.

    Args:
        script: its name, for messages.
        line_has: keys that the command line has, too, or something in their place: it wins.
        problems: takes up that the file cannot be read, its unknown keys, and values that their flags do not take.
    """
    found = FileValues()
    with problems.noted():
        for key, value in _flat(read_config(path, "--config_file")):
            try:
                _take(key, value, flags, script, line_has, found)
            except ValueError as error:
                problems.found.append(f"--config_file {path}: {error}")
    return found


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


def _take(key: str, value: Any, flags: Flags, script: str, line_has: Collection[str], found: FileValues) -> None:
    """Take up what one key says; ValueError with what is wrong with it."""
    if key in flags.shorthands:
        of, result = flags.shorthands[key]
        if not isinstance(value, bool):
            raise ValueError(f"{key} = {in_toml(value):.80} must be true or false")
        if not value or key in line_has:
            return
    elif (known := flags.by_key.get(key)) is not None and known.on_command_line and known.in_config_file:
        of = known
        try:
            result = known.kind.from_file(value)
        except ValueError as error:
            found.wrong.add(known.name)
            raise ValueError(f"{key} {error}") from error
    elif key in REFUSED:
        if key not in line_has and (refusal := REFUSED[key].refusal_of(value)):
            raise ValueError(refusal)
        return
    else:
        raise ValueError(_unknown(key, flags, script, found.wrong))
    if of.name in line_has:
        return
    if of.name in found.values and found.values[of.name] != result:
        raise ValueError(f"{key} = {in_toml(value):.80} is a second value of {of.name}; keep one of them")
    found.values[of.name] = result


def _unknown(key: str, flags: Flags, script: str, wrong: set[str]) -> str:
    """That a key is none, and which one may be meant, which is noted among the wrong ones."""
    keys = [name for name, each in flags.by_key.items() if each.on_command_line and each.in_config_file]
    near = difflib.get_close_matches(key, [*keys, *flags.shorthands], n=1, cutoff=0.7)
    hint = "--help lists the flags, each of which can be a key"
    if near:
        hint = f"did you mean {near[0]}?"
        wrong.add(flags.by_key[near[0]].name if near[0] in flags.by_key else flags.shorthands[near[0]][0].name)
    return f"{key} is no flag of {script}; {hint}"
