"""Checks before writing that a file system has enough space."""

import shutil
from pathlib import Path

from library.errors import TrainingError

_ALLOWANCE_BYTES = 1 << 20  # folder entries, headers, lists


def missing_space(folder: Path, needed_bytes: int) -> str:
    """A text with the needed and the free bytes if the space is too small, else ''.

    Raises:
        OSError: the folder cannot be reached.
    """
    free, needed = shutil.disk_usage(folder).free, needed_bytes + _ALLOWANCE_BYTES
    if needed <= free:
        return ""
    return f"needs {needed} bytes ({needed / 1e9:.2f} GB), {free} ({free / 1e9:.2f} GB) are free"


def check_space(folder: Path, what: str, needed_bytes: int) -> None:
    """Raise TrainingError if a folder's file system has too little space for that many bytes, or cannot be reached."""
    try:
        missing = missing_space(folder, needed_bytes)
    except OSError as error:
        raise TrainingError(
            f"--output_dir {folder}: cannot be written ({error.strerror or error}). What was saved before is whole. "
            "Mend the folder, then resume."
        ) from error
    if missing:
        raise TrainingError(
            f"--output_dir {folder}: {what} {missing}. What was saved before is whole. Make room, then resume."
        )
