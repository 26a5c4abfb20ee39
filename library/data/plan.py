"""Who sees what when: the rows of every global batch, as a pure function of the seed and the step.

Each bucket has an endless sequence of its samples: one pass in a keyed random order, then a pass in another, and so on.
Its batches are that sequence cut into pieces of the global batch size, so every batch is full and of one bucket, and
every sample comes once a pass. An epoch takes of each bucket the batches that end within that many passes: what does
not fill a batch goes to the next epoch. The batches of an epoch come in a keyed random order over all buckets.
"""

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np

from library.data.permutation import ROUNDS, permute
from library.errors import InputError
from library.keyed_random import Stream, generator


@dataclass(frozen=True)
class Batch:
    """One global batch.

    Attributes:
        rows_G: (global batch,) int64 rows of the index.
        bucket: that all of them are in.
        epoch: from 0.
    """

    rows_G: np.ndarray
    bucket: int
    epoch: int


class Plan:
    """The order of all samples for one seed and one size of the global batch; ranks and workers do not enter it."""

    def __init__(self, bucket_of_row: np.ndarray, repeats: np.ndarray | int, seed: int, global_batch: int) -> None:
        """
        Args:
            bucket_of_row: (rows,) whole numbers from 0.
            repeats: how often a pass shows each row, at least once; one number, or one a row.
            seed: 0 <= seed < 2**64.
            global_batch: samples in a step: batch size × ranks × accumulation.

        Raises:
            InputError: the set is too small for one batch.
        """
        self.seed = seed
        self.global_batch = global_batch
        order = np.argsort(bucket_of_row, kind="stable")
        rows_in_bucket_K = np.bincount(bucket_of_row)
        spans = list(pairwise([0, *np.cumsum(rows_in_bucket_K)]))
        repeats_N = np.broadcast_to(np.asarray(repeats, np.int64), len(bucket_of_row))[order]
        self._rows = [order[start:end] for start, end in spans]
        # Where each row's repeats end in its bucket's pass; None where all are shown once.
        self._ends: list[np.ndarray] | None = None
        self.samples_K = rows_in_bucket_K
        if not (repeats_N == 1).all():
            self._ends = [np.cumsum(repeats_N[start:end]) for start, end in spans]
            self.samples_K = np.array([repeats_N[start:end].sum() for start, end in spans])
        self._check_size()

    def steps_before_epoch(self, epoch: int) -> int:
        """Steps in the epochs 0 … epoch-1."""
        return int(self._batches_before(epoch).sum())

    def epoch_of_step(self, step: int) -> int:
        """The epoch that a step belongs to."""
        samples = int(self.samples_K.sum())
        low, high = 0, (step + 1 + len(self.samples_K)) * self.global_batch // samples + 1
        while low < high:  # the first epoch that ends after the step
            middle = (low + high) // 2
            if self.steps_before_epoch(middle + 1) > step:
                high = middle
            else:
                low = middle + 1
        return low

    def batch(self, step: int) -> np.ndarray:
        """(global batch,) int64: the rows of the global batch of a step."""
        return self.batch_of_step(step).rows_G

    def batch_of_step(self, step: int) -> Batch:
        """The global batch of a step, with its bucket and epoch."""
        epoch = self.epoch_of_step(step)
        before_K, after_K = self._batches_before(epoch), self._batches_before(epoch + 1)
        ends_K = np.cumsum(after_K - before_K)
        place = np.array([step - int(before_K.sum())])
        drawn = int(permute(place, int(ends_K[-1]), self._keys(epoch, 0))[0])
        bucket = int(np.searchsorted(ends_K, drawn, side="right"))
        number = int(after_K[bucket]) - (int(ends_K[bucket]) - drawn)
        return Batch(self._samples(bucket, number), bucket, epoch)

    def rows_of_bucket(self, bucket: int) -> np.ndarray:
        """All rows of a bucket, ascending."""
        return self._rows[bucket]

    def batches_in_epoch(self, epoch: int) -> np.ndarray:
        """(buckets,) int64: how many batches of each bucket an epoch has."""
        return self._batches_before(epoch + 1) - self._batches_before(epoch)

    def left_over(self, epoch: int) -> np.ndarray:
        """(buckets,) int64: samples that go over to the next epoch, since they do not fill a batch."""
        return (epoch + 1) * self.samples_K - self._batches_before(epoch + 1) * self.global_batch

    def _batches_before(self, epoch: int) -> np.ndarray:
        """(buckets,) int64: batches of each bucket in the epochs 0 … epoch-1."""
        return epoch * self.samples_K // self.global_batch

    def _samples(self, bucket: int, number: int) -> np.ndarray:
        """Rows of batch `number` in a bucket's endless sequence."""
        n = int(self.samples_K[bucket])
        first = number * self.global_batch
        rows_G = np.empty(self.global_batch, np.int64)
        done = 0
        while done < self.global_batch:  # a batch may reach over several passes
            passed, start = divmod(first + done, n)
            count = min(n - start, self.global_batch - done)
            places = permute(np.arange(start, start + count), n, self._keys(passed, bucket + 1))
            if self._ends is not None:
                places = np.searchsorted(self._ends[bucket], places, side="right")
            rows_G[done : done + count] = self._rows[bucket][places]
            done += count
        return rows_G

    def _keys(self, epoch: int, of: int) -> np.ndarray:
        return _round_keys(self.seed, epoch, of)

    def _check_size(self) -> None:
        samples = int(self.samples_K.sum())
        fixes = (
            "Ways out: a smaller --train_batch_size; fewer --gradient_accumulation_steps; fewer devices; more images; "
            "more repeats (sub-directories named 'N_class words')"
        )
        if samples < self.global_batch:
            raise InputError(
                f"--train_data_dir: {samples} images (repeats counted) are too few for one batch of "
                f"{self.global_batch} (batch size × devices × accumulation). {fixes}."
            )
        if not self.steps_before_epoch(1):
            raise InputError(
                f"--train_data_dir: {samples} images (repeats counted) lie in {np.count_nonzero(self.samples_K)} "
                f"buckets, of which the largest has {int(self.samples_K.max())}. A batch is of one bucket, and none "
                f"fills one of {self.global_batch} (batch size × devices × accumulation). {fixes}; fewer buckets (a "
                "larger --bucket_reso_steps, a smaller --max_bucket_reso); or no --enable_bucket."
            )


@lru_cache(maxsize=4096)
def _round_keys(seed: int, epoch: int, of: int) -> np.ndarray:
    """Keys of a permutation: of = 0: the order of an epoch's batches; bucket + 1: that of a pass over a bucket."""
    return generator(seed, Stream.ORDER, epoch, of).integers(0, 2**64, ROUNDS, np.uint64)
