"""Files and folders that appear complete or not at all: they are written beside the target, fsynced and renamed."""

import hashlib
import logging
import os
import shutil
from collections.abc import Callable
from itertools import count
from pathlib import Path

from library.errors import InputError
from library.own_folder import is_own, write_list

logger = logging.getLogger(__name__)

_MOST_NAME_BYTES = 255


def write_file(target: Path, write: Callable[[Path], object], writer: str = "") -> None:
    """Let `write` fill a file beside the target, then rename it to the target, replacing an existing file.

    A missing folder is made. When `write` fails the target is unchanged and nothing is left beside it. Only one process
    at a time may write a target, unless each process gives its own name as `writer`; the partial file of such a process
    stays beside the target if the process is killed.

    Raises:
        InputError: the file system refuses (full, read-only, no permission, a folder in the way).
    """
    _guarded(target, write, _replace_file, writer)


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """Let `write` fill an empty folder beside the target, then rename it to the target, as `write_file` does.

    The folder lists its files (library.own_folder). An existing folder is renamed to `.NAME.previous` once the new
    folder is complete, and removed afterwards; a process that is killed in between leaves it under that name. If it
    holds anything that was not written by this project it is kept as `NAME.kept`.
    """

    def write_with_list(folder: Path) -> None:
        write(folder)
        write_list(folder)

    _guarded(target, write_with_list, replace_folder)


def _guarded(
    target: Path, write: Callable[[Path], object], replace: Callable[[Path, Path], None], writer: str = ""
) -> None:
    partial = aside(target, f"partial.{writer}" if writer else "partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        remove(partial)  # of a run that was killed
        if replace is replace_folder:
            partial.mkdir()
        write(partial)
        sync_tree(partial)
        replace(partial, target)
        sync(target.parent)
    except OSError as error:
        remove(partial)
        raise InputError(
            f"{target}: cannot be written ({error.strerror or error}). Nothing that was there has changed. "
            "Make room or choose another --output_dir."
        ) from error
    except BaseException:
        remove(partial)
        raise


def _replace_file(partial: Path, target: Path) -> None:
    partial.replace(target)


def replace_folder(partial: Path, target: Path) -> None:
    """Rename a complete folder to the target. An existing folder is moved aside first and put away once the new folder
    is durable."""
    previous = aside(target, "previous")
    if target.is_symlink() or target.is_file():
        raise NotADirectoryError(0, "a file is in the way of the folder")
    put_away(previous, target)
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    sync(target.parent)
    put_away(previous, target)


def put_away(folder: Path, target: Path) -> None:
    """Delete a folder if all in it was written by this project; else keep it, as `NAME.kept` beside the target.

    Args:
        folder: which need not be there.
        target: whose name it had.
    """
    if not folder.exists():
        return
    if is_own(folder):
        remove_folder(folder, target)
        return
    kept = _unused(target.with_name(f"{target.name}.kept"))
    folder.rename(kept)
    logger.warning("%s held what no run has written; it is kept as %s", target, kept)


def remove_folder(folder: Path, named: Path | None = None) -> None:
    """Delete a folder that `library.own_folder.is_own` says is this project's; killed in between, no half of it is
    left under its name.

    Args:
        named: beside which `.NAME.removed` stands meanwhile; the folder itself if not given.
    """
    removed = aside(named or folder, "removed")
    remove(removed)
    folder.rename(removed)
    remove(removed)


def _unused(path: Path) -> Path:
    """The path, or with a number behind it the first that is not there yet."""
    numbered = (path.with_name(f"{path.name}{number}") for number in count(2))
    return path if not path.exists() else next(one for one in numbered if not one.exists())


def aside(target: Path, what: str) -> Path:
    """The hidden name beside a target for its temporary files: `.NAME.WHAT`, a digest for a NAME that is too long."""
    name = f".{target.name}.{what}"
    if len(os.fsencode(name)) > _MOST_NAME_BYTES:
        name = f".{hashlib.sha256(os.fsencode(target.name)).hexdigest()[:32]}.{what}"
    return target.with_name(name)


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content, of a name that `aside` has given; a missing path is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """Call `sync` for a file, or for a folder and everything in it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync_tree(entry)
    sync(path)


def sync(path: Path) -> None:
    """Make a file's bytes, or a folder's entries, durable on the disk (fsync)."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
