"""A run's data in one place: index, buckets and plan, and the loader over them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from library.data.bad_samples import check_left_out
from library.data.cache.entries import NO_CACHES, Caches
from library.data.index.extras import Extra
from library.data.index.hub import local_data
from library.data.index.kept_tables import digest
from library.data.index.sources import Subset
from library.data.index.table import Index, build_index
from library.data.indexed_batches import MicroBatchDataset, make_loader
from library.data.loader import Loader
from library.data.micro_batch import Share, Tokenize
from library.data.order.bucket_rows import Buckets, bucket_rows
from library.data.order.buckets import check_options
from library.data.order.held_out import Split, ValidationPlan, check_choices, choices
from library.data.order.plan import Plan, repeated
from library.data.order.regularisation import balanced, regularisation_lines
from library.data.report import caption_line, data_report
from library.data.sample.augmentation import ImageChanges, face_in
from library.data.sample.captions import CaptionChanges
from library.data.sample.extra_images import CONDITION, MASK
from library.data.sample.prepare import Treatment
from library.data.sample.scaling import FILTERS
from library.data.stream.streamed_set import is_streamed, prepare_stream
from library.data.training_set import TrainingSet
from library.errors import InputError
from library.options.buckets import BucketOptions
from library.options.data import DataOptions, SubsetOptions
from library.options.values import fill
from library.progress_bar import ProgressBar

logger = logging.getLogger(__name__)

_NAMES_LOOKED_AT = 1000  # of each subset, for faces


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, and in which order."""

    options: DataOptions
    index: Index
    buckets: Buckets
    plan: Plan
    share: Share
    caches: Caches = NO_CACHES

    def report(self) -> list[str]:
        """What was found and how it becomes batches."""
        first, second, *others = data_report(self.index, self.buckets, self.plan)
        images_SK, samples_SK, is_reg_S = self.buckets.images_SK, self.plan.samples_SK, self.is_reg_S
        reg = regularisation_lines(images_SK, samples_SK, is_reg_S, self.options.prior_loss_weight)
        held = int(self.buckets.held_SK.sum())
        validation = [f"{held} validation images, held out from training (--validation_split)"] if held else []
        extras = sorted({extra.name for subset in self.index.subsets for extra in subset.extras})
        with_extras = [f"extra images of each sample: {', '.join(extras)}"] if extras else []
        return [first, second, *with_extras, *reg, *validation, *others]

    def caption_lines(self, count_tokens: Callable[[Sequence[str]], list[int]], most_tokens: int) -> list[str]:
        """How many captions are cut off; see `library.data.report.caption_line`."""
        options = [_treatment(subset, 0, 1.0).captions for subset in self.options.subsets]
        return [caption_line(self.index, options, count_tokens, most_tokens)]

    @property
    def is_reg_S(self) -> np.ndarray:
        """(sources,) bool: which sources are of regularisation images."""
        return _of_sources(self.index, [subset.is_reg for subset in self.options.subsets])

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """Width and height in px of the bucket whose batches need the most memory."""
        return max(map(self.buckets.size, range(len(self.buckets.sizes_K2))), key=lambda size: size[0] * size[1])

    def fingerprint(self) -> str:
        """A digest of all that the order of samples depends on, but for seed, batch size and micro-batches a step.

        It stays when the data is moved, and changes with the images, captions' sources, buckets, windows, what
        regularisation images are balanced with, and what is held out.
        """
        buckets = [asdict(_bucket_options(subset)) for subset in self.options.subsets]
        balance = [(subset.is_reg, subset.dataset) for subset in self.options.subsets if self.is_reg_S.any()]
        splits = [asdict(split) for split in _splits(self.options, self.plan.seed) if self.buckets.held_SK.any()]
        content = [self.index.fingerprint, buckets, self.plan.window_sources, *balance, *splits]
        return hashlib.sha256(json.dumps(content).encode()).hexdigest()

    @property
    def epochs(self) -> Plan:
        """Where epochs begin."""
        return self.plan

    @property
    def global_batch(self) -> int:
        """Samples of a step over all processes."""
        return self.plan.global_batch

    @property
    def samples(self) -> int:
        """Of an epoch, repeats counted."""
        return int(self.plan.samples_K.sum())

    @property
    def left_out(self) -> Sequence[tuple[str, str]]:
        """(name, reason) of samples that the index could not use."""
        return self.index.bad

    @property
    def left_out_count(self) -> int:
        """How many samples they are: an entry may stand for many that are in no file."""
        return self.index.left_out

    def of_one_process(self) -> "TrainingData":
        """The same data in the same order, all of it in one process."""
        return replace(self, share=self.share.of_one_process())

    def description(self) -> dict[str, str]:
        """The samples, source by source, by the names that a message gives them."""
        facts = {"the number of samples": f"{len(self.index):,}"}
        for source, table in zip(self.index.sources, self.index.tables, strict=True):
            share = f" (share {source.share[0] + 1} of {source.share[1]})" if source.share[1] > 1 else ""
            content = digest([source.repeats, table.notes["digest"]])
            facts[f"{source.path.name}{share}"] = f"{table.notes['count']:,} samples, digest {content}"
        return facts

    def position(self) -> None:
        """Nothing besides the step: the plan is a function of it."""

    def go_on_from(self, positions: Sequence[Mapping[str, Any]], anyway: bool) -> None:
        """Nothing to take up besides the step.

        Raises:
            InputError: the state is of a run that read a stream.
        """
        if positions and not anyway:
            raise InputError("--resume: the state is of a run that read its data as a stream; go on with the same data")

    def loader(self, tokenize: Tokenize, end_step: int, start_step: int = 0) -> Loader:
        """This process's micro-batches of the steps `start_step` to `end_step` - 1, the last one of the run."""
        return make_loader(
            self.index,
            self.buckets,
            self.plan,
            self.share,
            self.treatments(end_step),
            start_step=start_step,
            end_step=end_step,
            tokenize=tokenize,
            workers=self.workers,
            caches=self.caches,
        )

    def treatments(self, run_steps: int) -> list[Treatment]:
        """How the samples of each subset are prepared in a run of that many steps."""
        return _treatments(self.options, run_steps)

    def validation(self, tokenize: Tokenize) -> tuple[ValidationPlan, Loader] | None:
        """The batches of the images that are held out, and this process's part of them; None if there are none.

        Captions and images are as the data set has them: whole, in their order, without augmentations.
        """
        if not self.buckets.held_SK.any():
            return None
        seed = _splits(self.options, self.plan.seed)[0].seed
        batch_size, ranks = self.share.batch_size, self.share.world_size
        plan = ValidationPlan(self.buckets.held_out, seed, batch_size, self.options.max_validation_steps)
        treatments = [_validation_treatment(treatment) for treatment in _treatments(self.options, 0)]
        own = Share(batch_size)
        dataset = MicroBatchDataset(self.index, self.buckets, plan, own, treatments, tokenize, self.caches)
        end = -(-plan.batches // ranks) * ranks  # as many for each process
        return plan, Loader(dataset, 1, self.share.rank, end, self.workers, stride=ranks)

    @property
    def workers(self) -> int:
        """Processes that read and decode."""
        return min(self.options.max_data_loader_n_workers, max((os.cpu_count() or 1) - 1, 1))


def prepare_data(
    options: DataOptions,
    seed: int,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    between: Callable[[], None] = lambda: None,
    extras: Sequence[str] = (),
    output_dir: Path | None = None,
) -> TrainingSet:
    """Find all samples, sort them into buckets and plan their order.

    Args:
        extras: names of the extra images that each sample must have (library.data.index.extras); one named "mask" comes
            from the image's own alpha channel where --alpha_mask is given.
        between: called between two pieces of the work, and while another process works; may raise, to end it.
        output_dir: where the run writes; pictures in it are no data.

    Raises:
        InputError: no data, no images, no captions, bucket options that cannot be, no faces in the names where crops go
            around them, a set too small for one batch.
    """
    bucket_options = [_bucket_options(subset) for subset in options.subsets]
    share = Share(options.train_batch_size, rank, world_size, accumulation)
    if is_streamed(options):
        names = [[extra.name for extra in _extras(subset, extras)] for subset in options.subsets]
        return prepare_stream(options, bucket_options, partial(_treatments, options), seed, share, names)
    for entry in bucket_options:
        check_options(entry)
    logger.info("loading image sizes.")
    subsets = [_subset(subset, options.dataset_config, between, extras, output_dir) for subset in options.subsets]
    index = build_index(subsets, progress=_index_bar, between=between)
    try:
        check_left_out(index.bad, len(index), options.max_bad_samples, index.unnamed)
    except InputError:
        for warning in index.warnings:  # there will be no report that has them
            logger.warning("%s", warning)
        raise
    _check_faces(index, options.subsets)
    splits = _splits(options, seed)
    held_out = choices(index, splits) if any(split.share for split in splits) else None
    buckets = bucket_rows(index, bucket_options, _bar("buckets"), between, held_out)
    check_choices(index, splits, buckets.held_SK.sum(axis=1))
    samples_SK = balanced(
        repeated(buckets.images_SK, index.repeats_S),
        _of_sources(index, [subset.is_reg for subset in options.subsets]),
        _of_sources(index, [subset.dataset for subset in options.subsets]),
    )
    plan = Plan(buckets, samples_SK, seed, share.batch_size, share.micro_batches, options.shuffle_window_shards)
    return TrainingData(options, index, buckets, plan, share)


def _check_faces(index: Index, subsets: Sequence[SubsetOptions]) -> None:
    """Say how many images have a face in their name, where crops go around it.

    Raises:
        InputError: a subset is to be cropped around faces, and no name in it tells of one.
    """
    for number, subset in enumerate(subsets):
        if subset.face_crop_aug_range is None:
            continue
        own = [place for place, source in enumerate(index.sources) if source.subset == number]
        first, last = index.starts_S[own[0]], index.starts_S[own[-1] + 1] - 1  # a subset's sources are neighbours
        looked_at = np.unique(np.linspace(first, last, _NAMES_LOOKED_AT).astype(np.int64)).tolist()
        found = sum(face_in(index.name(row)) is not None for row in looked_at)
        if not found:
            raise InputError(
                f"--face_crop_aug_range: none of {len(looked_at)} names in {subset.train_data_dir} tells of a face, "
                f"{index.name(looked_at[0])} for one. Names must end in _X_Y_W_H, the face's centre, width and height "
                "in px, such as anna_210_180_96_120.jpg; name them so, or leave the flag out."
            )
        logger.info(
            "%s: %d of %d names looked at tell of a face; other images are cropped without one",
            subset.train_data_dir,
            found,
            len(looked_at),
        )


def _extras(options: SubsetOptions, names: Sequence[str]) -> tuple[Extra, ...]:
    """The extra images of a subset. A second folder has the conditioning images, in a run without those the masks.

    Raises:
        InputError: there is such a folder, and nothing is trained with either.
    """
    wanted = [name for name in names if not (name == MASK and options.alpha_mask)]
    folder, of_folder = options.conditioning_data_dir, CONDITION if CONDITION in wanted else MASK
    if folder is not None and of_folder not in wanted:
        raise InputError(
            f"--conditioning_data_dir {folder} has nothing to act on: what is trained takes neither conditioning "
            "images nor masks from a folder; leave it out."
        )
    return tuple(Extra(name, folder if name == of_folder else None) for name in wanted)


def _subset(
    options: SubsetOptions,
    config: Path | None,
    between: Callable[[], None],
    extras: Sequence[str] = (),
    output_dir: Path | None = None,
) -> Subset:
    """In a configuration file repeats and class words have keys of their own, so folders' names mean nothing there."""
    assert isinstance(options.train_data_dir, Path)
    flag = f"{config}: image_dir" if config else "--reg_data_dir" if options.is_reg else "--train_data_dir"
    return Subset(
        local_data(options.train_data_dir, flag, options.caption_extension, between),
        options.caption_extension,
        metadata=options.in_json,
        repeats=options.dataset_repeats,
        class_words=options.class_tokens,
        class_folders=config is None,
        flag=flag,
        extras=_extras(options, extras),
        any_line=options.enable_wildcard,
        output_dir=output_dir,
    )


def _splits(options: DataOptions, seed: int) -> list[Split]:
    """What is held out of each subset; of regularisation images nothing."""
    return [
        Split(
            0.0 if subset.is_reg else subset.validation_split,
            seed if subset.validation_seed is None else subset.validation_seed,
        )
        for subset in options.subsets
    ]


def _of_sources(index: Index, of_subsets: Sequence[Any]) -> np.ndarray:
    """What is known of subsets, for each source."""
    return np.array(of_subsets)[[source.subset for source in index.sources]]


def _bucket_options(options: SubsetOptions) -> BucketOptions:
    return fill(BucketOptions, options)


def _treatments(options: DataOptions, run_steps: int) -> list[Treatment]:
    """How the samples of each subset are prepared in a run of that many steps."""
    masked = any(subset.alpha_mask for subset in options.subsets)
    return [
        replace(_treatment(subset, run_steps, options.prior_loss_weight), masked=masked) for subset in options.subsets
    ]


def _treatment(options: SubsetOptions, run_steps: int, prior_loss_weight: float) -> Treatment:
    """How a subset's samples are prepared in a run of that many steps."""
    warmup = options.token_warmup_step
    warmup_steps = warmup if warmup >= 1 else int(warmup * run_steps)
    captions = fill(CaptionChanges, options, token_warmup_steps=warmup_steps)
    interpolation = options.resize_interpolation
    images = fill(ImageChanges, options, resize_interpolation=None if interpolation is None else FILTERS[interpolation])
    return Treatment(captions, prior_loss_weight if options.is_reg else 1.0, images=images)


def _validation_treatment(trained: Treatment) -> Treatment:
    """As in training, but nothing is shuffled, left out, held back, weighed or augmented."""
    captions = replace(
        trained.captions,
        shuffle_caption=False,
        token_warmup_steps=0.0,
        caption_dropout_rate=0.0,
        caption_dropout_every_n_epochs=0,
        caption_tag_dropout_rate=0.0,
    )
    images = replace(trained.images, flip_aug=False, color_aug=False, random_crop=False, face_crop_aug_range=None)
    return replace(trained, captions=captions, images=images, loss_weight=1.0)


def _index_bar(subset: Subset) -> Callable[[int, int], None]:
    return _bar(f"index {subset.path.name}")


def _bar(name: str) -> Callable[[int, int], None]:
    """A progress bar that shows when there is something to do. The one process that does it calls this."""
    bar: ProgressBar | None = None

    def show(done: int, total: int) -> None:
        nonlocal bar
        if bar is None:
            bar = ProgressBar(desc=name, total=total, mininterval=0.5)
        bar.update(done - bar.n)
        if done == total:
            bar.close()

    return show
