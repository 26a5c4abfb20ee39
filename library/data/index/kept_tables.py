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
from typing import IO, Any

import numpy as np

from library.data.index.mapped_file import Opened, load, read_notes, remove, store
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
        make: its arrays and notes; picklable.
        weight: how much work it is, for the progress bar.
    """

    file: Path | None
    make: Callable[[], tuple[Arrays, Notes]]
    weight: int = 1


@dataclass(frozen=True)
class Table:
    """A table that is there: its notes, and its arrays either on disk or, where that was not possible, in memory."""

    notes: Notes
    file: Path | None
    arrays: Arrays | None = None

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


def cache_folder(data: Path) -> Path:
    """Where the tables of some data are kept: beside it, or in the user's cache folder where it may not be written."""
    folder = data if data.is_dir() else data.parent
    # Permission bits are read, too, because root may write where nobody is meant to.
    if folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK):
        return folder / _FOLDER
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return home / "sd_training" / "index" / digest(str(folder.resolve()))


def _open(made: tuple[Table, ...], number: int) -> Arrays:
    return made[number].open()


def _made(job: Job) -> Table:
    """Make one table, and keep it if that can be; runs in any process."""
    arrays, notes = job.make()
    if job.file is not None:
        with suppress(OSError):  # one that cannot be kept costs time at the next start and memory now, nothing else
            store(job.file, arrays, notes)
            return Table(notes, job.file)
    return Table(notes, None, arrays)


def _kept(jobs: Sequence[Job]) -> list[Table | None]:
    """The tables that are on disk already."""

    def read(part: Sequence[Job]) -> list[Table | None]:
        notes = [None if job.file is None else read_notes(job.file) for job in part]
        return [None if note is None else Table(note, job.file) for job, note in zip(part, notes, strict=True)]

    size = -(-len(jobs) // _READERS) or 1
    with ThreadPoolExecutor(_READERS) as pool:
        parts = pool.map(read, [jobs[start : start + size] for start in range(0, len(jobs), size)])
        return [table for part in parts for table in part]


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
                file = held.enter_context((folder / _LOCK).open("w"))
            while file is not None and not _try_lock(file):
                waited = True
                between()
                time.sleep(_LOCK_POLL_SECONDS)
        yield waited


def _try_lock(file: IO[str]) -> bool:
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

    Not the young ones: a run that began before the data changed may still want them.
    """
    state_of = {(file.parent, prefix): state for file in files for prefix, state in [file.name.split(".")[:2]]}
    old = time.time() - _KEPT_DAYS * 24 * 3600
    outdated = []
    for folder in {file.parent for file in files}:
        with suppress(OSError), os.scandir(folder) as entries:
            for entry in entries:
                prefix, state, *_ = f"{entry.name}.".split(".")
                if state_of.get((folder, prefix), state) != state and entry.stat().st_mtime < old:
                    outdated.append(Path(entry.path))
    remove(outdated)
