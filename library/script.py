"""A script: flags, patches and signals, which every script shares."""

import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from library.exit_status import run_main, run_script
from library.imports import import_quickly
from library.options.flag import Flags
from library.options.parse import make_options, parse_values
from library.options.parser import StrictParser, make_parser
from library.options.rules import check_options
from library.signals import Signals


@dataclass(frozen=True)
class Script:
    """A training script: what it says of itself, which flags it has, what it does with them.

    Attributes:
        doc: the script's docstring: its first line describes it in --help, the rest stands below the flags.
        options_type: dataclass of the script's option groups.
        families: names of the families of models that it trains.
        recipe: "module:name" of what trains, imported once the flags are known to be right; called with the options
            and the model it makes a `library.training.recipes.recipe.Recipe`.
        defaults: of flags for which this script has another one than their group.
    """

    doc: str | None
    options_type: type
    families: tuple[str, ...]
    recipe: str
    defaults: Mapping[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The script's file name, as messages and --help have it."""
        return Path(getattr(sys.modules[self.options_type.__module__], "__file__", None) or "script").name

    @cached_property
    def flags(self) -> Flags:
        """All flags, in the order of --help."""
        return Flags(self.options_type, self.defaults)

    def parser(self) -> StrictParser:
        """The parser of the command line."""
        summary, _, details = (self.doc or "").partition("\n")
        return make_parser(self.flags, self.name, summary, details)

    def options(self, argv: Sequence[str] | None = None) -> Any:
        """The options of a command line, not yet checked against each other; as argparse it ends at bad words.

        Raises:
            InputError: what the words name is not there, or cannot be read.
        """
        return make_options(self.flags, parse_values(self.flags, self.parser(), argv))

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the script; returns its exit status.

        Args:
            argv: without the program's name; None: the process's own.
        """
        started = time.perf_counter()
        values = parse_values(self.flags, self.parser(), argv)
        with Signals() as signals:
            return run_main(lambda: self._train(values, signals, started))

    def run(self) -> NoReturn:
        """Run the script as the whole work of this process, and exit with its status."""
        run_script(self.main)

    def _train(self, values: dict[str, Any], signals: Signals, started: float) -> None:
        """Make the options, check them, and only then import what needs torch."""
        options = make_options(self.flags, values)
        check_options(self.flags, options)
        module, _, name = self.recipe.partition(":")
        import_quickly("library.training.run", module, "third_patch")
        from library.training.run import run
        from third_patch import PATCHES, apply

        undo = apply(PATCHES)
        try:
            run(options, self.families, getattr(import_module(module), name), signals, started)
        finally:
            undo()
