"""Data that comes as a stream: shards on web servers, in object stores or out of commands, read again in each pass.

Micro-batch m of rank r in step s has the slot m·n + r of the step (n: ranks), and each slot has readers of its own that
take turns (library.data.stream.reader). So every rank has data for as long as it asks, and steps are all that is
counted. A loader worker has all micro-batches of the readers that fall to it: workers divide the readers of a rank.
"""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

from torch.utils.data import Dataset

from library.address import Address
from library.data.loader import Loader
from library.data.micro_batch import MicroBatch, Share, Tokenize, micro_batch
from library.data.order.buckets import check_options, fit
from library.data.sample.prepare import Place, Sample, Treatment, prepare_sample
from library.data.stream.probe import probe
from library.data.stream.reader import Bucket, Layout, Position, Shard, StreamReader
from library.data.stream.sample_counts import sample_counts
from library.data.stream.shard_samples import StreamSample, StreamSubset
from library.errors import InputError
from library.options.buckets import BucketOptions
from library.options.data import DataOptions, SubsetOptions
from library.redaction import redacted, secrets_of, shown_address

logger = logging.getLogger(__name__)


@dataclass
class StreamEpochs:
    """Epochs of a stream: by its number of samples where that is known, else by the passes that a rank has seen."""

    samples: int | None
    global_batch: int
    seen: dict[int, int] = field(default_factory=dict)  # step: pass

    def epoch_of_step(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""
        if self.samples is None:
            return self.seen.get(step, 0)
        return (step * self.global_batch + self.global_batch - 1) // self.samples

    def steps_before_epoch(self, epoch: int) -> int:
        """How many steps all epochs before this one have; 0, no step's end, where nobody knows."""
        return 0 if self.samples is None else epoch * self.samples // self.global_batch


@dataclass
class StreamedData:
    """What is trained on, and in which order; it also keeps where its readers are."""

    options: DataOptions
    layout: Layout
    share: Share
    treatments: Callable[[int], Sequence[Treatment]]
    samples: int | None
    positions: dict[int, Position] = field(default_factory=dict)
    left_out: Sequence[tuple[str, str]] = ()
    left_out_count: int = 0

    def __post_init__(self) -> None:
        self.epochs = StreamEpochs(self.samples, self.global_batch)

    @property
    def global_batch(self) -> int:
        """Samples of a step over all processes."""
        return self.share.global_batch

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """Width and height in px of the bucket whose batches need the most memory."""
        sizes = [tuple(size) for known_K2 in self.layout.known_buckets for size in known_K2.tolist()]
        width, height = max(sizes, key=lambda size: size[0] * size[1])
        return width, height

    def of_one_process(self) -> "StreamedData":
        """The same data in the same order, all of it in one process."""
        return replace(self, share=self.share.of_one_process())

    def report(self) -> list[str]:
        """What is streamed and how it becomes batches."""
        layout = self.layout
        count = "unknown: epochs are the passes over the shards" if self.samples is None else f"{self.samples}"
        buckets = sum(map(len, layout.known_buckets))
        mixed = layout.pool_of_reader * layout.readers
        waiting = buckets * (layout.batch_size - 1)
        split = f", each shard by {layout.shares} of them in part" if layout.shares > 1 else ""
        return [
            f"{len(layout.shards)} shards as a stream, from {shown_address(layout.shards[0].address)} on",
            f"number of images: {count}",
            f"make buckets: {buckets}; each micro-batch is of one, and those of a step may be of different ones",
            f"readers of the stream: {layout.readers} over all processes{split}",
            f"shuffle: shards in a random order; {mixed} samples mixed in memory over all processes; up to {waiting} "
            "more a reader wait for their bucket to fill",
        ]

    def caption_lines(self, count_tokens: Callable[[Sequence[str]], list[int]], most_tokens: int) -> list[str]:
        """Nothing: captions come with the images."""
        return []

    def fingerprint(self) -> str:
        """A digest of what the order of samples depends on; it stays when the shards move to another server."""
        shards = [(_told_apart_by(shard.address), shard.subset) for shard in self.layout.shards]
        buckets = [asdict(options) for options in self.layout.bucket_options]
        captions = [asdict(subset) for subset in self.layout.subsets]
        content = json.dumps([shards, buckets, captions, self.layout.pool])
        return hashlib.sha256(content.encode()).hexdigest()

    def description(self) -> dict[str, str]:
        """What must be the same in all processes."""
        return {"the number of samples": str(self.samples), "the number of shards": str(len(self.layout.shards))}

    def loader(self, tokenize: Tokenize, end_step: int, start_step: int = 0) -> Loader:
        """This process's micro-batches of the steps `start_step` to `end_step` - 1."""
        readers = self.layout.readers_of_slot * self.share.accumulation
        most = min(self.options.max_data_loader_n_workers, max((os.cpu_count() or 1) - 1, 1))
        workers = max((number for number in range(1, most + 1) if readers % number == 0), default=0)
        dataset = _StreamDataset(self.layout, self.share, self.treatments(end_step), tokenize, dict(self.positions))
        return Loader(dataset, self.share.accumulation, start_step, end_step, workers, self._handed_over)

    def _handed_over(self, batch: MicroBatch) -> None:
        if batch.reader is not None:
            number, self.positions[number] = batch.reader
        self.epochs.seen = {batch.step: max(batch.epoch, self.epochs.seen.get(batch.step, 0))}

    def position(self) -> Mapping[str, Any]:
        """Where this process's readers are after the last micro-batch handed over."""
        readers = {str(number): asdict(position) for number, position in self.positions.items()}
        return {"arrangement": self._arrangement(), "readers": readers}

    def go_on_from(self, positions: Sequence[Mapping[str, Any]], anyway: bool) -> None:
        """Take up where the readers of an earlier run were.

        Raises:
            InputError: it had other readers.
        """
        if not positions and anyway:
            return
        if not positions:
            raise InputError("--resume: the state is of a run that read its data by an index; go on with the same data")
        then, now = dict(positions[0]["arrangement"]), self._arrangement()
        found = {int(number): _position(plain) for entry in positions for number, plain in entry["readers"].items()}
        if then == now:
            self.positions = found
            return
        if not anyway:
            differing = ", ".join(
                f"{name} ({then[name]} then, {now[name]} now)" for name in now if then[name] != now[name]
            )
            raise InputError(
                f"--resume: a stream goes on only as it was dealt out, and now other is: {differing}. Go on with the "
                "same, or add --resume_anyway to begin with the shards that come next."
            )
        begun = max((position.part + 1 for position in found.values()), default=0) * int(then["readers"])
        first = -(-begun // self.layout.readers)
        self.positions = {number: Position(part=first) for number in range(self.layout.readers)}

    def _arrangement(self) -> dict[str, int]:
        """What must be the same for positions to mean the same, by the names that a message gives it."""
        layout = self.layout
        return {
            "batch size per device": layout.batch_size,
            "processes × accumulation": layout.slots,
            "readers": layout.readers,
            "samples mixed": layout.pool,
        }


class _StreamDataset(Dataset):
    """Item i is micro-batch i % accumulation of step i // accumulation; a process asks for them in their order."""

    def __init__(
        self,
        layout: Layout,
        share: Share,
        treatments: Sequence[Treatment],
        tokenize: Tokenize | None,
        positions: dict[int, Position],
    ) -> None:
        self._layout, self._share, self._treatments, self._tokenize = layout, share, treatments, tokenize
        self._positions = positions
        self._readers: dict[int, StreamReader] = {}

    def __getitem__(self, item: int) -> MicroBatch:
        """One micro-batch.

        Raises:
            InputError: nothing can be read any more.
        """
        step, micro = divmod(item, self._share.accumulation)
        turn = step % self._layout.readers_of_slot
        number = turn * self._layout.slots + micro * self._share.world_size + self._share.rank
        if number not in self._readers:
            start = self._positions.get(number, Position())
            self._readers[number] = StreamReader(self._layout, number, start)
        reader = self._readers[number]
        places = self._share.places(micro)

        def prepare(sample: StreamSample, bucket: Bucket, subset: int, epoch: int, place: int) -> Sample:
            at = Place(self._layout.seed, step, int(places[place]), epoch)
            options = self._layout.bucket_options[subset]
            fit_of_size = partial(_fit, bucket=bucket, options=options)
            treatment = self._treatments[subset]
            return prepare_sample(
                sample.name, sample.image, sample.caption, treatment, bucket.size_px, fit_of_size, at, sample.extras
            )

        batch = reader.next_batch(prepare)
        made = micro_batch(batch.samples, step, micro, places, self._tokenize, batch.bad, batch.lost)
        made.reader, made.epoch = (number, reader.position), batch.epoch
        return made


def _fit(width: int, height: int, bucket: Bucket, options: BucketOptions) -> Any:
    return fit((width, height), bucket.size_px, options)


def is_streamed(options: DataOptions) -> bool:
    """Whether the data comes as a stream.

    Raises:
        InputError: some of it does, and some of it is in folders.
    """
    kinds = {isinstance(subset.train_data_dir, Address) for subset in options.subsets}
    if len(kinds) > 1:
        raise InputError(
            "--train_data_dir, --reg_data_dir or image_dir: some are addresses and some are folders. A run either "
            "streams or has an index: download the shards of the addresses, or train on them in a run of their own."
        )
    return kinds == {True}


def prepare_stream(
    options: DataOptions,
    bucket_options: Sequence[BucketOptions],
    treatments: Callable[[int], Sequence[Treatment]],
    seed: int,
    share: Share,
    extras: Sequence[Sequence[str]] = (),
) -> StreamedData:
    """Expand the addresses, look into the first shard of each and for the numbers of samples.

    Args:
        treatments: of each subset, in a run of so many steps.
        extras: of each subset, the names of the extra images that its samples must have.

    Raises:
        InputError: an option needs an index; a first shard cannot be read, or has no image or no caption.
    """
    shards: list[Shard] = []
    subsets: list[StreamSubset] = []
    flag = "--train_data_dir" if options.dataset_config is None else f"{options.dataset_config}: image_dir"
    for number, subset in enumerate(options.subsets):
        _check_subset(subset, flag)
        check_options(bucket_options[number])
        assert isinstance(subset.train_data_dir, Address)
        addresses = subset.train_data_dir.shards(flag)
        wanted = tuple(extras[number]) if extras else ()
        subsets.append(StreamSubset(subset.caption_extension, subset.class_tokens, wanted))
        many_lines = probe(addresses[0], subsets[-1], flag)
        if many_lines and not subset.enable_wildcard:
            logger.warning(
                "%d of the first captions have more lines than one: the first that is not empty trains, the others do "
                "not: %s. --enable_wildcard takes one of the lines at each step",
                len(many_lines),
                many_lines[0],
            )
        shards += [Shard(address, number) for address in addresses]
    if options.shuffle_window_shards:
        raise InputError(
            "--shuffle_window_shards is for data with an index; a stream mixes --stream_shuffle_buffer samples: leave "
            "it out"
        )
    counts = sample_counts([shard.address for shard in shards])
    samples = None if None in counts else sum(count for count in counts if count is not None) or None
    layout = Layout(
        tuple(replace(shard, samples=count) for shard, count in zip(shards, counts, strict=True)),
        tuple(subsets),
        tuple(bucket_options),
        seed,
        share.world_size * share.accumulation,
        share.batch_size,
        options.stream_shuffle_buffer,
    )
    return StreamedData(options, layout, share, treatments, samples)


def _check_subset(options: SubsetOptions, flag: str) -> None:
    """Raise InputError for an option that needs an index."""
    needs = [
        ("--reg_data_dir (is_reg)", options.is_reg, "how often its images are shown follows from the numbers of all"),
        ("--in_json (metadata_file)", options.in_json is not None, "captions come from the shards"),
        ("--dataset_repeats (num_repeats)", options.dataset_repeats != 1, "each pass shows a sample once"),
        (
            "--bucket_no_upscale",
            options.bucket_no_upscale and options.enable_bucket,
            "its buckets follow from the sizes of all images",
        ),
        ("--validation_split", options.validation_split > 0, "what is held out is chosen among all images"),
        (
            "--conditioning_data_dir",
            options.conditioning_data_dir is not None,
            "conditioning images come from the shards",
        ),
    ]
    for option, given, why in needs:
        if given:
            raise InputError(
                f"{option} needs an index, and {flag} {options.train_data_dir} is a stream ({why}). Leave it out, or "
                "download the shards."
            )


def _position(plain: Mapping[str, Any]) -> Position:
    """A position out of a training state."""
    pairs = {name: tuple((int(part), int(sample)) for part, sample in plain[name]) for name in ("pool", "waiting")}
    return Position(**{**plain, **pairs})


def _told_apart_by(address: str) -> str:
    """A shard's file name; of a pipe the command, without its keys, which change."""
    if address.startswith("pipe:"):
        return redacted(address, secrets_of(address))
    return address.partition("?")[0].rpartition("/")[2]
