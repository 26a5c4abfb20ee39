"""From a command line to a script's option groups: what it gives, over --config_file, over the defaults."""

from collections.abc import Sequence
from typing import Any

from library.errors import InputError
from library.options.config_file import read_values, write_values
from library.options.flag import Flags
from library.options.parser import StrictParser, given_values


def parse_values(flags: Flags, parser: StrictParser, argv: Sequence[str] | None = None) -> dict[str, Any]:
    """The value of every flag, by name. It ends the process as argparse does: status 2 on bad input.

    Args:
        argv: without the program's name; None: the process's own.
    """
    given = given_values(parser, argv)
    path, write = given.get("config_file"), given.get("output_config", False)
    if write and path is None:
        parser.error("--output_config needs --config_file, the file to write to")
    try:
        from_file = read_values(path, flags, parser.prog) if path is not None and not write else {}
        defaults = flags.defaults()
        found = defaults | from_file | given
        values = {name: defaults[name] if value is None else value for name, value in found.items()}
        missing = [f"--{flag.name}" for flag in flags if flag.required and values[flag.name] is None]
        if missing:
            parser.error(
                f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing: no run starts without; give "
                f"{'it' if len(missing) == 1 else 'them'} here or in --config_file"
            )
        if write and path is not None:
            write_values(path, flags, values)
            parser.exit(0, f"written: {path}\n")
    except InputError as error:
        parser.error(str(error))
    return values


def make_options(flags: Flags, values: dict[str, Any]) -> Any:
    """The script's options out of the values of all flags.

    Raises:
        InputError: no data is named, or --dataset_config cannot be read.
    """
    groups = {name: group_type.from_values(values) for name, group_type in flags.groups.items()}
    return flags.options_type(**groups)
