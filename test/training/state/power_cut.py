"""A child process that is killed, or loses power, before the n-th operation on files that it makes."""

import os
import signal
from collections.abc import Callable
from pathlib import Path

_OPERATIONS = ("open", "write", "fsync", "rename", "replace", "mkdir", "unlink", "rmdir")


class _Disk:
    """Counts operations. At a power cut, of files only what was fsynced is left, of new entries and renames only what
    their folder's fsync made durable; deletions count as done at once: the worst of what a file system may do."""

    def __init__(self, last: int, power_cut: bool) -> None:
        self.left, self.power_cut = last, power_cut
        self.paths: dict[int, Path] = {}
        self.unsynced: set[Path] = set()
        self.unlisted: set[Path] = set()
        self.renames: list[tuple[Path, Path]] = []

    def install(self) -> None:
        for name in _OPERATIONS:
            setattr(os, name, self._counted(name, getattr(os, name)))

    def _counted(self, name: str, real: Callable) -> Callable:
        def operation(*args, **keywords):
            writing = name != "open" or args[1] & os.O_ACCMODE != os.O_RDONLY
            if writing:
                self.left -= 1
                if self.left < 0:
                    self._end()
            result = real(*args, **keywords)
            if name == "open" and isinstance(args[0], str | Path):
                self.paths[result] = Path(args[0])
                if writing:
                    self.unsynced.add(Path(args[0]))
                    self.unlisted.add(Path(args[0]))
            if name == "fsync":
                self._synced(self.paths.get(args[0]))
            if name in ("rename", "replace"):
                self._renamed(Path(args[0]), Path(args[1]))
            return result

        return operation

    def _synced(self, path: Path | None) -> None:
        self.unsynced.discard(path)
        self.unlisted = {new for new in self.unlisted if new.parent != path}
        self.renames = [(old, new) for old, new in self.renames if path not in (old.parent, new.parent)]

    def _renamed(self, old: Path, new: Path) -> None:
        def moved(path: Path) -> Path:
            return new / path.relative_to(old) if path.is_relative_to(old) else path

        self.unsynced, self.unlisted = set(map(moved, self.unsynced)), set(map(moved, self.unlisted))
        self.renames.append((old, new))

    def _end(self) -> None:
        self.left = 10**9
        if self.power_cut:
            for path in self.unsynced:
                if path.exists():
                    os.truncate(path, path.stat().st_size // 2)
            for path in self.unlisted:
                path.unlink(missing_ok=True)
            for old, new in reversed(self.renames):
                if new.exists():
                    new.rename(old)
        os.kill(os.getpid(), signal.SIGKILL)


def run_until(work: Callable[[Callable[[], None]], None], last: int, power_cut: bool) -> tuple[int, bool]:
    """Run `work` in a child that ends before operation number `last`.

    Args:
        work: is given a function to call after each part of it that should be durable.

    Returns:
        How many parts were said to be durable, and whether the work came to its end.
    """
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(read)
            tell = os.write
            _Disk(last, power_cut).install()
            work(lambda: tell(write, b"."))
            os._exit(0)
        except BaseException:
            os._exit(1)
    os.close(write)
    with os.fdopen(read, "rb") as file:
        parts = len(file.read())
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert status in (0, -signal.SIGKILL), f"the child failed with {status}"
    return parts, status == 0
