"""Images that are held out from training, to measure the loss on: which ones, and in which batches they come.

S: sources of the index. K: buckets of the run.
"""

import zlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from library.data.index.table import Index
from library.data.order.permutation import ROUNDS, permute
from library.data.order.plan import Batch, BucketedRows, BucketImages
from library.errors import InputError
from library.keyed_random import Stream, generator


@dataclass(frozen=True)
class Split:
    """Which share of a subset's images is held out, and the seed that chooses them."""

    share: float
    seed: int


@dataclass(frozen=True)
class Choice:
    """How many images of a source are held out; the source's name in its data, its share and the seed choose which."""

    count: int
    seed: int
    name: str
    share: int

    def rows(self, of: int) -> np.ndarray:
        """(of,) bool: the rows of the source that are held out."""
        rng = generator(
            self.seed, Stream.VALIDATION, zlib.crc32(self.name.encode("utf-8", "surrogateescape")), self.share
        )
        held = np.zeros(of, bool)
        held[rng.permutation(of)[: self.count]] = True
        return held


def choices(index: Index, splits: Sequence[Split]) -> list[Choice | None]:
    """For each source what is held out of it, None for nothing.

    A subset's share is exact but for rounding, and spread over its sources; neither other subsets nor buckets, captions
    or the number of processes change the choice.

    Args:
        splits: of each subset.

    Raises:
        InputError: a share comes to no image.
    """
    found: list[Choice | None] = []
    images_S = np.diff(index.starts_S)
    done = [0] * len(splits)
    held = [0] * len(splits)
    for source, images in zip(index.sources, images_S.tolist(), strict=True):
        split, number = splits[source.subset], source.subset
        done[number] += images
        count = int(done[number] * split.share + 0.5) - held[number]
        held[number] += count
        name = str(source.path.relative_to(index.subsets[number].path))
        found.append(Choice(count, split.seed, name, source.share[0]) if count else None)
    for subset, split, images, count in zip(index.subsets, splits, done, held, strict=True):
        if split.share and not count:
            raise InputError(f"{subset}: --validation_split={split.share:g} of {images} images is none; raise it.")
    return found


class ValidationPlan:
    """Batches of the images that are held out, each image once; the last of a bucket is filled up with earlier ones.

    The order is keyed, so that the first batches are a sample of all. Processes take turns.
    """

    def __init__(self, rows: BucketedRows, seed: int, batch_size: int, most_batches: int | None = None) -> None:
        """
        Args:
            rows: those that are held out.
            most_batches: leave it at so many; None: all.
        """
        self.seed, self.batch_size, self._rows = seed, batch_size, rows
        self.micro_batches = 1
        self.images_K = rows.images_SK.sum(axis=0, dtype=np.int64)
        self._ends_K = np.cumsum(-(-self.images_K // batch_size))
        self._all = int(self._ends_K[-1])
        self.batches = min(self._all, most_batches or self._all)

    def micro_batch(self, step: int, number: int = 0) -> Batch:
        """The rows of one batch; of those beyond the last one the last one's."""
        bucket, first = self._bucket_and_first(step)
        rows_B = self.rows_of_bucket(bucket)[(first + np.arange(self.batch_size)) % self.images_K[bucket]]
        return Batch(rows_B, bucket, 0)

    def rows_of_bucket(self, bucket: int) -> BucketImages:
        """All rows of a bucket that are held out."""
        return BucketImages(self._rows, bucket)

    def numbers(self, step: int) -> range:
        """What numbers the images of a batch have among all that are held out; none beyond the last batch.

        The first so many places of a batch count, the others fill it up.
        """
        bucket, first = self._bucket_and_first(step)
        before = int(self.images_K[:bucket].sum())
        size = min(self.batch_size, int(self.images_K[bucket]) - first) if step < self.batches else 0
        return range(before + first, before + first + size)

    def _bucket_and_first(self, step: int) -> tuple[int, int]:
        keys = generator(self.seed, Stream.VALIDATION_ORDER).integers(0, 2**64, ROUNDS, np.uint64)
        drawn = int(permute(np.array([min(step, self.batches - 1)]), self._all, keys)[0])
        bucket = int(np.searchsorted(self._ends_K, drawn, side="right"))
        before = int(self._ends_K[bucket - 1]) if bucket else 0
        return bucket, (drawn - before) * self.batch_size
