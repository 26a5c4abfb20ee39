"""Micro-batches of one rank in the plan's order, out of an index; for a bad sample another of its subset and bucket."""

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from library.data.bad_samples import SampleError
from library.data.cache.entries import NO_CACHES, Caches, digest_bytes
from library.data.index.table import Index
from library.data.loader import Loader
from library.data.micro_batch import MicroBatch, Share, Tokenize, micro_batch
from library.data.order.bucket_rows import Buckets
from library.data.order.held_out import ValidationPlan
from library.data.order.permutation import ROUNDS, permute
from library.data.order.plan import BucketImages, Plan
from library.data.order.row_fit import row_fit
from library.data.sample.prepare import Place, Sample, Treatment, prepare_cached, prepare_sample
from library.data.sample.reader import Reader
from library.errors import InputError
from library.keyed_random import Stream, generator
from library.models.text import TextStates

MAX_REPLACEMENTS = 16  # samples tried at one place before the data set is called broken


class MicroBatchDataset(Dataset):
    """Item i is micro-batch i % accumulation of step i // accumulation: a pure function, so any worker can make it."""

    def __init__(
        self,
        index: Index,
        buckets: Buckets,
        plan: Plan | ValidationPlan,
        share: Share,
        treatments: Sequence[Treatment],
        tokenize: Tokenize | None = None,
        caches: Caches = NO_CACHES,
    ) -> None:
        planned, shared = (plan.batch_size, plan.micro_batches), (share.batch_size, share.micro_batches)
        if planned != shared:
            raise ValueError(f"the plan's batch size and micro-batches a step are {planned}, the share's {shared}")
        self._reader = Reader(index)
        self._index, self._buckets, self._plan, self._share = index, buckets, plan, share
        self._treatments, self._tokenize, self._caches = treatments, tokenize, caches

    def __getitem__(self, item: int) -> MicroBatch:
        """One micro-batch.

        Raises:
            InputError: no readable sample is found for a place.
        """
        step, micro = divmod(item, self._share.accumulation)
        places = self._share.places(micro)
        batch = self._plan.micro_batch(step, self._share.number(micro))
        samples: list[Sample] = []
        quarantined: list[tuple[str, str]] = []
        replaced = 0
        for place, row in zip(places.tolist(), batch.rows_B.tolist(), strict=True):
            listed = len(quarantined)
            at = Place(self._plan.seed, step, place, batch.epoch)
            samples.append(self._readable(row, batch.bucket, at, quarantined))
            replaced += len(quarantined) > listed
        made = micro_batch(
            samples,
            step,
            micro,
            places,
            None if self._caches.text is not None else self._tokenize,
            quarantined,
            replaced,
        )
        made.moments = _stacked([sample.moments for sample in samples])
        text = _stacked([sample.text for sample in samples])
        made.text = TextStates(*text) if text is not None else None
        return made

    def _readable(self, row: int, bucket: int, at: Place, quarantined: list[tuple[str, str]]) -> Sample:
        """The planned sample, or the first that can be read of its subset's in the bucket.

        Those come in an order keyed by step and place.
        """
        failed: list[tuple[str, str]] = []
        for candidate in self._candidates(row, bucket, at):
            try:
                sample = self._sample(candidate, bucket, at)
            except SampleError as error:
                failed.append((self._index.name(candidate), str(error)))
                continue
            quarantined += failed
            return sample
        width, height = self._buckets.size(bucket)
        listed = "; ".join(f"{name}: {reason}" for name, reason in failed[:3])
        subset = self._index.subsets[self._index.source(row).subset]
        no_others = " (there are no others)" if len(failed) >= len(self._alike(row, bucket)) else ""
        raise InputError(
            f"{subset}: {len(failed)} samples of bucket {width}×{height}, tried one after the "
            f"other for step {at.step}{no_others}, cannot be read, so this data set is damaged or gone; images of "
            f"another one do not stand for its. The first: {listed}"
        )

    def _alike(self, row: int, bucket: int) -> BucketImages:
        """All rows of the same subset in a bucket."""
        return self._plan.rows_of_bucket(bucket, self._index.sources_of(self._index.source(row).subset))

    def _candidates(self, row: int, bucket: int, at: Place) -> Iterator[int]:
        """The planned row, then others like it; those are only looked for when they are asked for."""
        yield row
        rows = self._alike(row, bucket)
        keys = generator(at.seed, Stream.REPLACEMENT, at.step, at.place).integers(0, 2**64, ROUNDS, np.uint64)
        order = permute(np.arange(min(MAX_REPLACEMENTS, len(rows))), len(rows), keys)
        yield from (int(other) for other in rows[order] if other != row)

    def _sample(self, row: int, bucket: int, at: Place) -> Sample:
        """Read, decode and caption one row.

        Raises:
            SampleError: it cannot be read or decoded.
        """
        text = self._reader.caption(row)
        treatment = self._treatments[self._index.source(row).subset]
        name, size = self._index.name(row), self._buckets.size(bucket)
        fit = partial(row_fit, self._index, self._buckets, row, bucket)
        extras = self._reader.extras(row)
        if self._caches.latents is None:
            sample = prepare_sample(name, self._reader.image(row), text, treatment, size, fit, at, extras)
        else:
            encoded = self._caches.latents.read(row).variant
            sample = prepare_cached(name, encoded, text, treatment, size, fit, at, extras)
        if self._caches.text is not None:
            entry = self._caches.text.read(row, empty=not sample.caption)
            if entry.made.content not in ("", digest_bytes(sample.caption.encode())):
                raise SampleError("its caption has changed since it was encoded; a new start encodes it anew")
            sample = replace(sample, text=entry.tensors)
        return sample


def _stacked(entries: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """Each tensor of the entries with those of the others, batch first; None where there are none."""
    found = [entry for entry in entries if entry is not None]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)) if found else None


def make_loader(
    index: Index,
    buckets: Buckets,
    plan: Plan,
    share: Share,
    treatments: Sequence[Treatment],
    *,
    end_step: int,
    start_step: int = 0,
    tokenize: Tokenize | None = None,
    workers: int = 0,
    caches: Caches = NO_CACHES,
) -> Loader:
    """The micro-batches of one process.

    Args:
        plan: its batch size and micro-batches a step must be the share's.
        treatments: one for each subset of the index.
        end_step: the first step that is not loaded any more.
        tokenize: captions to the token ids of each text encoder; called in the workers.
        workers: processes that read and decode; 0 does it in this one.
        caches: what is read in place of images and captions.
    """
    dataset = MicroBatchDataset(index, buckets, plan, share, treatments, tokenize, caches)
    return Loader(dataset, share.accumulation, start_step, end_step, workers)
