"""Folders that several users and runs share: whether this process may write there, and which processes use one."""

import errno
import fcntl
import os
import struct
import tempfile
from contextlib import suppress
from pathlib import Path

IN_USE = "in_use"  # a file that each process which uses a folder holds a shared lock on
_FLOCK = (
    "hhqqi4x"  # C's struct flock on Linux: type, whence, start, length (0: to the end), process (0: the description)
)
_held: dict[Path, int] = {}  # descriptors of the locks that this process holds until its end


def may_write(folder: Path) -> bool:
    """Whether this process can make files in a folder, or, where it is not there yet, the folder itself.

    Permission bits are read, too, because root may write where nobody is meant to.
    """
    there = next((one for one in (folder, *folder.parents) if one.exists()), folder)
    try:
        effective = os.access in os.supports_effective_ids
        return bool(there.stat().st_mode & 0o222) and os.access(there, os.W_OK | os.X_OK, effective_ids=effective)
    except OSError:
        return False


def user_cache_folder() -> Path:
    """The user's folder for caches; one for temporary files where there is no home."""
    if given := os.environ.get("XDG_CACHE_HOME"):
        return Path(given)
    with suppress(RuntimeError):  # HOME is unset, and the system knows no home of this user
        home = Path("~").expanduser()
        if home.is_absolute() and home != Path("/"):
            return home / ".cache"
    return Path(tempfile.gettempdir()) / f"sd_training-{os.getuid()}"


def open_lock(path: Path) -> int:
    """A descriptor of a file for locks, made if need be; links are not followed, and nothing in it is changed.

    Raises:
        OSError: it can neither be made nor read.
    """
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise
        return os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)  # another user's, which can be locked as well


def mark_in_use(folder: Path) -> None:
    """Say that this process uses a folder, until it ends, however it ends; not where that cannot be said.

    Of a run's processes on one machine the first does it for all.
    """
    if folder in _held or os.environ.get("LOCAL_RANK", "0") != "0":
        return
    with suppress(OSError):
        descriptor = open_lock(folder / IN_USE)
        _held[folder] = descriptor
        fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, _whole_file(fcntl.F_RDLCK))


def used_by_others(folder: Path) -> bool:
    """Whether another process uses a folder, or may use it where that cannot be told.

    It is asked which lock would be in the way of an exclusive one, and none is taken: this process's own mark stays
    all the time, so of two that ask at once each sees the other.
    """
    mark_in_use(folder)
    descriptor = _held.get(folder)
    if descriptor is None:
        return True
    try:
        found = fcntl.fcntl(descriptor, fcntl.F_OFD_GETLK, _whole_file(fcntl.F_WRLCK))
    except OSError:
        return True
    return bool(struct.unpack(_FLOCK, found)[0] != fcntl.F_UNLCK)


def _whole_file(kind: int) -> bytes:
    """A lock of the whole file, which belongs to an open file description (fcntl(2)): forked processes share it."""
    return struct.pack(_FLOCK, kind, os.SEEK_SET, 0, 0, 0)
