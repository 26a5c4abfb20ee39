"""`--config_file FILE.toml`: the flags of a run in a file, and `--output_config`, which writes them there.

Any long flag without its dashes is a key; sections only order them. What the command line gives wins.
"""

import argparse
import difflib
from argparse import Action, ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import toml

from library.address import Address
from library.atomic_write import write_file
from library.errors import InputError
from library.options.read_config import read_config

_OWN = ("config_file", "output_config")


def add_arguments(parser: ArgumentParser) -> None:
    """Add this group's flags to a parser."""
    group = parser.add_argument_group("configuration file")
    group.add_argument(
        "--config_file", type=_toml_path, help=".toml with any flags as keys; what the command line gives wins"
    )
    group.add_argument(
        "--output_config",
        action="store_true",
        help="write the flags that differ from their defaults to --config_file, and stop",
    )


def parse_arguments(parser: ArgumentParser, argv: Sequence[str] | None = None) -> Namespace:
    """The arguments of file and command line together. As argparse it ends the process, with status 2 on bad input.

    Args:
        argv: without the program's name; None: that of the process.
    """
    own = ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    add_arguments(own)
    try:
        first, rest = own.parse_known_args(argv)
    except argparse.ArgumentError:
        return parser.parse_args(argv)  # which says what is wrong
    if first.output_config and first.config_file is None:
        parser.error("--output_config needs --config_file, the file to write to")
    if first.config_file is None:
        return parser.parse_args(argv)
    try:
        if first.output_config:
            write_config(first.config_file, parser, parser.parse_args(rest))
            parser.exit(0, f"written: {first.config_file}\n")
        return parser.parse_args([*_words(first.config_file, parser), *rest], Namespace(**vars(first)))
    except InputError as error:
        parser.error(str(error))


def write_config(path: Path, parser: ArgumentParser, args: Namespace) -> None:
    """A file of the arguments that are not their defaults.

    Raises:
        InputError: there is a file of that name, or it cannot be written.
    """
    if path.exists():
        raise InputError(f"--output_config: {path} is there already; move it away, or name another file")
    first_of = {action.dest: action for action in reversed(parser._actions)}  # whose default argparse takes
    values = {
        name: getattr(args, name)
        for name, action in first_of.items()
        if name not in (*_OWN, "help") and getattr(args, name) != _default(action, parser)
    }
    text = toml.dumps({name: _plain(value) for name, value in values.items()})
    write_file(path, lambda partial: partial.write_text(text, encoding="utf-8"))


def _default(action: Action, parser: ArgumentParser) -> Any:
    """As argparse would put it into the arguments: a text goes through the flag's conversion."""
    return parser._get_value(action, action.default) if isinstance(action.default, str) else action.default


def _toml_path(text: str) -> Path:
    """The extension may be left out."""
    path = Path(text)
    return path if path.suffix else path.with_suffix(".toml")


def _words(path: Path, parser: ArgumentParser) -> list[str]:
    """The file's options as words of a command line.

    Raises:
        InputError: an unknown key, or a value that its flag does not take.
    """
    actions = {
        option.removeprefix("--"): action
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    }
    words: list[str] = []
    for key, value in _flat(path, read_config(path, "--config_file")):
        action = actions.get(key)
        if action is None or action.dest in (*_OWN, "help"):
            near = difflib.get_close_matches(key, actions, n=1)
            hint = f"did you mean {near[0]}?" if near else "--help lists the flags, each of which can be a key"
            raise InputError(f"--config_file {path}: {key} is no flag of {parser.prog}; {hint}")
        words += _of_key(path, key, value, action, parser)
    return words


def _flat(path: Path, table: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    for key, value in table.items():
        if isinstance(value, dict):
            yield from _flat(path, value)
        else:
            yield key, value


def _of_key(path: Path, key: str, value: Any, action: Action, parser: ArgumentParser) -> list[str]:
    where = f"--config_file {path}: {key} = {value!r:.80}"
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise InputError(f"{where} must be true or false")
        return [f"--{key}"] * value
    is_list = isinstance(value, list)
    if is_list and key == "resolution" and len(value) == 2:  # [width, height], as data set configurations have it
        value, is_list = ",".join(map(str, value)), False
    if isinstance(value, bool) or is_list != (action.nargs in ("*", "+")):
        raise InputError(f"{where} must be {'a list' if action.nargs in ('*', '+') else 'one value'}, as --{key} takes")
    texts = [str(entry) for entry in value] if is_list else [str(value)]
    for text in texts:
        try:
            parser._check_value(action, parser._get_value(action, text))
        except argparse.ArgumentError as error:
            raise InputError(f"{where}: {error.message}") from error
    return [f"--{key}", *texts] if is_list else [f"--{key}={texts[0]}"]


def _plain(value: Any) -> Any:
    if isinstance(value, tuple):
        return ",".join(map(str, value))
    if isinstance(value, Address):
        return value.text
    return str(value) if isinstance(value, Path) else value
