"""Scanned tables kept on disk, each as long as the shard or folder that it came from is unchanged."""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from library.data.rows import ROW, Part

_VERSION = 2  # raise it whenever a scan of unchanged data gives another table
_FOLDER = ".sdxl_index"


@dataclass(frozen=True)
class IndexCache:
    """A folder of tables; None keeps nothing."""

    folder: Path | None

    def get(self, name: str, state: object, scan: Callable[[], Part]) -> Part:
        """The kept table of a source if its state is still the same, else a new scan, which is then kept.

        Args:
            name: of the source, unique among those that share this folder.
            state: what tells one content of the source from another (sizes, times, options); anything JSON can hold.
        """
        if self.folder is None:
            return scan()
        file = self.folder / f"{Path(name).name[:80]}-{_digest(name)[:16]}.npz"
        stamp = _digest(json.dumps([_VERSION, ROW.descr, state], default=str))
        part = _load(file, stamp)
        if part is None:
            part = scan()
            with suppress(OSError):  # a cache that cannot be written costs time at the next start, nothing else
                _store(file, stamp, part)
        return part


def file_state(path: Path) -> list[int] | None:
    """Size and modification time of a file; None if there is none."""
    try:
        stat = path.stat()
    except OSError:
        return None
    return [stat.st_size, stat.st_mtime_ns]


def cache_for(data: Path) -> IndexCache:
    """A cache beside the data, or in the user's cache folder where the data may not be written."""
    folder = data if data.is_dir() else data.parent
    # Permission bits are read, too, because root may write where nobody is meant to.
    if folder.stat().st_mode & 0o222 and os.access(folder, os.W_OK):
        return IndexCache(folder / _FOLDER)
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path("~/.cache").expanduser())
    return IndexCache(home / "sdxl_pretrain" / "index" / _digest(str(folder.resolve()))[:16])


def _load(file: Path, stamp: str) -> Part | None:
    """The table in a cache file, or None if there is none, it is damaged, or it is of another state."""
    try:
        with np.load(file, allow_pickle=False) as content:
            notes = json.loads(bytes(content["notes"]))
            if notes.pop("stamp") != stamp:
                return None
            return Part.from_arrays(content["rows"], content["text"], notes)
    except Exception:  # whatever a damaged file raises, scanning again is right
        return None


def _store(file: Path, stamp: str, part: Part) -> None:
    """Write a table aside and rename it, so that several ranks may do it at once."""
    file.parent.mkdir(parents=True, exist_ok=True)
    notes = np.frombuffer(json.dumps({**part.notes(), "stamp": stamp}).encode(), np.uint8)
    with tempfile.NamedTemporaryFile(dir=file.parent, prefix=".writing-", delete=False) as aside:
        try:
            np.savez(aside, rows=part.rows, text=part.text, notes=notes)
            aside.close()
            Path(aside.name).replace(file)
        except BaseException:
            Path(aside.name).unlink(missing_ok=True)
            raise


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogateescape")).hexdigest()
