"""Whether a checkpoint was written by this project, by a mark in it: only such ones are replaced or deleted."""

import zipfile
from pathlib import Path

from library.models.files.modelspec import read_metadata
from library.own_folder import is_own

MARK, MARK_VALUE = "sd_training.checkpoint", "1"  # in the metadata of what is written


def is_own_checkpoint(path: Path) -> bool:
    """Whether this project has written a single file, or a folder and all that is in it; nothing large is read."""
    if path.is_symlink():
        return False
    if path.is_dir():
        return is_own(path)
    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as file:
                pickles = [name for name in file.namelist() if name.endswith("/data.pkl")]
                return any(MARK.encode() in file.read(name) for name in pickles)
        return MARK in read_metadata(path)
    except (OSError, ValueError, MemoryError, OverflowError, AttributeError, zipfile.BadZipFile):
        return False
