"""Micro-batches of one rank in the plan's order, read and decoded by worker processes.

B: samples of a micro-batch. H, W: rows and columns of the bucket in px. K: chunks of a tokenised caption.

A global batch of `batch size × ranks × accumulation` places is dealt out so that micro-batch m of rank r has the places
m·b·n + r·b … + b (b: batch size, n: ranks). What stands at a place is a function of (seed, step, place) alone: the
number of ranks, accumulation and workers only says who computes it.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from library.data.cache.entries import MEND_CACHE, NO_CACHES, Caches, DamagedEntryError
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets
from library.data.order.held_out import ValidationPlan
from library.data.order.permutation import ROUNDS, permute
from library.data.order.plan import Plan
from library.data.sample.decode import Fit, SampleError
from library.data.sample.prepare import Place, Sample, Treatment, prepare_cached, prepare_sample
from library.data.sample.reader import Reader
from library.errors import InputError, TrainingError
from library.keyed_random import Stream, generator
from library.signals import leave_signals_to_parent

MAX_REPLACEMENTS = 16  # samples tried at one place before the data set is called broken
_ASPECT_TOLERANCE = 0.03  # a third to a half of the way from one SDXL bucket to the next
_PREFETCH = 2  # micro-batches that each worker keeps ready
_LESS_MEMORY = (
    "Memory may have run out: use fewer --max_data_loader_n_workers or a smaller --train_batch_size, then go on "
    "from the last training state (--resume=auto)."
)

Tokenize = Callable[[Sequence[str]], tuple[Tensor, ...]]


@dataclass
class MicroBatch:
    """Samples of one bucket that go through the model together.

    Attributes:
        images_BHWC: uint8 RGB; none of cached latents.
        captions: as trained.
        size_ids_B6: float32 original height and width, crop top and left, target height and width, in px.
        names: where the samples come from.
        step: of the optimizer, from 0.
        micro: number of this micro-batch in its step.
        places_B: int64 places in the global batch.
        ids: int64 (B, K, 77) token ids, one tensor a text encoder, and behind them, where captions have weights, as
            many of float32 weights; none without a tokenizer or of cached text.
        quarantined: (name, reason) of samples that could not be used, replacements that could not either among them.
        replaced: places where another sample than the planned one stands; of a stream, samples lost on the way.
        loss_weights_B: float32, what the samples' losses are multiplied by; without it 1.
        mirrored: of each sample, whether left and right are exchanged.
        masks_BHW: uint8 weights of the loss; None: all of it counts.
        moments: of cached latents: mean and standard deviation, each (B, channels, rows, columns).
        text: of cached text: what the text encoders gave, one tensor each with B first.
        reader: of a stream: the number of the reader that it comes from, and where that is after it.
        epoch: of a stream: the pass that it is of, from 0.
    """

    images_BHWC: Tensor | None
    captions: list[str]
    size_ids_B6: Tensor
    names: list[str]
    step: int
    micro: int
    places_B: Tensor
    ids: tuple[Tensor, ...] = ()
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    replaced: int = 0
    loss_weights_B: Tensor = field(default_factory=lambda: torch.ones(()))
    mirrored: list[bool] = field(default_factory=list)
    masks_BHW: Tensor | None = None
    moments: tuple[Tensor, ...] | None = None
    text: tuple[Tensor, ...] | None = None
    reader: tuple[int, Any] | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.names)


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a process computes."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    @property
    def global_batch(self) -> int:
        """Samples of one step over all processes."""
        return self.batch_size * self.world_size * self.accumulation

    def of_one_process(self) -> "Share":
        """The same global batches, all of them for one process."""
        return Share(self.batch_size, accumulation=self.world_size * self.accumulation)

    def places(self, micro: int) -> np.ndarray:
        """(batch size,) int64: places in the global batch of this process's micro-batch number `micro`."""
        start = (micro * self.world_size + self.rank) * self.batch_size
        return np.arange(start, start + self.batch_size)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker process to the user, without the worker's traceback."""

    error: InputError | TrainingError


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
        if plan.global_batch != share.global_batch:
            raise ValueError(f"the plan's global batch is {plan.global_batch}, the share's {share.global_batch}")
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
        batch = self._plan.batch_of_step(step, places)
        samples: list[Sample] = []
        quarantined: list[tuple[str, str]] = []
        replaced = 0
        for place, row in zip(places.tolist(), batch.rows_G.tolist(), strict=True):
            listed = len(quarantined)
            at = Place(self._plan.seed, step, place, batch.epoch)
            samples.append(self._readable(row, batch.bucket, at, quarantined))
            replaced += len(quarantined) > listed
        masked = any(treatment.images.alpha_mask for treatment in self._treatments)
        made = micro_batch(
            samples,
            step,
            micro,
            places,
            None if self._caches.text is not None else self._tokenize,
            quarantined,
            replaced,
            masked,
        )
        made.moments = _stacked([sample.moments for sample in samples])
        made.text = _stacked([sample.text for sample in samples])
        return made

    def _readable(self, row: int, bucket: int, at: Place, quarantined: list[tuple[str, str]]) -> Sample:
        """The planned sample, or the first that can be read in an order of its bucket keyed by step and place."""
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
        raise InputError(
            f"--train_data_dir: {len(failed)} samples of bucket {width}×{height}, tried one after the other for step "
            f"{at.step}, cannot be read, so the data set is damaged or gone. The first: {listed}"
        )

    def _candidates(self, row: int, bucket: int, at: Place) -> Iterator[int]:
        """The planned row, then others of its bucket; those are only thought up when asked for."""
        yield row
        rows = self._plan.rows_of_bucket(bucket)
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
        name = self._index.name(row)
        if self._caches.latents is None:
            fit = partial(row_fit, self._index, self._buckets, row, bucket)
            image = self._reader.image(row)
            sample = prepare_sample(name, image, text, treatment, self._buckets.size(bucket), fit, at)
        else:
            sample = prepare_cached(name, self._caches.latents.read(row), text, treatment, at)
        if self._caches.text is not None:
            sample = replace(sample, text=self._caches.text.read(row, empty=not sample.caption).tensors)
        return sample


