"""Computing what a cache lacks: each process its own blocks, without a word to the others, until all are written.

What is there and was made of the same is kept. A stop in between leaves what is done, and the next start goes on.
"""

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from library.data.bad_samples import SampleError
from library.data.cache.entries import Block, Entry, Made, Shelf
from library.data.index.table import Index
from library.finite import is_finite
from library.signals import leave_signals_to_parent

_WINDOW = 8  # blocks whose rows are grouped together: more of them fill more of the batches
# Of a row whose encoding would make the loss NaN whenever it trains.
_NOT_FINITE = (
    "it is encoded to numbers that are NaN or infinite: the network overflows. For latents use --no_half_vae or a "
    "--vae for fp16; otherwise --mixed_precision=bf16 or no"
)
_PREFETCH = 2  # batches that each worker keeps ready


@dataclass(frozen=True)
class Loaded:
    """A row that is ready to be encoded: `item` is an image's pixels (rows, columns, 3) in uint8, or a caption."""

    content: str
    size_ids: tuple[int, ...]
    item: Any


class Making(Protocol):
    """What is encoded, and how. All but `encode` is called in worker processes, too."""

    @property
    def batch_size(self) -> int:
        """Rows that are encoded at once."""

    def group(self, row: int) -> Hashable:
        """Rows of one group can be encoded together."""

    def settings(self, row: int) -> str:
        """Digest of what the encoding depends on beside the content."""

    def content(self, row: int) -> str:
        """Digest of what there is to encode.

        Raises:
            SampleError: it cannot be read.
        """

    def load(self, row: int) -> Loaded:
        """A row, ready to be encoded.

        Raises:
            SampleError: it cannot be read or decoded.
        """

    def encode(self, items: Sequence[Any]) -> tuple[Tensor, ...]:
        """The tensors of some items of one group, batch first, on the CPU."""


@dataclass
class Filled:
    """What filling a share of the cache came to.

    Attributes:
        kept: entries that were there already.
        computed: entries that were not.
        foreign: of another program, which do not say what they were made of; used only unchecked.
        outdated: of another image, caption or setting.
        damaged: files or entries that could not be read.
        bad: reasons by row, of rows that cannot be encoded.
    """

    kept: int = 0
    computed: int = 0
    foreign: int = 0
    outdated: int = 0
    damaged: list[str] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Checked:
    """What there is of a block."""

    missing: list[int]
    foreign: int
    outdated: int
    damaged: list[str]


def fill(
    making: Making,
    index: Index,
    shelves: Callable[[int], Shelf],
    blocks: Sequence[Block],
    *,
    check: bool = True,
    workers: int = 0,
    progress: Callable[[int, int], None] = lambda done, total: None,
    between: Callable[[], None] = lambda: None,
) -> Filled:
    """Have all entries of some blocks.

    Args:
        check: read images and entries to see whether they belong together and are whole; without, an entry counts that
            is there, with the same settings or from another program.
        workers: processes that read and decode; 0 does it in this one.
        progress: called with (done, total) rows.
        between: called between two pieces of the work; may raise, to end it; what was encoded before is written.
    """
    filled, total = Filled(), sum(block.count for block in blocks)
    progress(0, total)
    missing: list[tuple[Block, list[int]]] = []
    for block, found in zip(blocks, _items(_Check(making, index, shelves, blocks, check), workers), strict=True):
        between()
        filled.kept += block.count - len(found.missing)
        filled.foreign += found.foreign
        filled.outdated += found.outdated
        filled.damaged += found.damaged
        if found.missing:
            missing.append((block, found.missing))
        progress(filled.kept, total)
    for start in range(0, len(missing), _WINDOW):
        window = _Window(making, index, shelves, missing[start : start + _WINDOW])
        try:
            for batch in _items(_Load(making, window.batches), workers):
                between()
                window.encode(batch, filled)
                progress(filled.kept + filled.computed + len(filled.bad), total)
        finally:
            window.write_rest()
    return filled


