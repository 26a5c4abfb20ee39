"""The lines about the data set that are printed before training."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from library.data.bad_samples import SampleError
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets
from library.data.order.plan import Plan
from library.data.sample.captions import CaptionChanges, process_caption
from library.data.sample.reader import Reader

_MOST_BUCKETS = 40  # lines; the rest is summed up
_MOST_STEPS, _MOST_MICRO_BATCHES = 32, 128  # looked at for a mean; each micro-batch takes a fraction of a millisecond
_MOST_CAPTIONS = 500  # looked at for their length: each is a read, which a network disk answers slowly
_NAMED = 3


def data_report(index: Index, buckets: Buckets, plan: Plan) -> list[str]:
    """What was found and how it becomes batches, in the lines that users search for; warnings last."""
    shards = sum(source.is_shard for source in index.sources)
    folders = len({source.path for source in index.sources if not source.is_shard})
    images_K = buckets.images_K
    batches_K, left_K = plan.micro_batches_in_pass(0), plan.left_over(0)
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
            f"mean ar error: {buckets.mean_error_K[bucket]:.4f}, cropped away: {buckets.mean_cropped_K[bucket]:.1%}"
        )
    rest = slice(_MOST_BUCKETS, None)
    if len(images_K) > _MOST_BUCKETS:
        lines.append(
            f"{len(images_K) - _MOST_BUCKETS} more buckets: count: {plan.samples_K[rest].sum()}, images: "
            f"{images_K[rest].sum()}, batches: {batches_K[rest].sum()}, left over: {left_K[rest].sum()}"
        )
    lines.append(f"mean ar error (without repeats): {buckets.mean_error:.4f}")
    lines.append(f"cropped away: {buckets.mean_cropped:.1%} of the scaled images on average")
    lines.append(_upscaled(buckets))
    lines.append(f"dropped images: {_dropped(index)}")
    if profiles := index.profiles:
        named = "; ".join(f"{name} ({count})" for name, count in profiles.most_common(_NAMED))
        more = f"; and {len(profiles) - _NAMED} more profiles" if len(profiles) > _NAMED else ""
        lines.append(f"converted to sRGB by their colour profile: {profiles.total()} of {len(index)}: {named}{more}")
    lines.append(
        f"steps in the first epoch: {plan.steps_before_epoch(1)}, each of {plan.micro_batches} batches of "
        f"{plan.batch_size} (each full and of one bucket); left over for the next: {plan.carried_over(0)} batches, and "
        f"{left_K.sum()} samples that fill none"
    )
    lines.append(_shuffle(plan))
    return lines + [f"warning: {warning}" for warning in index.warnings]


def caption_line(
    index: Index,
    options: Sequence[CaptionChanges],
    count_tokens: Callable[[Sequence[str]], list[int]],
    most_tokens: int,
) -> str:
    """How many captions are longer than what trains of them, from a sample spread over all of the data.

    They are counted whole: with prefix and suffix, and with all tags, whatever a step drops.

    Args:
        options: of each subset's captions.
        count_tokens: of captions.
        most_tokens: of a caption that train.
    """
    rows = np.unique(np.linspace(0, len(index) - 1, _MOST_CAPTIONS).astype(np.int64)).tolist()
    reader, rng, captions, names = Reader(index), np.random.default_rng(0), [], []
    whole = [
        replace(entry, caption_dropout_rate=0, caption_dropout_every_n_epochs=0, caption_tag_dropout_rate=0,
                token_warmup_steps=0)
        for entry in options
    ]  # fmt: skip
    for row in rows:
        try:
            text = reader.caption(row)
        except SampleError:
            continue  # training replaces it and says so
        captions.append(process_caption(text, whole[index.source(row).subset], rng, 0, 0))
        names.append(index.name(row))
    reader.close()
    counts = count_tokens(captions)
    cut = [place for place, count in enumerate(counts) if count > most_tokens]
    looked_at = f"of {len(captions)} looked at" if len(captions) < len(index) else f"of {len(captions)}"
    if not cut:
        return f"captions cut to {most_tokens} tokens: none {looked_at}, the longest has {max(counts, default=0)}"
    named = "; ".join(f"{names[place]} ({counts[place]})" for place in cut[:_NAMED])
    return (
        f"captions cut to {most_tokens} tokens: {len(cut)} {looked_at} ({len(cut) / len(captions):.1%}), the longest "
        f"has {max(counts)}: {named}{_more(len(cut))}. A larger --max_token_length cuts fewer"
    )


def _upscaled(buckets: Buckets) -> str:
    """How many images are enlarged for their buckets, and the first of them."""
    count, images = int(buckets.upscaled_K.sum()), int(buckets.images_K.sum())
    if not count:
        return "upscaled images: none"
    named = "; ".join(buckets.upscaled_names[:_NAMED])
    return f"upscaled images: {count} of {images} ({count / images:.1%}): {named}{_more(count)}"


def _dropped(index: Index) -> str:
    """How many images the index had to leave out, and the first of them."""
    if not index.bad:
        return "none"
    named = "; ".join(f"{name}: {reason}" for name, reason in index.bad[:_NAMED])
    return f"{index.left_out} of {len(index) + index.left_out}: {named}{_more(len(index.bad))}"


def _more(count: int) -> str:
    return f"; and {count - _NAMED} more" if count > _NAMED else ""


def _shuffle(plan: Plan) -> str:
    """How well the order is mixed: the share of a batch that comes from one source, 1 / sources at best.

    That is what the model would notice: shards are often sorted by something (date, site, class), and a batch is as
    uniform as they are if it comes from few of them. Two neighbours of a shard come a third of a window apart, the mean
    distance of two places drawn at random.
    """
    sources, samples = plan.source_count, int(plan.samples_K.sum())
    looked_at = max(1, min(_MOST_STEPS, _MOST_MICRO_BATCHES // plan.micro_batches))
    steps = np.unique(np.linspace(0, plan.steps_before_epoch(1) - 1, looked_at).astype(np.int64))
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