def row_fit(index: Index, buckets: Buckets, row: int, bucket: int, width: int, height: int) -> Fit:
    """How an image of that size meets its bucket, for which its row was chosen by the size that the index has.

    Raises:
        SampleError: that size was wrong, and the bucket does not suit the image.
    """
    record = index.record(row)
    told_w, told_h = int(record["width"]), int(record["height"])
    options = buckets.options_of(bucket)
    if (width, height) != (told_w, told_h) and options.enable_bucket:
        said = f"{width}×{height} px, but by its shard's parquet or JSON {told_w}×{told_h}: "
        if not 1 - _ASPECT_TOLERANCE < width * told_h / (height * told_w) < 1 + _ASPECT_TOLERANCE:
            raise SampleError(f"{said}another aspect ratio than its bucket was chosen for")
        bucket_w, bucket_h = buckets.size(bucket)
        if options.bucket_no_upscale and (width < bucket_w or height < bucket_h):
            raise SampleError(f"{said}less than its bucket, and --bucket_no_upscale enlarges nothing")
    return buckets.fit(bucket, width, height)


def _pixels(samples: Sequence[Sample]) -> Tensor | None:
    """(B, rows, columns, 3) uint8, in that order in memory whatever that of the decoders' arrays; None of latents."""
    images = [sample.pixels_HWC for sample in samples if sample.pixels_HWC is not None]
    if not images:
        return None
    return torch.from_numpy(np.stack(images, out=np.empty((len(images), *images[0].shape), np.uint8)))


def _masks(samples: Sequence[Sample]) -> Tensor:
    """(B, rows, columns) uint8; all of a sample without a mask counts."""
    _, _, _, _, height, width = samples[0].size_ids
    masks_BHW = np.full((len(samples), int(height), int(width)), 255, np.uint8)
    for number, sample in enumerate(samples):
        if sample.mask_HW is not None:
            masks_BHW[number] = sample.mask_HW
    return torch.from_numpy(masks_BHW)


