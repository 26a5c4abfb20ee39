"""The lines about the data set that are printed before training."""

import numpy as np

from library.data.bucket_rows import Buckets
from library.data.index import Index
from library.data.plan import Plan

_MOST_BUCKETS = 40  # lines; the rest is summed up
_MOST_BATCHES = 32  # looked at for a mean


def data_report(index: Index, buckets: Buckets, plan: Plan) -> list[str]:
    """What was found and how it becomes batches, in the lines that users search for; warnings last."""
    shards = sum(source.is_shard for source in index.sources)
    folders = len({source.path for source in index.sources if not source.is_shard})
    images_K = buckets.images_K
    batches_K, left_K = plan.batches_in_epoch(0), plan.left_over(0)
    lines = [
        f"{len(index)} images in {shards} shards and {folders} folders",
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
    lines.append(_shuffle(plan))
    return lines + [f"warning: {warning}" for warning in index.warnings]


def _shuffle(plan: Plan) -> str:
    """How well the order is mixed: the share of a batch that comes from one source, 1 / sources at best.

    That is what the model would notice: shards are often sorted by something (date, site, class), and a batch is as
    uniform as they are if it comes from few of them. Two neighbours of a shard come a third of a window apart, the mean
    distance of two places drawn at random.
    """
    sources, samples = plan.source_count, int(plan.samples_K.sum())
    steps = np.unique(np.linspace(0, plan.steps_before_epoch(1) - 1, _MOST_BATCHES).astype(np.int64))
    most = [np.unique(plan.sources_of_batch(int(step)), return_counts=True)[1].max() for step in steps]
    share = 100 * float(np.mean(most)) / plan.global_batch
    window = min(plan.window_sources, sources)
    what = "over the whole set"
    if window < sources:
        what = f"in windows of {window} of {sources} shards and folders, about {samples * window // sources} samples"
    return (
        f"shuffle: {what}; of a batch, {share:.1f} % comes from one shard or folder at most (mean of {len(steps)} "
        f"batches), and neighbours of a shard come about {samples * window // sources // 3} samples apart"
    )
