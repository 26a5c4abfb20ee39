"""From a command line to a script's option groups: what it gives, over --config_file, over the defaults."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from library.errors import Problems
from library.options.command_line import CommandLine, read_command_line
from library.options.config_file import FileValues, read_values
from library.options.flag import Flags
from library.options.named_paths import problems_of_paths
from library.options.rules import problems_of
from library.options.values import values_of


@dataclass(frozen=True)
class Parsed:
    """The values of all flags, and what is wrong with those that are given.

    Attributes:
        values: by name; the default stands for one that could not be read.
        wrong: names of flags whose values are not what was meant.
    """

    values: dict[str, Any]
    problems: Problems = field(default_factory=Problems)
    wrong: frozenset[str] = frozenset()


def parse(flags: Flags, script: str, argv: Sequence[str]) -> Parsed:
    """Read a command line and the file of its --config_file.

    Args:
        script: its name, for messages.
        argv: without the program's name.
    """
    problems = Problems()
    line = read_command_line(flags, argv)
    problems.found += line.problems
    path, writes = line.values.get("config_file"), line.values.get("output_config", False)
    file = FileValues()
    if writes and path is None:
        problems.found.append("--output_config needs --config_file, the file to write to")
    elif path is not None and not writes:
        file = read_values(path, flags, script, _line_has(line, flags), problems)
    defaults = flags.defaults()
    found = {**defaults, **file.values, **line.values}
    values = {name: defaults[name] if value is None else value for name, value in found.items()}
    wrong = line.wrong | file.wrong
    missing = [flag.name for flag in flags if flag.required and values[flag.name] is None]
    for name in missing:
        if name not in wrong:
            problems.found.append(f"--{name} is missing: no run starts without; give it here or in --config_file")
    return Parsed(values, problems, frozenset({*wrong, *missing}))


def checked_options(flags: Flags, parsed: Parsed) -> Any:
    """The script's options, checked against each other; all that is wrong with flags and files is said at once.

    Raises:
        InputError: anything is wrong.
    """
    problems = parsed.problems
    options = make_options(flags, parsed)
    # What follows only from a value that is not what was meant would be no help.
    wrong = re.compile("|".join(rf"--{name}\b" for name in sorted(parsed.wrong)) or "(?!)")
    follows = (*problems_of(flags, options), *problems_of_paths(flags, values_of(options)))
    problems.found += [problem for problem in follows if not wrong.search(problem)]
    problems.raise_any()
    return options


def make_options(flags: Flags, parsed: Parsed) -> Any:
    """The script's options out of the values of all flags; what is wrong with files that they name is noted."""
    groups = {name: group_type.from_values(parsed.values, parsed.problems) for name, group_type in flags.groups.items()}
    return flags.options_type(**groups)


def _line_has(line: CommandLine, flags: Flags) -> set[str]:
    """Keys of a file that the command line wins over: its own, and those in whose place its flags stand."""
    names = set(line.values)
    for name in list(line.values):
        names.update(flags.by_name[name].replaces)
    return names | line.keys
