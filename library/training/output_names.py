"""Before anything is read or loaded: nothing that a run will write takes the place of what it reads, or of the user's.

Paths are compared by the files that they lead to, so links, relative paths and file systems that take `Dogs` and `dogs`
for one name do not hide that two are the same.
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from library.errors import InputError
from library.options.saved_config import config_path
from library.options.training import TrainingOptions
from library.own_folder import strangers
from library.training.inputs import Input, inputs
from library.training.state.names import ABANDONED
from library.training.written_names import Written, longest_name, name_bytes, written_names

_MOST_NAME_BYTES = 255


@dataclass(frozen=True)
class _Output:
    """The output folder, and the names that the run writes in it.

    Attributes:
        ignore_case: whether its file system takes `Dogs` and `dogs` for one name.
    """

    folder: Path
    names: Sequence[Written]
    ignore_case: bool

    @cached_property
    def present(self) -> list[tuple[Path, Written]]:
        """What lies there under a name that the run writes."""
        return [
            (path, written)
            for path in _entries(self.folder)
            for written in self.names
            if written.has(path.name, self.ignore_case)
        ]


def check_written_names(options: TrainingOptions) -> list[Path]:
    """Look at everything that a run will write, before it reads or loads anything.

    Returns:
        What lies there of an earlier run and is replaced by this one.

    Raises:
        InputError: a name is, contains or lies in an input; something lies there that no run has written, a file in a
            folder's place or a folder in a file's; two names are one; a name is too long.
    """
    folder = options.saving.output_dir
    if os.path.lexists(folder) and not folder.is_dir():
        raise InputError(f"--output_dir {folder} is no folder; choose another")
    output = _Output(folder, written_names(options), _ignores_case(folder))
    _check_length(options)
    _check_each_other(output)
    for read in inputs(options):
        # A configuration that an earlier run wrote is left as it is by this one.
        if read.name != "config_file" or _identity(read.path) != _identity(config_path(options)):
            _check_input(read, output)
    return _check_present(output, options.states.resume is not None)


def _check_length(options: TrainingOptions) -> None:
    longest = longest_name(options)
    surplus = name_bytes(longest) - _MOST_NAME_BYTES
    if surplus > 0:
        raise InputError(
            f"--output_name={options.saving.output_name}: the run would write names such as {longest}, which is "
            f"{surplus} bytes longer than file systems take, with what is added to a name while it is written; shorten "
            "it"
        )


def _check_each_other(output: _Output) -> None:
    """Raise InputError where two things would be written under one name."""
    for one in output.names:
        for other in output.names:
            if other is not one and other.has(one.example, output.ignore_case):
                chosen = one if one.flag in ("--output_name", "--case_name") else other
                raise InputError(
                    f"{chosen.flag}: the run would write both {one.what} and {other.what} as "
                    f"{output.folder / one.example}; choose another name"
                )


def _check_input(read: Input, output: _Output) -> None:
    """Raise InputError where the run would write what it reads, or in it, or a folder around it."""
    for path in _spellings(read.path):
        inside = _below(path, output.folder)
        if inside == () and read.is_data:
            raise InputError(
                f"--output_dir {output.folder} is the folder of {read}: sample pictures would become training data. "
                "Choose another; a folder in it will do"
            )
        for written in output.names if inside else ():
            # A folder that is only added to may hold what is read: prompts stand in sample/, a state in abandoned/.
            is_safe = (
                written.only_grows and len(inside or ()) > 1 and (not read.is_data or written.example == ABANDONED)
            )
            if inside and written.has(inside[0], output.ignore_case) and not is_safe:
                lies = "is" if len(inside) == 1 else "lies in"
                raise InputError(
                    f"{read} {lies} {output.folder / inside[0]}, where this run writes {written.what}: choose another "
                    f"{written.flag}, or move it"
                )
    if not read.is_data and any(_below(path, read.path) is not None for path in _spellings(output.folder)):
        raise InputError(f"--output_dir {output.folder} lies in {read}; choose another")
    for entry, written in output.present:
        if _leads_to(entry, read):
            raise InputError(
                f"{entry} leads to {read}, and this run writes {written.what} there: remove that link, or choose "
                f"another {written.flag}"
            )


def _check_present(output: _Output, goes_on: bool) -> list[Path]:
    """Look at what lies in the output folder; returns what is replaced of an earlier run.

    Raises:
        InputError: it is of another kind than what is written, or no run has written it.
    """
    replaced = []
    for path, written in output.present:
        is_folder, is_temporary = path.is_dir(), path.name.startswith(".") and written.example != path.name
        if written.is_folder != is_folder and not is_temporary:
            kinds = ("a folder", "a file") if is_folder else ("a file", "a folder")
            raise InputError(
                f"{path} is {kinds[0]}, and this run writes {written.what} there, which is {kinds[1]}: move it away, "
                f"or choose another {written.flag}"
            )
        if written.is_own is None or is_temporary:
            continue
        if goes_on and written.moved_aside and written.is_numbered:
            continue  # of a step that is done, which stays, or of another branch, and the start moves it aside
        if not written.is_own(path):
            raise InputError(
                f"{path}{_what_is_strange(path)}, and this run writes {written.what} there: move it away, or choose "
                f"another {written.flag}"
            )
        if goes_on or not written.moved_aside:
            replaced.append(path)
    return replaced


def _what_is_strange(path: Path) -> str:
    """What makes it none of ours, in words."""
    found = strangers(path) if path.is_dir() and not path.is_symlink() else None
    return f" holds {found[0]}, which no run has written" if found else " was not written by a run"


def _spellings(path: Path) -> tuple[Path, Path]:
    """A path without `..` and relative parts: with its links as they are, and with all of them followed."""
    return Path(os.path.abspath(path)), Path(os.path.realpath(path))  # noqa: PTH100 - Path.absolute keeps `..`


def _below(path: Path, folder: Path) -> tuple[str, ...] | None:
    """The names that lead from a folder to a path: () for itself, None where the path is not in it."""
    identity = _identity(folder)
    for ancestor in (path, *path.parents) if identity else ():
        if _identity(ancestor) == identity:
            return path.relative_to(ancestor).parts
    return None


def _leads_to(entry: Path, read: Input) -> bool:
    """Whether a name in the output folder is the same file as an input, a link to it, or a link into it."""
    if _identity(entry) is not None and _identity(entry) == _identity(read.path):
        return True
    return entry.is_symlink() and (
        _below(_spellings(entry)[1], read.path) is not None or _below(_spellings(read.path)[1], entry) is not None
    )


def _identity(path: Path) -> tuple[int, int] | None:
    """What tells one file or folder from another, links followed; None where there is none (os.path.samefile)."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_dev, found.st_ino


def _entries(folder: Path) -> list[Path]:
    try:
        return sorted(folder.iterdir())
    except OSError:  # it is not there yet, or cannot be read, which is said where it is to be written to
        return []


def _ignores_case(folder: Path) -> bool:
    """Whether a folder's file system takes names of other case for the same; asked of what is there already."""
    there = next((one for one in (folder, *folder.absolute().parents) if one.is_dir()), None)
    for path in (*_entries(there)[:100], there) if there else ():
        other = path.with_name(path.name.swapcase()) if path.name else path
        if other.name != path.name:
            return _identity(other) is not None and _identity(other) == _identity(path)
    return False
