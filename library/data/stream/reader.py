"""Batches out of shards that can only be read from their beginning: what one reader of a stream does.

A stream has a fixed number of readers. In a pass over the data the shards come in a keyed random order and are dealt
out to the readers, round after round without end; where shards are fewer than readers, each shard comes as several
parts, of which each has every n-th sample. A reader takes the samples of its parts in their order, mixes them in a
pool (whoever comes in pushes one out that is drawn by key) and lets those that leave it wait by bucket until a batch is
full.

So a reader's batches are a pure function of seed and data, and of its position: part and sample that come next, and
which samples are in the pool or wait. To go on from a position only the parts are read again that these samples are
in, each up to the last of them: at most as many parts as samples, `pool + buckets × (batch - 1)`.
"""

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from library.data.bad_samples import SampleError
from library.data.index.tar_headers import TornTarError
from library.data.order.buckets import bucket_list, bucket_of
from library.data.order.permutation import ROUNDS, permute
from library.data.sample.prepare import Sample
from library.data.stream.shard_bytes import Patience, ShardError
from library.data.stream.shard_samples import StreamSample, StreamSubset, shard_samples
from library.errors import InputError
from library.keyed_random import Stream, generator
from library.options.buckets import BucketOptions
from library.redaction import shown_address

logger = logging.getLogger(__name__)

_READERS_OF_SLOT = 8  # for each micro-batch of a step; fewer where there are fewer shards
_MOST_EMPTY = 4  # shards in a row without a sample before the stream is called broken

Bad = tuple[str, str]
Identity = tuple[int, int]  # number of a part in the reader's order, number of the sample in its shard
Prepare = Callable[[StreamSample, "Bucket", int, int, int], Sample]  # sample, bucket, subset, pass, place


@dataclass(frozen=True)
class Shard:
    """A shard of the stream.

    Attributes:
        subset: number of the subset that it belongs to.
        samples: how many it has, where a file beside it says so.
    """

    address: str
    subset: int
    samples: int | None = None


@dataclass(frozen=True)
class Bucket:
    """Width and height in px, and which of the run's bucket options made it."""

    size_px: tuple[int, int]
    options: int


@dataclass(frozen=True)
class Part:
    """A part in a reader's order: those samples of a shard whose number is `share` modulo `shares`."""

    epoch: int
    shard: Shard
    share: int
    shares: int

    def has(self, number: int) -> bool:
        """Whether a sample of the shard belongs to it."""
        return number % self.shares == self.share


