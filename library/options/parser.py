"""--help of a script, out of its flags; what a command line says is read by `command_line`."""

import argparse

from library.options.flag import Flag, Flags


def make_parser(flags: Flags, prog: str, description: str = "", epilog: str = "") -> argparse.ArgumentParser:
    """A parser that prints the help of a script's flags, section by section."""
    parser = argparse.ArgumentParser(
        prog=prog,
        description=description,
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    for title, members in flags.sections().items():
        group = parser.add_argument_group(title)
        for flag in members:
            if flag.on_command_line:
                _add(group, flag)
    return parser


def _add(group: "argparse._ArgumentGroup", flag: Flag) -> None:
    """Add a flag, and what stands for some of its values."""
    help_line = flag.help_line.replace("%", "%%")
    if flag.kind.switch:
        group.add_argument(*flag.spellings(), action="store_true", help=help_line)
        return
    nargs = "*" if flag.kind.many else None
    options = group.add_mutually_exclusive_group() if flag.shorthands else group
    options.add_argument(*flag.spellings(), nargs=nargs, metavar=flag.kind.metavar, help=help_line)
    for name, (_, meaning) in flag.shorthands.items():
        options.add_argument(f"--{name}", action="store_true", help=meaning)
