"""The command line of a script, out of its flags: strict about spelling, helpful about near misses."""

import argparse
import difflib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from library.options.flag import Flag, Flags
from library.options.kinds import Kind
from library.options.refused import REFUSED, Refused
from library.redaction import redacted, remember_all

_REFUSALS = " refused"  # no name of a flag


class StrictParser(argparse.ArgumentParser):
    """An argument parser without abbreviations whose error for an unknown flag names the nearest known one."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        if message.startswith("unrecognized arguments: "):
            shown = [action for action in self._actions if action.help != argparse.SUPPRESS]
            known = [option for action in shown for option in action.option_strings]
            unknown = re.findall(r"(?<!\S)--[\w-]+", message)
            near = {flag: difflib.get_close_matches(flag, known, n=1) for flag in unknown}
            meant = [(flag, found[0]) for flag, found in near.items() if found]
            hints = [f"did you mean {one}{f' by {flag}' if len(unknown) > 1 else ''}?" for flag, one in meant]
            them = "it" if len(unknown) == 1 else "them"
            message = f"{message}: this script does not take {them}; {' '.join(hints) or '--help lists the flags'}"
        self.exit(2, redacted(f"{self.prog}: error: {message}\n"))


def make_parser(flags: Flags, prog: str, description: str = "", epilog: str = "") -> StrictParser:
    """A parser whose arguments hold the flags that are given, and no others."""
    parser = StrictParser(prog=prog, description=description, epilog=epilog, argument_default=argparse.SUPPRESS)
    for title, members in flags.sections().items():
        group = parser.add_argument_group(title)
        for flag in members:
            if flag.on_command_line:
                _add(group, flag)
    for refused in REFUSED.values():
        if refused.name not in flags.by_key:
            nargs: Any = 0 if refused.switch else "*"
            parser.add_argument(f"--{refused.name}", action=_Refuse, nargs=nargs, help=argparse.SUPPRESS, of=refused)
    return parser


def given_values(parser: StrictParser, argv: Sequence[str] | None) -> dict[str, Any]:
    """The flags that a command line gives, by name. As argparse it ends the process, with status 2 on bad input.

    Args:
        argv: without the program's name; None: the process's own.
    """
    remember_all([word.partition("=")[2] if word[:2] == "--" else word for word in (argv or sys.argv[1:])])
    given = dict(vars(parser.parse_args(argv)))
    refusals = given.pop(_REFUSALS, [])
    if refusals:
        parser.error("; ".join(refusals))
    return given


def _add(group: "argparse._ArgumentGroup", flag: Flag) -> None:
    """Add a flag, and what stands for some of its values."""
    kind = flag.kind
    arguments: dict[str, Any] = {"dest": flag.name, "help": flag.help_line.replace("%", "%%")}
    if kind.switch:
        group.add_argument(*flag.spellings(), action="store_true", **arguments)
        return
    arguments |= {"type": _converter(kind), "metavar": kind.metavar}
    if kind.many:
        arguments |= {"nargs": "*", "action": _Texts}
    if not flag.shorthands:
        group.add_argument(*flag.spellings(), **arguments)
        return
    exclusive = group.add_mutually_exclusive_group()
    exclusive.add_argument(*flag.spellings(), **arguments)
    for name, (value, help_line) in flag.shorthands.items():
        exclusive.add_argument(f"--{name}", dest=flag.name, action="store_const", const=value, help=help_line)


def _converter(kind: Kind) -> Callable[[str], Any]:
    """Reads a word; argparse shows the sentence of an ArgumentTypeError."""

    def convert(text: str) -> Any:
        try:
            return kind.from_text(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return convert


class _Texts(argparse.Action):
    """Keeps several words as a tuple."""

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        setattr(namespace, self.dest, tuple(values))


class _Refuse(argparse.Action):
    """Notes why a flag of sd-scripts is refused, unless it asks for what happens anyway."""

    def __init__(self, *, of: Refused, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.of = of

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        refusal = self.of.refusal("true" if self.of.switch else " ".join(values or ()))
        if refusal:
            setattr(namespace, _REFUSALS, [*getattr(namespace, _REFUSALS, []), refusal])
