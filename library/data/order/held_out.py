"""Images that are held out from training, to measure the loss on: which ones, and in which batches they come.

S: sources of the index. K: buckets of the run.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from hashlib import blake2b

import numpy as np

from library.data.index.table import Index
from library.data.order.permutation import ROUNDS, permute
from library.data.order.plan import Batch, BucketedRows, BucketImages
from library.errors import InputError
from library.keyed_random import Stream, generator

_HASH_BYTES = 8


@dataclass(frozen=True)
class Split:
    """Which share of a subset's images is held out, and the seed that chooses them."""

    share: float
    seed: int


@dataclass(frozen=True)
class Choice:
    """Which images of a source are held out: by a hash of each one's name, so that no other image matters.

    Attributes:
        share: how many of all are, on average.
        seed: of the hash.
        folder: what stands before an image's key in its name: the source's path in its data.
    """

    share: float
    seed: int
    folder: str

    def holds_out(self, keys: Sequence[bytes]) -> np.ndarray:
        """(keys,) bool: which images are held out, by their keys in the source (UTF-8)."""
        key = self.seed.to_bytes(8, "little")
        folder = self.folder.encode("utf-8", "surrogateescape")
        hashes = b"".join(blake2b(folder + name, digest_size=_HASH_BYTES, key=key).digest() for name in keys)
        # A product of two floats is near enough: of 2**64 hashes it misjudges 2**11 or so.
        return np.frombuffer(hashes, "<u8") < self.share * 2.0 ** (8 * _HASH_BYTES)


def choices(index: Index, splits: Sequence[Split]) -> list[Choice | None]:
    """For each source what is held out of it, None for nothing.

    An image is held out or not for its name's sake alone: its path in the subset's folder, behind that of its shard
    where it is in one. Neither other images nor subsets, buckets, captions or the number of processes change that.

    Args:
        splits: of each subset.
    """
    found: list[Choice | None] = []
    for source in index.sources:
        split, root = splits[source.subset], index.subsets[source.subset].path
        inside = source.path.relative_to(root).as_posix() if source.path != root else ""
        if source.is_shard:
            folder = f"{inside or source.path.name}:"
        else:
            folder = f"{inside}/" if inside else ""
        found.append(Choice(split.share, split.seed, folder) if split.share else None)
    return found


def check_choices(index: Index, splits: Sequence[Split], held_S: np.ndarray) -> None:
    """Refuse a share that comes to nothing.

    Args:
        splits: of each subset.
        held_S: (S,) images of each source that are held out.

    Raises:
        InputError: no image of a subset is.
    """
    of_sources = np.array([source.subset for source in index.sources])
    images_S = np.diff(index.starts_S)
    for number, (subset, split) in enumerate(zip(index.subsets, splits, strict=True)):
        if split.share and not held_S[of_sources == number].any():
            raise InputError(
                f"{subset}: --validation_split={split.share:g} of {images_S[of_sources == number].sum()} images is "
                "none; raise it, or choose others by another --validation_seed."
            )


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
        rows_B = self.rows_of_bucket(bucket, np.arange(len(self._rows.images_SK)))[
            (first + np.arange(self.batch_size)) % self.images_K[bucket]
        ]
        return Batch(rows_B, bucket, 0)

    def rows_of_bucket(self, bucket: int, sources: np.ndarray) -> BucketImages:
        """All rows that are held out of some sources, by their numbers, in a bucket."""
        return BucketImages(self._rows, bucket, sources)

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
