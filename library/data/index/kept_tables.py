"""Tables that are made once, in parallel, and kept on disk as long as what they were made from is unchanged.

The name of a kept file holds a digest of what it was made from, so a file that is there is right, and a changed source
has another. One process of those that share the folder makes what is missing while the others wait for its lock, not in
a collective; where there are no locks each makes its own, and the first one stays.
"""

import fcntl
import hashlib
import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from library.data.index.folder_use import mark_in_use, may_write, open_lock, used_by_others, user_cache_folder
from library.data.index.mapped_file import WRITING, Opened, load, read_notes, remove, store
from library.data.index.worker_pool import run_all
from library.errors import InputError

_FOLDER = ".image_index"
_LOCK = "lock"
_LOCK_POLL_SECONDS = 0.1
_KEPT_DAYS = 30
_READERS = 8  # threads that read heads of files, since a network disk answers slowly

Arrays = dict[str, np.ndarray]
Notes = dict[str, Any]


@dataclass(frozen=True)
class Job:
    """A table that is wanted.

    Attributes:
        file: where it is kept; None: nowhere.
        another: where it may be kept by another user, whose folder this one may only read.
        make: its arrays and notes; picklable.
        weight: how much work it is, for the progress bar.
    """

    file: Path | None
    make: Callable[[], tuple[Arrays, Notes]]
    weight: int = 1
    another: Path | None = None


@dataclass(frozen=True)
class Table:
    """A table that is there: its notes, and its arrays either on disk or, where that was not possible, in memory.

    Attributes:
        own_file: where this user keeps it, or would: what is made of it is kept beside that.
    """

    notes: Notes
    file: Path | None
    arrays: Arrays | None = None
    own_file: Path | None = None

    def open(self) -> Arrays:
        """The arrays, mapped into memory.

        Raises:
            InputError: the kept file is gone.
        """
        if self.file is None:
            return self.arrays or {}
        try:
            return load(self.file)[0]
        except OSError as error:
            reason = f"{self.file} of the index is gone or damaged ({error.strerror})"
            raise InputError(f"{reason}; start again to have it made anew.") from error


def tables(
    jobs: Sequence[Job],
    progress: Callable[[int, int], None] = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
) -> list[Table]:
    """All wanted tables, in their order; only those that are not kept yet are made.

    Args:
        progress: called with (done, total) weights of what is to be made; not at all where nothing is.
        between: called between two pieces of the work, and again and again while another process works; may raise.

    Raises:
        What the jobs raise.
    """
    for folder in {file.parent for job in jobs for file in (job.file, job.another) if file is not None}:
        mark_in_use(folder)
    found = _kept(jobs)
    if None not in found:
        return [table for table in found if table is not None]
    with locked(sorted({job.file.parent for job in jobs if job.file is not None}), between):
        found = _kept(jobs)  # another process may have made them meanwhile
        missing = [number for number, table in enumerate(found) if table is None]
        if not missing:
            return [table for table in found if table is not None]
        total, done = sum(jobs[number].weight for number in missing), 0
        progress(0, total)

        def advance(place: int) -> None:
            nonlocal done
            done += jobs[missing[place]].weight
            progress(done, total)
            between()

        made = run_all(_made, [jobs[number] for number in missing], advance)
        _remove_outdated([job.file for job in jobs if job.file is not None])
    for number, table in zip(missing, made, strict=True):
        found[number] = table
    return [table for table in found if table is not None]


def opened(made: Sequence[Table]) -> Opened[Arrays]:
    """The arrays of tables by their numbers, each mapped when first asked for."""
    return Opened(partial(_open, tuple(made)))


def kept_name(name: str, made_from: object, state: object) -> str:
    """A name for a kept file, PREFIX.STATE, without its ending.

    Args:
        name: of the source, unique among those that share the folder.
        made_from: options that the table depends on; tables of several are kept side by side.
        state: what tells one content of the source from another; tables of older ones are deleted in time.
    """
    readable = re.sub(r"[^\w-]", "_", name, flags=re.ASCII)[-60:]
    return f"{readable}-{digest([name, made_from])}.{digest(state)}"


def digest(content: object) -> str:
    """16 hexadecimal digits for anything that JSON can hold (paths and the like by their text)."""
    text = json.dumps(content, default=str, sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()[:16]


def cache_folders(data: Path) -> tuple[Path, Path | None]:
    """Where the tables of some data are kept: beside it, or in the user's cache folder where that may not be written.

    Returns:
        The folder, and where it is not the one beside the data, that one if another user keeps tables there.
    """
    folder = data if data.is_dir() else data.parent
    beside = folder / _FOLDER
    if may_write(beside):
        return beside, None
    own = user_cache_folder() / "sd_training" / "index" / digest(str(folder.resolve()))
    return own, beside if beside.is_dir() else None


def _open(made: tuple[Table, ...], number: int) -> Arrays:
    return made[number].open()


def _made(job: Job) -> Table:
    """Make one table, and keep it if that can be; runs in any process."""
    arrays, notes = job.make()
    if job.file is not None:
        with suppress(OSError):  # one that cannot be kept costs time at the next start and memory now, nothing else
            store(job.file, arrays, notes)
            return Table(notes, job.file, own_file=job.file)
    return Table(notes, None, arrays)


def _kept(jobs: Sequence[Job]) -> list[Table | None]:
    """The tables that are on disk already."""

    def read(part: Sequence[Job]) -> list[Table | None]:
        return [_read(job) for job in part]

    size = -(-len(jobs) // _READERS) or 1
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(read, [jobs[start : start + size] for start in range(0, len(jobs), size)])
        return [table for part in parts for table in part]


def _read(job: Job) -> Table | None:
    for file in (job.file, job.another):
        if file is not None and (notes := read_notes(file)) is not None:
            return Table(notes, file, own_file=job.file)
    return None


@contextmanager
def locked(folders: Sequence[Path], between: Callable[[], None]) -> Iterator[bool]:
    """Hold the folders' locks; go without where there are none to be had. They end with the process that holds them.

    Yields whether another process had to be waited for.
    """
    waited = False
    with ExitStack() as held:
        for folder in folders:
            file = None
            with suppress(OSError):
                folder.mkdir(parents=True, exist_ok=True)
                file = open_lock(folder / _LOCK)
                held.callback(os.close, file)
            while file is not None and not _try_lock(file):
                waited = True
                between()
                time.sleep(_LOCK_POLL_SECONDS)
        yield waited


def _try_lock(file: int) -> bool:
    """Lock the file; False while another process has it, True where the file system has no locks."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True


def _remove_outdated(files: Sequence[Path]) -> None:
    """Delete old tables of these files' sources in another state, and what is kept beside those.

    Not the young ones, and none while another process uses the folder: a run that began before the data changed may
    still want them, and it may last for months.
    """
    state_of = {(file.parent, prefix): state for file in files for prefix, state in [file.name.split(".")[:2]]}
    old = time.time() - _KEPT_DAYS * 24 * 3600
    outdated = []
    for folder in {file.parent for file in files}:
        if used_by_others(folder):
            continue
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                if entry.name.startswith(WRITING) and entry.stat().st_mtime < old:  # by a process that was killed
                    outdated.append(Path(entry.path))
                prefix, state, *_ = f"{entry.name}.".split(".")
                if state_of.get((folder, prefix), state) != state and entry.stat().st_mtime < old:
                    outdated.append(Path(entry.path))
    remove(outdated)
