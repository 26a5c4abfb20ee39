"""What stands around every script's work: logging, and exit statuses that a launcher can trust."""

import logging
import os
import sys
import traceback
from collections.abc import Callable

from library.errors import InputError, Stopped, TrainingError

EXIT_OK, EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 0, 1, 2, 130


def run_main(work: Callable[[], object]) -> int:
    """Run the work of a script; returns its exit status.

    0: done. 1: training failed (a traceback for what nobody expected, one line for a `TrainingError`).
    2: bad input, one line that says what to mend. 143, 130: stopped by SIGTERM, SIGINT.
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
        print(f"error: {error}", file=sys.stderr, flush=True)
        return EXIT_BAD_INPUT
    except TrainingError as error:
        print(f"training stopped: {error}", file=sys.stderr, flush=True)
        return EXIT_FAILED
    except Stopped as stopped:
        print(stopped, file=sys.stderr, flush=True)
        return stopped.exit_status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        return EXIT_INTERRUPTED
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        print(
            f"error: {where}{error.strerror or error}; what was written before is complete", file=sys.stderr, flush=True
        )
        return EXIT_FAILED
    except Exception:
        traceback.print_exc()
        return EXIT_FAILED
    return EXIT_OK
