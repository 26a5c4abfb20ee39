"""Files and folders that appear complete or not at all: they are written beside the target, fsynced and renamed."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

from library.errors import InputError


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

    An existing folder is renamed to `.NAME.previous` once the new folder is complete, and removed afterwards; a process
    that is killed in between leaves it under that name.
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
    """Rename a complete folder to the target; an existing folder is moved aside first and removed once the new folder
    is durable."""
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
    """The hidden name beside a target for its temporary files: `.NAME.WHAT`."""
    return target.with_name(f".{target.name}.{what}")


def remove(path: Path) -> None:
    """Delete a file, or a folder with its content; a missing path is no error."""
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
