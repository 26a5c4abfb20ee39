"""Shelves on disk with a safetensors file a block."""

import json
import os
import platform
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from library.atomic_write import write_file
from library.data.cache.entries import BLOCK, DamagedEntryError, Entry, Found, Made
from library.tensor_file import tensor_file

PARTIAL_BLOCKS = ".??????.safetensors.partial.*"  # of processes that write; or were killed while they did
_MAX_OPEN = 64  # blocks kept open by a process


class BlockShelf:
    """Files of a folder, each with the entries of one block, and their checksums in its header."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, _OpenBlock] = OrderedDict()

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf."""
        found, path = Found(), self._path(places[0])
        try:
            block = _OpenBlock(path)
        except (FileNotFoundError, PermissionError):  # also what another user keeps for himself
            return found
        except DamagedEntryError:
            return Found(damaged=[str(path)])
        found.take(places, lambda place: block.read(place, verify).made)
        return found

    def read(self, place: int) -> Entry:
        """As Shelf."""
        number = place // BLOCK
        if number not in self._open:
            try:
                self._open[number] = _OpenBlock(self._path(place))
            except (FileNotFoundError, PermissionError) as error:
                raise KeyError(place) from error
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number].read(place, True)

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        first = min(entries)
        start = first // BLOCK * BLOCK
        merged = dict(entries)
        for place in self.find(range(start, start + BLOCK), True).made:
            if place not in merged:
                merged[place] = _OpenBlock(self._path(place)).read(place, True)
        self._open.pop(first // BLOCK, None)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for place, entry in sorted(merged.items()):
            tensors |= {f"{place}.{number}": tensor.contiguous() for number, tensor in enumerate(entry.tensors)}
            facts[str(place)] = [entry.made.content, entry.made.settings, entry.size_ids, _checksum(entry.tensors)]
        metadata = {"entries": json.dumps(facts)}
        write_shared(self._path(first), lambda path: _save(tensors, path, metadata))

    def _path(self, place: int) -> Path:
        return self._folder / f"{place // BLOCK:06d}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": OrderedDict()}


class _OpenBlock:
    """A block's file with its header read.

    Raises:
        FileNotFoundError, DamagedEntryError
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self._facts = json.loads(self._file.metadata()["entries"])
        except (FileNotFoundError, PermissionError):
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedEntryError(f"{path} is damaged") from error

    def read(self, place: int, verify: bool) -> Entry:
        """The entry of a place; without `verify` it may have no tensors.

        Raises:
            KeyError, DamagedEntryError
        """
        content, settings, size_ids, checksum = self._facts[str(place)]
        made = Made(content, settings)
        if not verify:
            return Entry(made, tuple(size_ids), ())
        tensors: list[Tensor] = []
        try:
            while (name := f"{place}.{len(tensors)}") in self._file.keys():  # noqa: SIM118
                tensors.append(self._file.get_tensor(name))
        except SafetensorError as error:
            raise DamagedEntryError(f"{self._path} is damaged") from error
        if not tensors or _checksum(tensors) != checksum:
            raise DamagedEntryError(f"{self._path}: entry {place} is damaged")
        return Entry(made, tuple(size_ids), tuple(tensors))


def _save(tensors: Mapping[str, Tensor], path: Path, metadata: Mapping[str, str]) -> None:
    """Not by safetensors' save_file: other users cannot read its files, and a full disk is no OSError in it."""
    start_of_file, content = tensor_file(tensors, metadata)
    with path.open("wb") as file:
        file.write(start_of_file)
        file.writelines(content)


def _checksum(tensors: Sequence[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


def write_shared(path: Path, write: Callable[[Path], object]) -> None:
    """Several processes, of several runs, may write one file at once: the last whole one stays."""
    write_file(path, write, writer=f"{platform.node()}.{os.getpid()}")
