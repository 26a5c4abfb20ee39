"""A script: flags, patches and signals, which every script shares."""

import logging
import os
import sys
import time
from argparse import ArgumentParser
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from library.errors import Stopped
from library.exit_status import EXIT_OK, run_main, run_script
from library.imports import import_quickly
from library.options.config_file import write_values
from library.options.flag import Flags
from library.options.parse import checked_options, make_options, parse
from library.options.parser import make_parser
from library.options.rules import log_idle_flags
from library.restart_command import restart_command
from library.signals import Signals
from library.training.output_names import check_written_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Script:
    """A training script: what it says of itself, which flags it has, what it does with them.

    Attributes:
        doc: the script's docstring: its first line describes it in --help, the rest stands below the flags.
        options_type: dataclass of the script's option groups.
        families: names of the families of models that it trains.
        recipe: "module:name" of what trains, imported once the flags are known to be right; called with the options
            and the model it makes a `library.training.recipes.recipe.Recipe`.
    """

    doc: str | None
    options_type: type
    families: tuple[str, ...]
    recipe: str

    @property
    def name(self) -> str:
        """The script's file name, as messages and --help have it."""
        return Path(getattr(sys.modules[self.options_type.__module__], "__file__", None) or "script").name

    @cached_property
    def flags(self) -> Flags:
        """All flags, in the order of --help."""
        return Flags(self.options_type)

    def parser(self) -> ArgumentParser:
        """What prints --help."""
        summary, _, details = (self.doc or "").partition("\n")
        return make_parser(self.flags, self.name, summary, details)

    def values(self, argv: Sequence[str]) -> dict[str, Any]:
        """The value of every flag, by name, as the command line and its --config_file have them.

        Raises:
            InputError: words or keys are no flags, or values are not what their flags take; it names all of them.
        """
        parsed = parse(self.flags, self.name, argv)
        parsed.problems.raise_any()
        return parsed.values

    def options(self, argv: Sequence[str]) -> Any:
        """The options of a command line, not yet checked against each other.

        Raises:
            InputError: as `values`, or a file that a flag names has mistakes.
        """
        parsed = parse(self.flags, self.name, argv)
        options = make_options(self.flags, parsed)
        parsed.problems.raise_any()
        return options

    def main(self, argv: Sequence[str] | None = None) -> int:
        """Run the script; returns its exit status.

        Args:
            argv: without the program's name; None: the process's own.
        """
        started = time.perf_counter()
        words = sys.argv[1:] if argv is None else list(argv)
        if {"-h", "--help"} & set(words):
            self.parser().print_help()
            return EXIT_OK
        with Signals() as signals:
            return run_main(lambda: self._train(words, signals, started))

    def run(self) -> NoReturn:
        """Run the script as the whole work of this process, and exit with its status."""
        run_script(self.main)

    def _train(self, words: Sequence[str], signals: Signals, started: float) -> None:
        """Make the options, check them, and only then import what needs torch."""
        parsed = parse(self.flags, self.name, words)
        if parsed.values["output_config"]:
            parsed.problems.raise_any()
            write_values(parsed.values["config_file"], self.flags, parsed.values)
            print(f"written: {parsed.values['config_file']}")
            return
        options = checked_options(self.flags, parsed)
        replaced = check_written_names(options)
        if os.environ.get("RANK", "0") == "0":
            log_idle_flags(self.flags, options)
            for path in replaced:
                logger.info("%s is of an earlier run, and this one replaces it", path)
            logger.info("loading torch and the other libraries")
        module, _, name = self.recipe.partition(":")
        import_quickly("library.training.run", module, "third_patch")
        from library.training.run import run
        from third_patch import PATCHES, apply

        undo = apply(PATCHES)
        try:
            run(options, self.families, getattr(import_module(module), name), signals, started)
        except Stopped as stopped:
            if stopped.saved:
                started_as = sys.argv[0] if sys.argv[0].endswith(self.name) else self.name
                stopped.args = (f"{stopped}\nto go on: {restart_command(started_as, words)}",)
            raise
        finally:
            undo()
