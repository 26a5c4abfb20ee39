"""A script: flags, patches, signals, logging and exit statuses, which every script shares."""

import atexit
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Any, NoReturn

from library.errors import InputError, Stopped, TrainingError
from library.imports import import_quickly
from library.options.flag import Flags
from library.options.parse import make_options, parse_values
from library.options.parser import StrictParser, make_parser
from library.options.rules import check_options
from library.signals import Signals

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


@dataclass(frozen=True)
class Script:
    """A training script: what it says of itself, which flags it has, what it does with them.

    Attributes:
        doc: the script's docstring: its first line describes it in --help, the rest stands below the flags.
        options_type: dataclass of the script's option groups.
        families: names of the families of models that it trains.
        recipe: "module:function" of what trains, imported once the flags are known to be right; called with the
            options, the families, the signals and the time of the script's start.
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

    def _train(self, values: dict[str, Any], signals: Signals, started: float) -> None:
        """Make the options, check them, and only then import what needs torch."""
        options = make_options(self.flags, values)
        check_options(self.flags, options)
        module, _, function = self.recipe.partition(":")
        import_quickly(module, "third_patch")
        from third_patch import PATCHES, apply

        undo = apply(PATCHES)
        try:
            getattr(import_module(module), function)(options, self.families, signals, started)
        finally:
            undo()


def run_script(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as the whole work of this process, and exit with the status that it returns.

    A process of several ends without finalising its interpreter. Gloo's threads release a collective's tensors some
    time after the collective, for which they need the interpreter's lock; if they request it during finalisation,
    CPython ends them by force, and C++ calls abort(), which replaces the exit status. Functions registered with
    `atexit` run before.
    """
    ended: list[int] = []

    def leave() -> None:
        if ended and int(os.environ.get("WORLD_SIZE", "1")) > 1:
            leave_at_once(ended[0])

    atexit.register(leave)  # functions run in reverse: what `main` imports registers its own after this one
    ended.append(main() or EXIT_OK)
    sys.exit(ended[0])


def leave_at_once(status: int) -> NoReturn:
    """End the process after flushing its output, without finalising the interpreter, in which threads may still run."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def run_main(work: Callable[[], object]) -> int:
    """Run the work of a script; returns its exit status.

    0: done. 1: training failed (a traceback for an unexpected error, a line for a `TrainingError`).
    2: bad input, a line that says what to do. 143, 130: stopped by SIGTERM, SIGINT.
    """
    # device.py imports torch_npu. Left to itself torch would, and die where CANN's environment is not set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    logging.basicConfig(
        level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S", force=True
    )
    for noisy in ("httpx", "PIL", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        work()
    except InputError as error:
        return _failed(f"error: {error}", EXIT_BAD_INPUT)
    except TrainingError as error:
        return _failed(f"training stopped: {error}", EXIT_FAILED)
    except Stopped as stopped:
        return _failed(str(stopped), stopped.exit_status)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except ConnectionError:  # to another process: no file's error, though it is an OSError, too
        return _failed(traceback.format_exc(), EXIT_FAILED, expected=False)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"error: {where}{error.strerror or error}; what was written before is complete", EXIT_FAILED)
    except Exception:
        return _failed(traceback.format_exc(), EXIT_FAILED, expected=False)
    return EXIT_OK


def _failed(message: str, status: int, expected: bool = True) -> int:
    """Show the error, and write it to a file for a launcher that started several processes."""
    print(message.rstrip(), file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's name for it; it reads `message` and `timestamp`
    if file:
        rank, now = int(os.environ.get("RANK", "0")), time.time()
        record = {"rank": rank, "status": status, "expected": expected, "message": message, "time": now}
        partial = Path(f"{file}.partial")
        partial.write_text(json.dumps({**record, "timestamp": int(now)}), encoding="utf-8")
        partial.replace(file)
    return status