class _Window:
    """Some blocks in work: batches over all of them, and what is encoded and waits for the rest of its block."""

    def __init__(
        self, making: Making, index: Index, shelves: Callable[[int], Shelf], missing: Sequence[tuple[Block, list[int]]]
    ) -> None:
        self._making, self._index, self._shelves = making, index, shelves
        self._open = {block: len(places) for block, places in missing}
        self._entries: dict[Block, dict[int, Entry]] = {block: {} for block, _ in missing}
        self._block_of_row: dict[int, Block] = {}
        groups: dict[Hashable, list[int]] = {}
        for block, places in missing:
            first = int(index.starts_S[block.source])
            for place in places:
                self._block_of_row[first + place] = block
                groups.setdefault(making.group(first + place), []).append(first + place)
        size = making.batch_size
        self.batches = [rows[start : start + size] for rows in groups.values() for start in range(0, len(rows), size)]

    def encode(self, batch: Sequence[tuple[int, Loaded | str]], filled: Filled) -> None:
        """Encode what could be loaded, write the blocks that are complete."""
        loaded = [(row, found) for row, found in batch if isinstance(found, Loaded)]
        filled.bad.update({row: found for row, found in batch if isinstance(found, str)})
        if loaded:
            tensors = self._making.encode([found.item for _, found in loaded])
            for number, (row, found) in enumerate(loaded):
                block = self._block_of_row[row]
                made = Made(found.content, self._making.settings(row))
                entry = Entry(made, found.size_ids, tuple(tensor[number].clone() for tensor in tensors))
                if not all(map(is_finite, entry.tensors)):
                    filled.bad[row] = _NOT_FINITE
                    continue
                self._entries[block][row - int(self._index.starts_S[block.source])] = entry
            filled.computed += sum(row not in filled.bad for row, _ in loaded)
        for row, _ in batch:
            block = self._block_of_row[row]
            self._open[block] -= 1
            if not self._open[block]:
                self._write(block)

    def write_rest(self) -> None:
        """Write what is encoded of blocks that are not complete: a stop came in between."""
        for block in list(self._entries):
            self._write(block)

    def _write(self, block: Block) -> None:
        entries = self._entries.pop(block)
        if entries:
            self._shelves(block.source).write(entries)


class _Check(Dataset):
    """Item i: what there is of block i."""

    def __init__(
        self,
        making: Making,
        index: Index,
        shelves: Callable[[int], Shelf],
        blocks: Sequence[Block],
        check: bool,
    ) -> None:
        self._making, self._index, self._shelves, self._blocks, self._check = making, index, shelves, blocks, check

    def __len__(self) -> int:
        return len(self._blocks)

    def __getitem__(self, item: int) -> _Checked:
        block = self._blocks[item]
        found = self._shelves(block.source).find(block.places, self._check)
        first = int(self._index.starts_S[block.source])
        missing, foreign, outdated = [], 0, 0
        for place in block.places:
            made = found.made.get(place)
            if made is None:
                missing.append(place)
                continue
            foreign += not made.settings
            if not self._holds(made, first + place):
                missing.append(place)
                outdated += bool(made.settings)
        return _Checked(missing, foreign, outdated, found.damaged)

    def _holds(self, made: Made, row: int) -> bool:
        """Whether an entry is of this row as it is now."""
        if not made.settings:
            return not self._check
        if made.settings != self._making.settings(row):
            return False
        with suppress(SampleError):
            return not self._check or made.content == self._making.content(row)
        return False


class _Load(Dataset):
    """Item i: the rows of batch i, each loaded or with the reason why not."""

    def __init__(self, making: Making, batches: Sequence[Sequence[int]]) -> None:
        self._making, self._batches = making, batches

    def __len__(self) -> int:
        return len(self._batches)

    def __getitem__(self, item: int) -> list[tuple[int, Loaded | str]]:
        loaded: list[tuple[int, Loaded | str]] = []
        for row in self._batches[item]:
            try:
                loaded.append((row, self._making.load(row)))
            except SampleError as error:
                loaded.append((row, str(error)))
        return loaded


def _items(dataset: Any, workers: int) -> Iterable[Any]:
    """All items of a dataset in order, made by worker processes."""
    workers = min(workers, len(dataset))

    def read() -> Iterator[Any]:
        yield from DataLoader(
            dataset,
            batch_size=None,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # or it would take its seed from torch's own numbers, and change them
        )

    return read()


def _leave_signals_to_the_main_process(worker: int) -> None:
    leave_signals_to_parent()