def _stacked(entries: Sequence[tuple[Tensor, ...] | None]) -> tuple[Tensor, ...] | None:
    """Each tensor of the entries with those of the others, batch first; None where there are none."""
    found = [entry for entry in entries if entry is not None]
    return tuple(torch.stack(parts) for parts in zip(*found, strict=True)) if found else None


def micro_batch(
    samples: Sequence[Sample],
    step: int,
    micro: int,
    places_B: np.ndarray,
    tokenize: Tokenize | None,
    quarantined: list[tuple[str, str]],
    replaced: int,
    masked: bool,
) -> MicroBatch:
    """Samples of one bucket put together, wherever they come from; the arguments are as MicroBatch has them.

    Args:
        masked: some treatment of the run makes masks.
    """
    captions = [sample.caption for sample in samples]
    return MicroBatch(
        _pixels(samples),
        captions,
        torch.tensor([sample.size_ids for sample in samples], dtype=torch.float32),
        [sample.name for sample in samples],
        step,
        micro,
        torch.from_numpy(places_B),
        () if tokenize is None else tokenize(captions),
        quarantined,
        replaced,
        torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32),
        [sample.mirrored for sample in samples],
        _masks(samples) if masked else None,
    )


class _Reporting(Dataset):
    """A dataset whose errors are values, since a DataLoader hands on exceptions as tracebacks."""

    def __init__(self, inner: Dataset) -> None:
        self._inner = inner

    def __getitem__(self, item: int) -> MicroBatch | _Failure:
        try:
            return self._inner[item]
        except InputError as error:
            return _Failure(error)
        except DamagedEntryError as error:
            return _Failure(InputError(f"{error}. {MEND_CACHE}"))
        except MemoryError as error:
            reason = f"no memory left to read and decode images ({error or 'MemoryError'}). {_LESS_MEMORY}"
            return _Failure(TrainingError(reason))


@contextmanager
def worker_deaths_reported() -> Iterator[None]:
    """Around all that goes on while a loader is read: a worker's death interrupts the main thread wherever it is.

    Raises:
        TrainingError: a worker process has died; in place of torch's RuntimeError, raised in its SIGCHLD handler.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if not reason.startswith("DataLoader worker"):
            raise
        raise TrainingError(f"a process that reads the data has died: {reason} {_LESS_MEMORY}") from error


def _leave_signals_to_the_main_process(worker: int) -> None:
    leave_signals_to_parent()


@dataclass(frozen=True)
class Loader:
    """An iterable of the micro-batches of the steps start_step … end_step - 1, in order; each stride-th of them.

    Attributes:
        dataset: item i is micro-batch i % accumulation of step i // accumulation.
        handed_over: called with each micro-batch, in this process, before it is yielded.
    """

    dataset: Dataset
    accumulation: int
    start_step: int
    end_step: int
    workers: int
    handed_over: Callable[[MicroBatch], None] = lambda batch: None
    stride: int = 1

    def __len__(self) -> int:
        return len(self._items)

    @property
    def _items(self) -> range:
        return range(self.start_step * self.accumulation, self.end_step * self.accumulation, self.stride)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Read ahead and yield.

        Raises:
            InputError: no readable sample is found for a place.
        """
        workers = min(self.workers, len(self))
        loader = DataLoader(
            _Reporting(self.dataset),
            batch_size=None,  # the dataset's items are batches already
            sampler=self._items,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # or it would take its seed from torch's own numbers, and change them
        )
        for item in loader:
            if isinstance(item, _Failure):
                raise item.error
            self.handed_over(item)
            yield item


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
        plan: its global batch must be the share's.
        treatments: one for each subset of the index.
        end_step: the first step that is not loaded any more.
        tokenize: captions to the token ids of each text encoder; called in the workers.
        workers: processes that read and decode; 0 does it in this one.
        caches: what is read in place of images and captions.
    """
    dataset = MicroBatchDataset(index, buckets, plan, share, treatments, tokenize, caches)
    return Loader(dataset, share.accumulation, start_step, end_step, workers)
