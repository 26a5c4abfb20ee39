"""A run's data in one place: index, buckets and plan, and the loader over them."""

import hashlib
import json
import logging
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass

import numpy as np
from tqdm import tqdm

from library.cli.data import DataOptions
from library.data.bad_samples import check_left_out
from library.data.buckets import BucketOptions, Buckets, assign_buckets, check_options
from library.data.captions import CaptionOptions
from library.data.index import Index, build_index
from library.data.loader import Loader, Share, Tokenize, make_loader
from library.data.plan import Plan
from library.data.report import data_report

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainingData:
    """What is trained on, and in which order."""

    options: DataOptions
    index: Index
    buckets: Buckets
    plan: Plan
    share: Share

    def report(self) -> list[str]:
        """What was found and how it becomes batches."""
        return data_report(self.index, self.buckets, self.plan)

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """Width and height in px of the bucket whose batches need the most memory."""
        return max(map(self.buckets.size, range(len(self.buckets.sizes_K2))), key=lambda size: size[0] * size[1])

    def fingerprint(self) -> str:
        """A digest of all that the order of samples depends on, but for seed and global batch."""
        digest = hashlib.sha256(json.dumps(asdict(self.buckets.options)).encode())
        for part in (self.index.rows, self.index.text, self.buckets.bucket_of_row):
            digest.update(np.ascontiguousarray(part).tobytes())
        return digest.hexdigest()

    def loader(self, tokenize: Tokenize, end_step: int, start_step: int = 0) -> Loader:
        """This process's micro-batches of the steps `start_step` to `end_step` - 1."""
        return make_loader(
            self.index,
            self.buckets,
            self.plan,
            self.share,
            CaptionOptions(
                shuffle_caption=self.options.shuffle_caption,
                keep_tokens=self.options.keep_tokens,
                caption_separator=self.options.caption_separator,
                caption_dropout_rate=self.options.caption_dropout_rate,
            ),
            start_step=start_step,
            end_step=end_step,
            tokenize=tokenize,
            workers=min(self.options.max_data_loader_n_workers, max((os.cpu_count() or 1) - 1, 1)),
        )


def prepare_data(
    options: DataOptions,
    seed: int,
    *,
    rank: int,
    world_size: int,
    accumulation: int,
    between: Callable[[], None] = lambda: None,
) -> TrainingData:
    """Find all samples, sort them into buckets and plan their order.

    Args:
        between: called between two pieces of the work; may raise, to end it.

    Raises:
        InputError: no images, no captions, bucket options that cannot be, a set too small for one batch.
    """
    bucket_options = BucketOptions(
        resolution=options.resolution,
        enable_bucket=options.enable_bucket,
        min_bucket_reso=options.min_bucket_reso,
        max_bucket_reso=options.max_bucket_reso,
        bucket_reso_steps=options.bucket_reso_steps,
        bucket_no_upscale=options.bucket_no_upscale,
    )
    check_options(bucket_options)
    logger.info("loading image sizes.")
    with tqdm(desc="index", disable=rank != 0, mininterval=0.5) as bar:
        index = build_index(options.train_data_dir, options.caption_extension, progress=_shown_in(bar, between))
    check_left_out(index.bad, len(index), options.max_bad_samples)
    sizes_N2 = np.stack([index.rows["width"], index.rows["height"]], axis=1).astype(np.int64)
    buckets = assign_buckets(sizes_N2, bucket_options, index.name)
    share = Share(options.train_batch_size, rank, world_size, accumulation)
    plan = Plan(buckets.bucket_of_row, index.repeats, seed, share.global_batch)
    return TrainingData(options, index, buckets, plan, share)


def _shown_in(bar: tqdm, between: Callable[[], None]) -> Callable[[int, int], None]:
    def show(done: int, total: int) -> None:
        between()
        bar.total = total
        bar.update(done - bar.n)

    return show
