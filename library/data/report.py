"""The lines about the data set that are printed before training."""

import numpy as np

from library.data.buckets import Buckets
from library.data.index import Index
from library.data.plan import Plan

_MOST_BUCKETS = 40  # lines; the rest is summed up


def data_report(index: Index, buckets: Buckets, plan: Plan) -> list[str]:
    """What was found and how it becomes batches, in the lines that users search for; warnings last."""
    shards = sum(source.is_shard for source in index.sources)
    images_K = np.bincount(buckets.bucket_of_row, minlength=len(buckets.sizes_K2))
    batches_K, left_K = plan.batches_in_epoch(0), plan.left_over(0)
    lines = [
        f"{len(index)} images in {shards} shards and {len(index.sources) - shards} folders",
        f"number of images (including repeats): {int(plan.samples_K.sum())}",
        "make buckets",
    ]
    for bucket in range(min(len(images_K), _MOST_BUCKETS)):
        width, height = buckets.size(bucket)
        lines.append(
            f"bucket {bucket}: resolution ({width}, {height}), count: {plan.samples_K[bucket]}, images: "
            f"{images_K[bucket]}, batches: {batches_K[bucket]}, left over for the next epoch: {left_K[bucket]}, "
            f"mean ar error: {buckets.mean_error_K[bucket]:.4f}"
        )
    rest = slice(_MOST_BUCKETS, None)
    if len(images_K) > _MOST_BUCKETS:
        lines.append(
            f"{len(images_K) - _MOST_BUCKETS} more buckets: count: {plan.samples_K[rest].sum()}, images: "
            f"{images_K[rest].sum()}, batches: {batches_K[rest].sum()}, left over: {left_K[rest].sum()}"
        )
    lines.append(f"mean ar error (without repeats): {buckets.mean_error:.4f}")
    lines.append(
        f"batches of {plan.global_batch} in the first epoch: {batches_K.sum()}; samples left over for the next: "
        f"{left_K.sum()} (each batch is of one bucket and full)"
    )
    return lines + [f"warning: {warning}" for warning in index.warnings]
