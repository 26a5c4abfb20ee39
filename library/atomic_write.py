"""Files and folders that appear complete or not at all: written beside, fsynced, renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from library.errors import InputError


def write_file(target: Path, write: Callable[[Path], object], writer: str = "") -> None:
    """Let `write` fill a file beside the target, then put it in the target's place, replacing what is there.

    The folder is made if need be. When `write` fails the target stays as it was and nothing is left beside it. One
    process at a time may write one target, unless each gives a name of its own as `writer`; what it leaves beside the
    target when it is killed then stays.

    Raises:
        InputError: the file system refuses (full, read-only, no permission, a folder in the way).
    """
    _guarded(target, write, _replace_file, writer)


def write_folder(target: Path, write: Callable[[Path], object]) -> None:
    """As `write_file`, for a folder: `write` is given an empty folder to fill.

    An old folder is moved aside only once the new one is complete, and removed after; a run killed in between leaves
    it beside the target under the name `.NAME.previous`.
    """
    _guarded(target, write, replace_folder)


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
    """Rename a complete folder to its place; one that is there is moved aside before and removed once the new
    one is durable."""
    previous = aside(target, "previous")
    if target.is_symlink() or target.is_file():
        raise NotADirectoryError(0, "a file is in the way of the folder")
    remove(previous)
    if target.exists():
        target.rename(previous)
    try:
        partial.rename(target)
    except OSError:
        if previous.exists():
            previous.rename(target)
        raise
    sync(target.parent)
    remove(previous)


def aside(target: Path, what: str) -> Path:
    """The hidden name beside a target under which something of it lies for a while: `.NAME.WHAT`."""
    return target.with_name(f".{target.name}.{what}")


def remove(path: Path) -> None:
    """Delete a file or a folder with all in it; nothing there is no error."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def sync_tree(path: Path) -> None:
    """`sync` for a file, or for a folder and all in it."""
    if path.is_dir():
        for entry in path.iterdir():
            sync_tree(entry)
    sync(path)


def sync(path: Path) -> None:
    """Have the system write a file's bytes, or a folder's entries, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
