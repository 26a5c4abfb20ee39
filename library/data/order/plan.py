"""Who sees what when: the rows of every micro-batch, as a pure function of the seed and the step.

Each bucket has an endless sequence of its samples: one pass in a keyed random order, then a pass in another, and so on.
Its micro-batches are that sequence cut into pieces of the batch size, so every one is full and of one bucket, and every
sample comes once a pass. The run has one endless sequence of micro-batches: of each bucket those that end within the
first pass, in a keyed random order over all buckets, then those that end within the second, and so on. A step takes the
next ones of it, as many as there are processes times accumulation, and they may be of different buckets.

So nothing is lost, and full steps are all there is:
- Samples of a bucket that do not fill a micro-batch in a pass come first in the bucket's next micro-batch.
- Micro-batches that do not fill a step at the end of a pass come in a step together with the first of the next pass.
An epoch is the steps that end within that many passes; a step that reaches over two passes belongs to the later epoch.
After e epochs every sample has been shown e times, but for those that wait: fewer than a micro-batch in each bucket,
and fewer micro-batches than a step has. A run that ends there has shown these one time less.

The number of processes is no argument, only how many micro-batches all of them take in a step: process r of n takes
those numbered r, r + n, r + 2n ….

With windows, a pass goes through the sources (shards) in a keyed random order, so many at a time: the samples of one
window come, in a keyed random order, before those of the next, and so do the micro-batches that end in it. Without, all
sources are one window. Nothing here grows with the number of samples.

K: buckets. S: sources. W: windows.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np

from library.data.order.permutation import ROUNDS, permute
from library.errors import InputError
from library.keyed_random import Stream, generator


class BucketedRows(Protocol):
    """Which rows are in which bucket; `library.data.order.bucket_rows.Buckets` is one."""

    @property
    def images_SK(self) -> np.ndarray:
        """(S, K) whole numbers: images of each source in each bucket."""

    def rows(self, bucket: int, source: int, places_n: np.ndarray) -> np.ndarray:
        """Rows of the images of a bucket in one source, by their places among those."""


@dataclass(frozen=True)
class Batch:
    """The rows of one micro-batch.

    Attributes:
        rows_B: (batch size,) int64 rows of the index.
        bucket: that all of them are in.
        epoch: that its step belongs to, from 0.
    """

    rows_B: np.ndarray
    bucket: int
    epoch: int


@dataclass(frozen=True)
class BucketImages:
    """All rows that some sources have in a bucket, worked out when they are asked for."""

    rows: BucketedRows
    bucket: int
    sources: np.ndarray

    def __len__(self) -> int:
        return int(self.rows.images_SK[self.sources, self.bucket].sum(dtype=np.int64))

    def __getitem__(self, places_n: np.ndarray) -> np.ndarray:
        """Rows at some places, each in 0 … len - 1, in the order of the index."""
        images = self.rows.images_SK[self.sources, self.bucket].astype(np.int64)
        rows_n, _ = _located(self.rows, self.bucket, self.sources, images, np.asarray(places_n))
        return rows_n


def repeated(images_SK: np.ndarray, repeats_S: np.ndarray | int) -> np.ndarray:
    """(S, K) samples of a pass that shows each image of a source so often; the images' own array where that is once."""
    repeats = np.asarray(repeats_S, np.int64)
    return images_SK if (repeats == 1).all() else images_SK * np.expand_dims(repeats, -1)


