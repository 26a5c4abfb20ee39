"""A command line as the values of flags, with all that is wrong in it; strict about spelling, with hints.

A flag is written `--name=value` or `--name value`, one of several values `--name value value`, a switch `--name`; a
switch that a configuration file turns on is turned off by `--name=false`. Of a flag given twice the last value counts.
"""

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from library.options.flag import Flag, Flags
from library.options.refused import REFUSED
from library.redaction import redacted, remember_all

_SWITCHED = {"true": True, "false": False}


@dataclass
class CommandLine:
    """What a command line gives.

    Attributes:
        values: of flags by their names; None for one that is said not to be given, as `--vae=`.
        keys: names and other spellings that stand on it, refused ones among them.
        problems: all that is wrong.
        wrong: names of flags of which a value could not be read, or that may have been meant.
    """

    values: dict[str, Any] = field(default_factory=dict)
    keys: set[str] = field(default_factory=set)
    problems: list[str] = field(default_factory=list)
    wrong: set[str] = field(default_factory=set)


@dataclass
class _Words:
    """A flag as written: its name without dashes, what stands behind "=", None for no such thing, and what follows."""

    name: str
    value: str | None
    following: list[str]

    @property
    def values(self) -> list[str]:
        """All that is given to it."""
        return ([] if self.value is None else [self.value]) + self.following

    def __str__(self) -> str:
        """As written, for messages: without what addresses have of keys."""
        values = " ".join(map(redacted, self.values))
        if not self.name:
            return values
        between = " " if self.value is None and values else "=" if values else ""
        return f"--{self.name}{between}{values:.200}"


def read_command_line(flags: Flags, argv: Sequence[str]) -> CommandLine:
    """Read a command line.

    Args:
        argv: without the program's name.
    """
    remember_all([word.partition("=")[2] if word[:2] == "--" else word for word in argv])
    line, unknown = CommandLine(), []
    written: dict[str, str] = {}  # how a value came, by the flag's name
    for words in _split(argv):
        known = flags.by_key.get(words.name)
        if words.name in flags.shorthands:
            of, value = flags.shorthands[words.name]
            if _switched(words, line):
                _set(line, written, of, value, words)
        elif known is not None and known.on_command_line:
            _read(line, written, known, words)
        elif words.name in REFUSED:
            line.keys.add(words.name)
            refused = REFUSED[words.name]
            line.keys.update(refused.replaces)
            if refusal := refused.refusal("true" if refused.switch and not words.values else " ".join(words.values)):
                line.problems.append(refusal)
        else:
            unknown.append(words)
    for words in unknown:
        line.problems.append(_not_known(words, flags, line.wrong))
    return line


def _split(argv: Sequence[str]) -> Iterator[_Words]:
    """The words of each flag; those before the first flag stand with an empty name."""
    found = _Words("", None, [])
    for word in argv:
        if re.match(r"--\S", word):
            yield from [found] * bool(found.name or found.following)
            name, equals, value = word[2:].partition("=")
            found = _Words(name, value if equals else None, [])
        else:
            found.following.append(word)
    yield from [found] * bool(found.name or found.following)


def _read(line: CommandLine, written: dict[str, str], flag: Flag, words: _Words) -> None:
    """Take a flag's value, or note what is wrong with it."""
    kind = flag.kind
    if kind.switch:
        switched = _switched(words, line)
        if switched is not None:
            _set(line, written, flag, switched, words)
        return
    given = words.values
    if kind.many:
        _set(line, written, flag, tuple(given), words)
        return
    problem = None
    if not given:
        problem = f"needs a value: --{words.name}={kind.metavar}"
    elif len(given) > 1:
        problem = f"takes one value, and {words} has {len(given)}; write one with spaces in quotes"
    else:
        try:
            _set(line, written, flag, kind.from_text(given[0]), words)
        except ValueError as error:
            problem = str(error)
    if problem is not None:
        line.keys.add(words.name)
        line.wrong.add(flag.name)
        line.problems.append(f"--{words.name} {problem}")


def _switched(words: _Words, line: CommandLine) -> bool | None:
    """Whether a switch is on; None where that cannot be read, which is noted."""
    line.keys.add(words.name)
    given = words.values
    if not given:
        return True
    if len(given) == 1 and given[0].lower() in _SWITCHED:
        return _SWITCHED[given[0].lower()]
    line.wrong.add(words.name)
    line.problems.append(f"{words}: --{words.name} is a switch; it stands alone, or has the value true or false")
    return None


def _set(line: CommandLine, written: dict[str, str], flag: Flag, value: Any, words: _Words) -> None:
    """Keep a flag's value; by two spellings it may not have two."""
    line.keys.add(words.name)
    before = written.get(flag.name, words.name)
    if before != words.name and line.values[flag.name] != value and flag.shorthands:
        line.problems.append(f"--{words.name} and --{before} give --{flag.name} two values; give one of them")
        line.wrong.add(flag.name)
    written[flag.name] = words.name
    line.values[flag.name] = value


def _not_known(words: _Words, flags: Flags, wrong: set[str]) -> str:
    """That words are no flag here, and which one may be meant, which is noted among the wrong ones."""
    if not words.name:
        return f"unrecognized arguments: {words}: values stand behind their flag, as in --seed=1"
    known = [key for key, flag in flags.by_key.items() if flag.on_command_line]
    hint = "--help lists the flags"
    if near := difflib.get_close_matches(words.name, [*known, *flags.shorthands], n=1, cutoff=0.7):
        hint = f"did you mean --{near[0]}?"
        wrong.add(flags.by_key[near[0]].name if near[0] in flags.by_key else flags.shorthands[near[0]][0].name)
    return f"unrecognized arguments: {words}: this script does not take it; {hint}"