@dataclass(frozen=True)
class Layout:
    """How the samples of some shards are dealt out. Ranks do not enter it, but for their product with accumulation.

    Attributes:
        subsets, buckets: of each subset by its number; equal bucket options share their buckets.
        slots: micro-batches in a step, over all processes.
        batch_size: samples in a micro-batch.
        pool: samples that all readers together mix.
    """

    shards: tuple[Shard, ...]
    subsets: tuple[StreamSubset, ...]
    bucket_options: tuple[BucketOptions, ...]
    seed: int
    slots: int
    batch_size: int
    pool: int
    patience: Patience = field(default_factory=Patience)

    @cached_property
    def readers_of_slot(self) -> int:
        """Readers that take turns at one place of a step: as many as the shards allow."""
        return max(1, min(_READERS_OF_SLOT, len(self.shards) // self.slots))

    @property
    def readers(self) -> int:
        """Of the whole stream."""
        return self.readers_of_slot * self.slots

    @property
    def shares(self) -> int:
        """Parts that a shard comes as."""
        return -(-self.readers // len(self.shards))

    @property
    def pool_of_reader(self) -> int:
        """Samples that a reader mixes."""
        return max(1, self.pool // self.readers)

    @cached_property
    def distinct_buckets(self) -> tuple[BucketOptions, ...]:
        """The bucket options of the run without repeats."""
        return tuple(dict.fromkeys(self.bucket_options))

    @cached_property
    def known_buckets(self) -> tuple[np.ndarray, ...]:
        """(K, 2) sizes of all buckets, of each of those options."""
        return tuple(bucket_list(options) for options in self.distinct_buckets)

    def bucket(self, subset: int, size_px: tuple[int, int]) -> Bucket:
        """Where an image of that size goes."""
        number = self.distinct_buckets.index(self.bucket_options[subset])
        return Bucket(bucket_of(size_px, self.known_buckets[number]), number)

    def part(self, reader: int, number: int) -> Part:
        """The part of that number in a reader's order."""
        parts = len(self.shards) * self.shares
        epoch, place = divmod(number * self.readers + reader, parts)
        keys = generator(self.seed, Stream.SOURCES, epoch).integers(0, 2**64, ROUNDS, np.uint64)
        shard, share = divmod(int(permute(np.array([place]), parts, keys)[0]), self.shares)
        return Part(epoch, self.shards[shard], share, self.shares)


@dataclass(frozen=True)
class Position:
    """Where a reader is between two batches.

    Attributes:
        part, sample: what is read next.
        drawn: how many samples have left the pool.
        pool, waiting: samples in the pool by their places, and those that wait, in the order they came.
        usual: most samples that a shard had so far; what one counts as that cannot be read.
    """

    part: int = 0
    sample: int = 0
    drawn: int = 0
    pool: tuple[Identity, ...] = ()
    waiting: tuple[Identity, ...] = ()
    usual: int = 1


@dataclass(frozen=True)
class _Item:
    """A sample in memory."""

    identity: Identity
    sample: StreamSample
    bucket: Bucket
    subset: int
    epoch: int


@dataclass
class StreamBatch:
    """What `next_batch` gives: samples of one bucket, and what could not be used on the way to them.

    Attributes:
        epoch: the pass that its first sample is of.
        lost: how many samples could not be used.
    """

    samples: list[Sample]
    epoch: int
    bad: list[Bad]
    lost: int


class StreamReader:
    """One reader of a stream."""

    def __init__(self, layout: Layout, number: int, start: Position = Position()) -> None:
        """Goes on from a position.

        Raises:
            InputError: samples that were in memory there are no longer in their shards.
        """
        self._layout, self._number = layout, number
        self._part, self._sample, self._drawn, self._usual = start.part, start.sample, start.drawn, start.usual
        self._incoming: Iterator[StreamSample] | None = None
        self._bad: list[Bad] = []
        self._lost = self._empty = 0
        kept = self._read_again((*start.pool, *start.waiting))
        self._pool = [kept[identity] for identity in start.pool]
        self._waiting: dict[Bucket, list[_Item]] = {}
        for identity in start.waiting:
            self._waiting.setdefault(kept[identity].bucket, []).append(kept[identity])

    @property
    def position(self) -> Position:
        """Where it is."""
        waiting = tuple(item.identity for items in self._waiting.values() for item in items)
        pool = tuple(item.identity for item in self._pool)
        return Position(self._part, self._sample, self._drawn, pool, waiting, self._usual)

    def next_batch(self, prepare: Prepare) -> StreamBatch:
        """Read until a bucket has a batch, and prepare its samples; those that cannot be are left out, and read on.

        Raises:
            InputError: nothing can be read any more.
        """
        while True:
            item = self._leaving_pool()
            items = self._waiting.setdefault(item.bucket, [])
            items.append(item)
            if len(items) < self._layout.batch_size:
                continue
            del self._waiting[item.bucket]
            samples, good = [], []
            for place, item in enumerate(items):
                try:
                    samples.append(prepare(item.sample, item.bucket, item.subset, item.epoch, place))
                    good.append(item)
                except SampleError as error:
                    self._reject(item.sample.name, str(error))
            if len(good) == len(items):
                bad, lost, self._bad, self._lost = self._bad, self._lost, [], 0
                return StreamBatch(samples, items[0].epoch, bad, lost)
            if good:
                self._waiting[item.bucket] = good

    def _leaving_pool(self) -> _Item:
        """The next sample that leaves the pool for one that comes in."""
        while True:
            item = self._next_item()
            if len(self._pool) < self._layout.pool_of_reader:
                self._pool.append(item)
                continue
            rng = generator(self._layout.seed, Stream.ORDER, self._number, self._drawn)
            place = int(rng.integers(len(self._pool)))
            self._drawn += 1
            leaving, self._pool[place] = self._pool[place], item
            return leaving

    def _next_item(self) -> _Item:
        """The next sample that can be used, of this part or of a later one."""
        while True:
            part = self._layout.part(self._number, self._part)
            if self._incoming is None:
                self._incoming = self._samples(part)
            for sample in self._incoming:
                if sample.number < self._sample or not part.has(sample.number):
                    continue
                self._sample = sample.number + 1
                for name, reason in sample.beside:
                    self._reject(name, reason)
                if sample.bad:
                    self._reject(sample.name, sample.bad, sample.lost)
                    continue
                self._empty = 0
                return self._item(self._part, part, sample)
            self._empty += 1
            self._stop_if_empty(part)
            self._usual = max(self._usual, self._sample)
            self._part, self._sample, self._incoming = self._part + 1, 0, None

    def _samples(self, part: Part) -> Iterator[StreamSample]:
        """The samples of a part's shard; where it cannot be read further, that is noted and they end."""
        shard, number = part.shard, 0
        try:
            for sample in shard_samples(shard.address, self._layout.subsets[shard.subset], self._layout.patience):
                number = sample.number + 1
                yield sample
        except TornTarError as error:
            lost = 1 if shard.samples is None else max(1, (shard.samples - number) // part.shares)
            self._reject(shown_address(shard.address), f"{error}; the {number} samples before are used", lost)
        except ShardError as error:
            usual = self._usual if shard.samples is None else shard.samples
            lost = max(1, (usual - number) // part.shares)
            self._reject(shown_address(shard.address), f"given up after {number} samples: {error}", lost)

    def _item(self, number: int, part: Part, sample: StreamSample) -> _Item:
        bucket = self._layout.bucket(part.shard.subset, sample.size_px)
        return _Item((number, sample.number), sample, bucket, part.shard.subset, part.epoch)

    def _reject(self, name: str, reason: str, lost: int = 1) -> None:
        self._bad.append((name, reason))
        self._lost += lost

    def _stop_if_empty(self, part: Part) -> None:
        if self._empty < _MOST_EMPTY * part.shares:
            return
        some, place = "; ".join(": ".join(entry) for entry in self._bad[-3:]), shown_address(part.shard.address)
        raise InputError(
            f"--train_data_dir {place}: no image to train on in the last {self._empty} shards. "
            f"{some or 'They are empty'}. Mend the server or the address, then go on from the last training state."
        )

    def _read_again(self, identities: Sequence[Identity]) -> dict[Identity, _Item]:
        """The samples that were in memory at a position, out of their shards."""
        wanted: dict[int, set[int]] = {}
        for number, sample_number in identities:
            wanted.setdefault(number, set()).add(sample_number)
        found: dict[Identity, _Item] = {}
        for number, numbers in sorted(wanted.items()):
            part = self._layout.part(self._number, number)
            samples = self._samples(part)
            missing = set(numbers)
            while missing and (sample := next(samples, None)) is not None:
                if sample.number in missing and not sample.bad:
                    found[number, sample.number] = self._item(number, part, sample)
                    missing.discard(sample.number)
            if missing:
                said, place = f" ({self._bad[-1][1]})" if self._bad else "", shown_address(part.shard.address)
                raise InputError(
                    f"--resume: {place} has no longer the samples that it had{said}, so this state "
                    "cannot be gone on from. Mend the shard, or start anew."
                )
            if number == self._part:
                self._incoming = samples
            else:
                samples.close()  # type: ignore[attr-defined]
        self._bad, self._lost = [], 0
        return found