class Plan:
    """The order of all samples for one seed, batch size and number of micro-batches a step.

    Which process computes a micro-batch, and whether side by side or one after the other, does not enter it.
    """

    def __init__(
        self,
        rows: BucketedRows,
        samples_SK: np.ndarray,
        seed: int,
        batch_size: int,
        micro_batches: int = 1,
        window_sources: int = 0,
    ) -> None:
        """
        Args:
            samples_SK: how many samples a pass takes of each source in each bucket, spread evenly over its images
                there: `repeated` makes them of repeats.
            seed: 0 <= seed < 2**64.
            batch_size: samples in a micro-batch.
            micro_batches: of a step, over all processes: processes × accumulation.
            window_sources: sources in a window; 0: all.

        Raises:
            InputError: the first epoch has not one whole step.
        """
        self.seed = seed
        self.batch_size, self.micro_batches = batch_size, micro_batches
        self._rows = rows
        sources = len(rows.images_SK)
        self.samples_SK = samples_SK
        self.window_sources = window_sources if 0 < window_sources < sources else sources
        self.samples_K = samples_SK.sum(axis=0, dtype=np.int64)
        self._passes: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        self._check_size()

    @property
    def source_count(self) -> int:
        """Sources of the data."""
        return len(self.samples_SK)

    @property
    def global_batch(self) -> int:
        """Samples of a step."""
        return self.batch_size * self.micro_batches

    def steps_before_epoch(self, epoch: int) -> int:
        """Steps in the epochs 0 … epoch-1."""
        return int(self._before(epoch).sum()) // self.micro_batches

    def epoch_of_step(self, step: int) -> int:
        """The epoch that a step belongs to: that of the pass which its last micro-batch ends."""
        return self._pass_of((step + 1) * self.micro_batches - 1)

    def micro_batch(self, step: int, number: int) -> Batch:
        """One of a step's micro-batches, numbered over all processes."""
        bucket, place = self._bucket_and_place(step * self.micro_batches + number)
        return Batch(self._samples(bucket, self._places(place))[0], bucket, self.epoch_of_step(step))

    def batch(self, step: int) -> np.ndarray:
        """(global batch,) int64: the rows of all micro-batches of a step, one after the other."""
        return np.concatenate([self.micro_batch(step, number).rows_B for number in range(self.micro_batches)])

    def sources_of_batch(self, step: int) -> np.ndarray:
        """(global batch,) int64: numbers of the sources that a step's samples come from."""
        sources = []
        for number in range(self.micro_batches):
            bucket, place = self._bucket_and_place(step * self.micro_batches + number)
            sources.append(self._samples(bucket, self._places(place), look_up=False)[1])
        return np.concatenate(sources)

    def rows_of_bucket(self, bucket: int, sources: np.ndarray) -> BucketImages:
        """All rows that some sources, by their numbers, have in a bucket, in the order of the index."""
        return BucketImages(self._rows, bucket, sources)

    def micro_batches_in_pass(self, number: int) -> np.ndarray:
        """(buckets,) int64: how many micro-batches of each bucket end within a pass."""
        return self._before(number + 1) - self._before(number)

    def left_over(self, epoch: int) -> np.ndarray:
        """(buckets,) int64: samples that do not fill a micro-batch by an epoch's end, and come in the next one."""
        return (epoch + 1) * self.samples_K - self._before(epoch + 1) * self.batch_size

    def carried_over(self, epoch: int) -> int:
        """Micro-batches that do not fill a step by an epoch's end, and come in the first step of the next one."""
        return int(self._before(epoch + 1).sum()) % self.micro_batches

    def _before(self, passes: int) -> np.ndarray:
        """(buckets,) int64: micro-batches of each bucket that end within so many passes."""
        return passes * self.samples_K // self.batch_size

    def _pass_of(self, micro_batch: int) -> int:
        """The pass within which a micro-batch of the run's sequence ends."""
        samples = int(self.samples_K.sum())
        # So many passes have at most passes · samples / batch size micro-batches, and less than one a bucket fewer.
        low = micro_batch * self.batch_size // samples
        high = (micro_batch + 1 + len(self.samples_K)) * self.batch_size // samples + 1
        while low < high:  # the first pass that ends after it
            middle = (low + high) // 2
            if int(self._before(middle + 1).sum()) > micro_batch:
                high = middle
            else:
                low = middle + 1
        return low

    def _places(self, place: int) -> np.ndarray:
        """Places in a bucket's sequence of samples of its micro-batch number `place`."""
        return place * self.batch_size + np.arange(self.batch_size)

    def _bucket_and_place(self, micro_batch: int) -> tuple[int, int]:
        """The bucket of a micro-batch of the run's sequence, and which micro-batch of the bucket's sequence it is."""
        passed = self._pass_of(micro_batch)
        before_K = self._before(passed)
        done_WK = (passed * self.samples_K + self._pass(passed)[1]) // self.batch_size  # when a window ends
        place = micro_batch - int(before_K.sum())
        ends_W = done_WK.sum(axis=1) - before_K.sum()
        window = int(np.searchsorted(ends_W, place, side="right"))
        first_K = done_WK[window - 1] if window else before_K
        ends_K = np.cumsum(done_WK[window] - first_K)
        in_window = np.array([place - (int(ends_W[window - 1]) if window else 0)])
        drawn = int(permute(in_window, int(ends_K[-1]), _round_keys(self.seed, passed, 0, window))[0])
        bucket = int(np.searchsorted(ends_K, drawn, side="right"))
        return bucket, int(done_WK[window, bucket]) - (int(ends_K[bucket]) - drawn)

    def _samples(self, bucket: int, places: np.ndarray, look_up: bool = True) -> tuple[np.ndarray, np.ndarray]:
        """Rows and sources at some places of a bucket's endless sequence; the rows only if they are looked up."""
        rows_n, sources_n = np.empty(len(places), np.int64), np.empty(len(places), np.int64)
        passed_n, start_n = np.divmod(places, int(self.samples_K[bucket]))
        for passed in np.unique(passed_n).tolist():  # a micro-batch may reach over several passes, and windows in them
            order_S, ends_WK = self._pass(passed)
            ends_W = ends_WK[:, bucket]
            window_n = np.where(passed_n == passed, np.searchsorted(ends_W, start_n, side="right"), -1)
            for window in np.unique(window_n[window_n >= 0]).tolist():
                here = window_n == window
                first = int(ends_W[window - 1]) if window else 0
                keys = _round_keys(self.seed, passed, bucket + 1, window)
                shuffled_n = permute(start_n[here] - first, int(ends_W[window]) - first, keys)
                span = slice(window * self.window_sources, (window + 1) * self.window_sources)
                sources = order_S[span]
                samples = self.samples_SK[sources, bucket].astype(np.int64)
                rows_n[here], sources_n[here] = _located(self._rows, bucket, sources, samples, shuffled_n, look_up)
        return rows_n, sources_n

    def _pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """(S,) the order of the sources in a pass, and (W, K) the samples of each bucket up to each window's end."""
        if number not in self._passes:
            while len(self._passes) > 2:
                del self._passes[next(iter(self._passes))]
            self._passes[number] = self._make_pass(number)
        return self._passes[number]

    def _make_pass(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        sources = self.source_count
        if self.window_sources == sources:
            return np.arange(sources), self.samples_K[None]
        keys = generator(self.seed, Stream.SOURCES, number).integers(0, 2**64, ROUNDS, np.uint64)
        order_S = permute(np.arange(sources), sources, keys)
        windows = [order_S[start : start + self.window_sources] for start in range(0, sources, self.window_sources)]
        return order_S, np.cumsum([self.samples_SK[window].sum(axis=0, dtype=np.int64) for window in windows], axis=0)

    def _check_size(self) -> None:
        samples = int(self.samples_K.sum())
        found = f"--train_data_dir or --dataset_config: {samples} images (repeats counted)"
        fixes = (
            "Ways out: a smaller --train_batch_size; fewer --gradient_accumulation_steps; fewer devices; more images; "
            "more repeats (sub-directories named 'N_class words', --dataset_repeats)"
        )
        if samples < self.global_batch:
            raise InputError(
                f"{found} are too few for one batch of {self.global_batch} (batch size × devices × accumulation). "
                f"{fixes}."
            )
        if not self.steps_before_epoch(1):
            raise InputError(
                f"{found} lie in {np.count_nonzero(self.samples_K)} buckets, of which the largest has "
                f"{int(self.samples_K.max())}. The images that go through the model together are of one bucket: these "
                f"fill {int(self._before(1).sum())} times the batch size, {self.batch_size}, and a step takes "
                f"{self.micro_batches} (devices × accumulation). {fixes}; fewer buckets (a larger "
                "--bucket_reso_steps, a smaller --max_bucket_reso); or no --enable_bucket."
            )


def _located(
    rows: BucketedRows,
    bucket: int,
    sources: np.ndarray,
    samples: np.ndarray,
    places_n: np.ndarray,
    look_up: bool = True,
) -> tuple[np.ndarray, np.ndarray]:
    """Rows and sources at some places of the samples of some sources laid end to end.

    Of a source's n samples over its m images in the bucket number i is the image i·m // n: each comes n / m times,
    rounded down or up, and one after the other.
    """
    ends = np.cumsum(samples)
    which_n = np.searchsorted(ends, places_n, side="right")
    images_n = rows.images_SK[sources[which_n], bucket].astype(np.int64)
    inside_n = (places_n - (ends - samples)[which_n]) * images_n // samples[which_n]
    rows_n = np.empty(len(places_n), np.int64)
    if look_up:
        for place in np.unique(which_n).tolist():
            here = which_n == place
            rows_n[here] = rows.rows(bucket, int(sources[place]), inside_n[here])
    return rows_n, sources[which_n]


@lru_cache(maxsize=4096)
def _round_keys(seed: int, passed: int, of: int, window: int) -> np.ndarray:
    """Keys of a permutation in a window of a pass: of = 0: its micro-batches; bucket + 1: a bucket's samples."""
    return generator(seed, Stream.ORDER, passed, of, window).integers(0, 2**64, ROUNDS, np.uint64)
