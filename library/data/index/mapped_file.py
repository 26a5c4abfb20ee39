"""Arrays and notes in one file that is written once and then mapped into memory, so that processes share its pages.

Layout: _MAGIC, the length of the head (8 bytes, little-endian), the head in JSON (the arrays' places and the notes),
then each array at a multiple of 64 bytes. The head tells the file's whole length, so one that was cut short is noticed.
"""

import json
import mmap
import os
import secrets
import struct
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np

_MAGIC = b"ROWTABLE"
WRITING = ".writing-"  # how the names of files begin that are being written
_ALIGNMENT = 64
_FIRST_READ = 1 << 12  # bytes; holds the whole head of nearly every file
_MAX_MAPPED = 64  # files kept mapped; Python keeps a descriptor for each, and the usual limit of a process is 1024

Content = TypeVar("Content")


def store(path: Path, arrays: dict[str, np.ndarray], notes: dict[str, Any]) -> None:
    """Write a file aside and rename it: a reader finds it whole or not at all, and several may write it at once.

    A file that is there already stays, since whoever has it mapped on a network disk would lose it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    listed: dict[str, Any] = {}
    end = 0  # of the arrays, counted from the end of the head
    for name, array in arrays.items():
        start = _aligned(end)
        dtype = array.dtype.str if array.dtype.names is None else array.dtype.descr
        listed[name] = {"start": start, "count": len(array), "dtype": dtype}
        end = start + array.nbytes
    head = json.dumps({"arrays": listed, "bytes": end, "notes": notes}).encode()
    head += b" " * (_aligned(len(head) + 16) - len(head) - 16)
    aside = path.with_name(f"{WRITING}{secrets.token_hex(8)}")
    try:
        with aside.open("xb") as file:  # not by tempfile, whose files other users cannot read
            file.write(_MAGIC + struct.pack("<q", len(head)) + head)
            first = file.tell()
            for name, array in arrays.items():
                file.seek(first + listed[name]["start"])
                file.write(np.ascontiguousarray(array).data.cast("B") if array.nbytes else b"")
            file.truncate(first + end)
        if read_notes(path) is None:
            aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def read_notes(path: Path | str) -> dict[str, Any] | None:
    """The notes of a file; None if there is none, or it is not whole."""
    try:
        fd = os.open(path, os.O_RDONLY)
    except OSError:
        return None
    try:
        found = _head(fd)
    finally:
        os.close(fd)
    return None if found is None else found[0]["notes"]


def load(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """The arrays of a file, mapped, and its notes.

    Raises:
        OSError: it is not there (any more), or not whole.
    """
    with path.open("rb") as file:
        found = _head(file.fileno())
        if found is None:
            raise OSError(0, "the file is damaged", str(path))
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    head, first = found
    arrays = {}
    for name, place in head["arrays"].items():
        dtype = place["dtype"]
        kind = np.dtype(dtype if isinstance(dtype, str) else [tuple(field) for field in dtype])
        arrays[name] = np.frombuffer(mapped, kind, place["count"], first + place["start"])
    return arrays, head["notes"]


class Opened(Generic[Content]):
    """Numbered things that are opened when first needed; the least used are let go. Copies open their own."""

    def __init__(self, open_one: Callable[[int], Content]) -> None:
        self._open_one = open_one
        self._kept: OrderedDict[int, Content] = OrderedDict()

    def __getitem__(self, number: int) -> Content:
        if number in self._kept:
            self._kept.move_to_end(number)
            return self._kept[number]
        content = self._kept[number] = self._open_one(number)
        if len(self._kept) > _MAX_MAPPED:
            self._kept.popitem(last=False)
        return content

    def __getstate__(self) -> dict[str, Any]:
        return {"_open_one": self._open_one, "_kept": OrderedDict()}


def remove(paths: Sequence[Path]) -> None:
    """Delete files that are not needed any more, as far as that is allowed."""
    for path in paths:
        with suppress(OSError):
            path.unlink()


def _head(fd: int) -> tuple[dict[str, Any], int] | None:
    """The head and where the arrays begin; None unless the file is whole."""
    start = os.pread(fd, _FIRST_READ, 0)
    if len(start) < 16 or not start.startswith(_MAGIC):
        return None
    (length,) = struct.unpack_from("<q", start, 8)
    if not 0 < length <= os.fstat(fd).st_size:
        return None
    text = start[16 : 16 + length]
    if len(text) < length:
        text += os.pread(fd, length - len(text), 16 + len(text))
    try:
        head = json.loads(text)
        whole = os.fstat(fd).st_size == 16 + length + head["bytes"]
    except (ValueError, KeyError, TypeError):
        return None
    return (head, 16 + length) if whole else None


def _aligned(position: int) -> int:
    return -(-position // _ALIGNMENT) * _ALIGNMENT
