"""One run at a time in an output_dir: a lock that ends with its process, however that ends."""

import errno
import fcntl
import json
import logging
import os
import socket
import time
from pathlib import Path
from types import TracebackType

from library.errors import InputError
from library.training.state.names import LOCK_FILE

logger = logging.getLogger(__name__)


class RunLock:
    """Holds an output_dir for this process. Of several ranks, rank 0 takes it for all.

    The system keeps the lock (flock) and drops it when the process ends, by kill -9, too: the file that stays behind
    blocks nobody. Children that are forked close their copy, so a loader worker that outlives its parent does not
    hold it either.
    """

    def __init__(self, output_dir: Path) -> None:
        """Take the lock; the folder is made if need be.

        Raises:
            InputError: another run has it, or the folder cannot be written.
        """
        self.output_dir = output_dir
        self._descriptor: int | None = None
        path = output_dir / LOCK_FILE
        try:
            output_dir.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666)
        except OSError as error:
            if error.errno == errno.ELOOP:  # what it leads to would be written over
                raise InputError(f"--output_dir {output_dir}: {path.name} in it is a link; remove it.") from error
            raise InputError(
                f"--output_dir {output_dir}: cannot be written ({error.strerror or error}). Choose another."
            ) from error
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _owner(descriptor)
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                raise InputError(
                    f"--output_dir {output_dir}: another run writes there ({holder}). Wait for it, end it, or choose "
                    "another folder."
                ) from error
            logger.warning("%s: this file system knows no locks (%s); start no second run there", path, error.strerror)
            return
        self._descriptor = descriptor
        os.register_at_fork(after_in_child=self._close)
        os.ftruncate(descriptor, 0)
        owner = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S")}
        os.pwrite(descriptor, json.dumps(owner).encode(), 0)

    def release(self) -> None:
        """Let others have the folder. The file stays: removing it would let two runs lock two files of one name."""
        if self._descriptor is not None:
            fcntl.flock(self._descriptor, fcntl.LOCK_UN)
            self._close()

    def _close(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def __enter__(self) -> "RunLock":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()


def _owner(descriptor: int) -> str:
    """Who says in the file that it holds the lock, in words."""
    try:
        owner = json.loads(os.pread(descriptor, 1000, 0))
        return f"process {owner['pid']} on {owner['host']}, since {owner['since']}"
    except (ValueError, KeyError, TypeError, OSError):
        return "which one is not said"
