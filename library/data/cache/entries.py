"""Encodings that are kept: an entry a row of the index, on the shelf of the row's source, found again by the row alone.

The rows of a source are taken in blocks of BLOCK, which are what one process computes and writes at once. An entry says
what was encoded and how, so that one of another image, crop, caption or model is never taken for the right one.
"""

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from torch import Tensor

from library.data.bad_samples import SampleError
from library.data.fit import SizeIds
from library.data.index.table import Index

BLOCK = 64  # rows; of SDXL's latents at 1024 px in fp32 it takes 32 MiB


@dataclass(frozen=True)
class Made:
    """What an entry was made of.

    Attributes:
        content: digest of the image's bytes, or of the caption.
        settings: digest of all else that the encoding depends on. Both are "" in a file that does not say.
    """

    content: str
    settings: str


@dataclass(frozen=True)
class Entry:
    """One encoding.

    Attributes:
        made: of what.
        size_ids: of an image, as library.data.sample.prepare.Sample has them, and behind them those of the mirrored
            image, where the tensors have that, too; () of a caption.
        tensors: on the CPU.
    """

    made: Made
    size_ids: tuple[int, ...]
    tensors: tuple[Tensor, ...]

    def variant(self, mirrored: bool) -> tuple[SizeIds, tuple[Tensor, ...]]:
        """Size ids and moments of an image as it is, or of it mirrored."""
        first = int(mirrored)
        height, width, top, left, target_h, target_w = self.size_ids[6 * first : 6 * first + 6]
        return (height, width, top, left, target_h, target_w), self.tensors[2 * first : 2 * first + 2]


class DamagedEntryError(Exception):
    """An entry that is there, but not as it was written; the message says where."""


@dataclass
class Found:
    """What lies on a shelf of some places.

    Attributes:
        made: by place.
        damaged: names of files that are there and cannot be read.
    """

    made: dict[int, Made] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def take(self, places: Sequence[int], read: Callable[[int], Made]) -> None:
        """Read some places; one that `read` raises KeyError for is not there."""
        for place in places:
            try:
                self.made[place] = read(place)
            except KeyError:
                continue
            except DamagedEntryError as error:
                self.damaged.append(str(error))


class Shelf(Protocol):
    """Where the entries of one source are, by their places among the source's rows."""

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """What is there of the places, all of one block; with `verify` only what can be read and is undamaged."""

    def read(self, place: int) -> Entry:
        """One entry.

        Raises:
            KeyError: there is none.
            DamagedEntryError: it is not as it was written.
        """

    def write(self, entries: Mapping[int, Entry]) -> None:
        """Put entries of one block there, in place of older ones of the same places; others stay."""


class BorrowingShelf:
    """A user's own shelf before another user's, which is read and never written."""

    def __init__(self, own: Shelf, another: Shelf) -> None:
        self._own, self._another = own, another

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf; what is damaged on the other's shelf is as if it were not there."""
        found = self._own.find(places, verify)
        rest = [place for place in places if place not in found.made]
        if rest:
            found.made |= self._another.find(rest, verify).made
        return found

    def read(self, place: int) -> Entry:
        """As Shelf."""
        try:
            return self._own.read(place)
        except KeyError:
            return self._another.read(place)

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        self._own.write(entries)


class MemoryShelf:
    """A shelf in memory. Entries of the same content share it."""

    def __init__(self) -> None:
        self._entries: dict[int, Entry] = {}

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf."""
        return Found({place: self._entries[place].made for place in places if place in self._entries})

    def read(self, place: int) -> Entry:
        """As Shelf."""
        return self._entries[place]

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        self._entries.update(entries)


@dataclass(frozen=True)
class Cache:
    """The entries of all rows, as training reads them.

    Attributes:
        shelves: of each source, by its number.
        bad: reasons why rows have no entry.
        settings: from a row to what its entry must have been made with (library.data.cache.settings).
        empty: the entry of an empty caption, in a cache of captions.
        foreign: entries of other programs, which do not say what they were made of, are taken (--skip_cache_check).
    """

    index: Index
    shelves: Callable[[int], Shelf]
    bad: Mapping[int, str]
    settings: Callable[[int], str]
    empty: Entry | None = None
    foreign: bool = False

    def read(self, row: int, empty: bool = False) -> Entry:
        """The entry of a row, or of the empty caption that stands for its own.

        Raises:
            SampleError: it was not possible to make one.
            DamagedEntryError: it is gone, damaged, or made with other settings.
        """
        if empty and self.empty is not None:
            return self.empty
        if row in self.bad:
            raise SampleError(self.bad[row])
        source, place = self.index.place(row)
        try:
            entry = self.shelves(source).read(place)
        except KeyError as error:
            raise DamagedEntryError(f"the cache's entry of {self.index.name(row)} is gone") from error
        found = entry.made.settings
        if found != self.settings(row) and not (self.foreign and not found):
            by = "with other settings, by another run" if found else "by another program"
            raise DamagedEntryError(
                f"the cache's entry of {self.index.name(row)} has been written {by} since this one began"
            )
        return entry


@dataclass(frozen=True)
class Caches:
    """What a run reads in place of images and captions; None: nothing."""

    latents: Cache | None = None
    text: Cache | None = None


NO_CACHES = Caches()
MEND_CACHE = "Start again, without --skip_cache_check, to have it computed anew."


@dataclass(frozen=True)
class Block:
    """Some rows of a source that are computed by one process.

    Attributes:
        start: the place of the first.
        count: how many, at most BLOCK.
    """

    source: int
    start: int
    count: int

    @property
    def places(self) -> range:
        """Of all its rows."""
        return range(self.start, self.start + self.count)


def blocks_of(index: Index, source: int) -> Iterator[Block]:
    """All rows of a source."""
    count = int(index.starts_S[source + 1] - index.starts_S[source])
    for start in range(0, count, BLOCK):
        yield Block(source, start, min(BLOCK, count - start))


def digest_bytes(content: bytes) -> str:
    """32 hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()[:32]


def digest_of(*facts: Any) -> str:
    """32 hexadecimal digits for anything that JSON can hold (others by their text)."""
    return digest_bytes(json.dumps(facts, default=str, sort_keys=True).encode("utf-8", "surrogateescape"))
