"""How a script ends: errors as one line that says what to correct, and exit statuses that a launcher can rely on."""

import atexit
import json
import logging
import os
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from library.errors import InputError, Stopped, TrainingError
from library.redaction import redacted

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


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
    2: bad input, a line for each thing that is wrong, which says what to do. 143, 130: stopped by SIGTERM, SIGINT.
    """
    # device.py imports torch_npu. Left to itself torch would, and die where CANN's environment is not set.
    os.environ.setdefault("TORCH_DEVICE_BACKEND_AUTOLOAD", "0")
    handler = logging.StreamHandler()
    handler.setFormatter(_RedactingFormatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S"))
    logging.basicConfig(level=logging.INFO, handlers=[handler], force=True)
    for noisy in ("httpx", "PIL", "urllib3", "filelock"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    try:
        work()
    except BaseException as error:
        return end_with(error)
    return EXIT_OK


def end_with(error: BaseException) -> int:
    """Say what a process ends with, and write it down for a launcher; returns the exit status.

    Raises:
        BaseException: the error itself, if it is none that ends a script in an orderly way.
    """
    if isinstance(error, InputError):
        return _failed("\n".join(f"error: {problem}" for problem in error.problems), EXIT_BAD_INPUT)
    if isinstance(error, TrainingError):
        return _failed(f"training stopped: {error}", EXIT_FAILED)
    if isinstance(error, Stopped):
        return _failed(str(error), error.exit_status)
    if isinstance(error, KeyboardInterrupt):
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    if isinstance(error, OSError) and not isinstance(error, ConnectionError):  # to another process: no file's error
        where = f"{error.filename}: " if error.filename else ""
        return _failed(f"error: {where}{error.strerror or error}; what was written before is complete", EXIT_FAILED)
    if isinstance(error, Exception):
        return _failed("".join(traceback.format_exception(error)), EXIT_FAILED, expected=False)
    raise error


class _RedactingFormatter(logging.Formatter):
    """Lines of the log, tracebacks among them, without secrets."""

    def format(self, record: logging.LogRecord) -> str:
        return redacted(super().format(record))


def _failed(message: str, status: int, expected: bool = True) -> int:
    """Show the error, and write it to a file for a launcher that started several processes."""
    message = redacted(message)
    print(message.rstrip(), file=sys.stderr, flush=True)
    file = os.environ.get("TORCHELASTIC_ERROR_FILE")  # torchrun's name for it; it reads `message` and `timestamp`
    if file:
        rank, now = int(os.environ.get("RANK", "0")), time.time()
        record = {"rank": rank, "status": status, "expected": expected, "message": message, "time": now}
        partial = Path(f"{file}.partial")
        partial.write_text(json.dumps({**record, "timestamp": int(now)}), encoding="utf-8")
        partial.replace(file)
    return status
