"""Before training: VAE and text encoders run once over all samples, each process over its share.

No process waits in a collective while another encodes, so that no time limit of one can be met: they only look, through
the store by which they once found each other, whether the others are done.
"""

import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch.distributed as dist
from accelerate import Accelerator
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor

from library.data.bad_samples import check_left_out
from library.data.cache.encodings import CaptionMaking, LatentMaking
from library.data.cache.entries import NO_CACHES, Block, Cache, Caches, MemoryShelf, Shelf, blocks_of
from library.data.cache.fill import Filled, Making, fill
from library.data.cache.locations import (
    BesideOf,
    cache_root,
    clear_left_behind,
    disk_shelf,
    pictures_of,
    sources_beside_images,
    text_outputs_of,
)
from library.data.cache.npz_files import TextLayout
from library.data.cache.settings import Settings
from library.data.dataset import TrainingData
from library.data.index.mapped_file import Opened
from library.errors import InputError
from library.options.training import TrainingOptions
from library.progress_bar import ProgressBar
from library.signals import Signals
from library.training.ranks.rank_failure import RankFailure
from library.training.ranks.rank_watch import CACHING, PREPARING, Progress

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.2
_GIB = 2**30
_NAMED = 5
_MADE_OF = {"latents": "image, VAE and crop", "text_encoder_outputs": "caption and text encoders"}


class Encoders(Protocol):
    """What a task encodes with, where it encodes apart from training."""

    def image_digest(self) -> str:
        """Of the VAE's weights and precision."""

    def caption_digest(self) -> str:
        """Of everything between a caption and what the text encoders make of it."""

    def encode_images(self, images_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the posterior, on the CPU."""

    def encode_captions(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """What the text encoders give, on the CPU, batch first."""

    @property
    def latent_px(self) -> int:
        """Pixels a side that one latent stands for."""

    @property
    def latent_channels(self) -> int:
        """Of the VAE's latents."""

    @property
    def latents_ending(self) -> str:
        """How the names of .npz files with latents end."""

    @property
    def first_text_width(self) -> int:
        """How many channels of the text states are the first text encoder's."""

    def image_bytes(self, width_px: int, height_px: int) -> int:
        """What the tensors of one image take."""

    def release(self, images: bool, captions: bool) -> None:
        """Take what is not needed in training any more from the device."""


def make_caches(
    options: TrainingOptions,
    data: TrainingData,
    encoders: Encoders,
    accelerator: Accelerator,
    signals: Signals,
    progress: Progress,
) -> Caches:
    """Compute what the asked-for caches lack. All processes call it.

    Raises:
        InputError: they do not fit into memory, or too many samples cannot be encoded.
        Stopped: by a signal; what was encoded before is kept on disk.
    """
    asked, batch_size = options.caches, options.data.train_batch_size
    if not (asked.latents or asked.text):
        return NO_CACHES
    progress.at(0, CACHING)
    work = _Work(options, data, accelerator, signals)
    latents = text = None
    if asked.latents:
        size = asked.vae_batch_size or batch_size
        images = [treatment.images for treatment in data.treatments(0)]
        making = LatentMaking(data.index, data.buckets, images, encoders.image_digest(), encoders.encode_images, size)
        needed = _latent_bytes(data, encoders)
        mirrored = [entry.flip_aug for entry in images]
        layout_of_latents = encoders.latents_ending, encoders.latent_px, encoders.latent_channels
        beside = partial(pictures_of, data.index, data.buckets, making.settings, mirrored, *layout_of_latents)
        shelves = work.shelves("latents", asked.cache_latents_to_disk, needed, making.settings, beside)
        bad = work.filled("latents", making, shelves)
        latents = Cache(data.index, shelves, bad, making.settings, foreign=asked.skip_cache_check)
    if asked.text:
        size = asked.text_encoder_batch_size or batch_size
        captions = CaptionMaking(
            data.index, data.treatments(0), encoders.caption_digest(), encoders.encode_captions, size
        )
        empty = captions.empty()
        needed = len(data.index) * sum(tensor.nbytes for tensor in empty.tensors)
        on_disk = asked.cache_text_encoder_outputs_to_disk
        layout = TextLayout(
            tuple(tuple(tensor.shape) for tensor in empty.tensors),
            tuple(tensor.dtype for tensor in empty.tensors),
            encoders.first_text_width,
        )
        outputs = partial(text_outputs_of, data.index, captions.settings, layout)
        shelves = work.shelves("text_encoder_outputs", on_disk, needed, captions.settings, outputs)
        bad = work.filled("text_encoder_outputs", captions, shelves)
        text = Cache(data.index, shelves, bad, captions.settings, empty, foreign=asked.skip_cache_check)
    encoders.release(asked.latents, asked.text)
    progress.at(0, PREPARING)
    _check_bad(data, {**(latents.bad if latents else {}), **(text.bad if text else {})}, options)
    return Caches(latents, text)


class _Work:
    """The processes' common work on one cache after the other."""

    def __init__(
        self, options: TrainingOptions, data: TrainingData, accelerator: Accelerator, signals: Signals
    ) -> None:
        self._options, self._data, self._accelerator, self._signals = options, data, accelerator, signals
        self._index = data.index
        self._memory: dict[str, dict[int, MemoryShelf]] = {}
        self._rounds = 0

    @cached_property
    def _roots(self) -> list[Path]:
        """Of each subset the folder of its block files; every folder of a cache is looked at for it, so it is kept."""
        paths = [subset.path for subset in self._index.subsets]
        roots = {path: cache_root(path, self._options.saving.output_dir) for path in dict.fromkeys(paths)}
        return [roots[path] for path in paths]

    def shelves(
        self, kind: str, on_disk: bool, needed_bytes: int, settings: Settings, beside: BesideOf
    ) -> Callable[[int], Shelf]:
        """Where the entries of each source go."""
        if not on_disk:
            _check_memory(kind, needed_bytes, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
            memory = self._memory[kind] = {number: MemoryShelf() for number in range(len(self._index.sources))}
            return memory.__getitem__
        for root in dict.fromkeys(self._roots):
            clear_left_behind(root)
        logger.info("cache %s on disk: %.2f GiB in all", kind, needed_bytes / _GIB)
        npz = sources_beside_images(self._index)
        return Opened(partial(disk_shelf, self._index, kind, settings, beside, self._roots, npz)).__getitem__

    def filled(self, kind: str, making: Making, shelves: Callable[[int], Shelf]) -> dict[int, str]:
        """Fill this process's share and wait for the others; returns the reasons of rows without entry."""
        in_memory = kind in self._memory
        blocks = list(self._share(in_memory))
        began = time.perf_counter()
        with self._together(), _bar(f"cache {kind}", self._accelerator.is_main_process) as progress:
            own = fill(
                making,
                self._index,
                shelves,
                blocks,
                check=not self._options.caches.skip_cache_check,
                workers=self._data.workers,
                progress=progress,
                between=self._signals.stop_if_requested,
            )
        if in_memory:
            self._exchange(blocks, shelves)
        everywhere = gather_object([own])
        self._report(kind, everywhere, time.perf_counter() - began)
        return {row: reason for filled in everywhere for row, reason in filled.bad.items()}

    def _share(self, in_memory: bool) -> Iterator[Block]:
        """Every so many-th block of each subset, counted among the processes that see the same disk."""
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        shares = [(rank, ranks)] * len(self._index.subsets)
        if not in_memory and ranks > 1:
            seen = _sharers(list(dict.fromkeys(self._roots)), self._accelerator)
            shares = [seen[root] for root in self._roots]
        number = 0
        for source, entry in enumerate(self._index.sources):
            place, count = shares[entry.subset]
            for block in blocks_of(self._index, source):
                if number % count == place:
                    yield block
                number += 1

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Around this process's work: at its end wait for that of the others, however long it takes.

        Raises:
            InputError, TrainingError, Stopped: another process has failed or was stopped.
        """
        if self._accelerator.num_processes == 1:
            yield
            return
        self._rounds += 1
        store = dist.PrefixStore(f"caching{self._rounds}", dist.distributed_c10d._get_default_store())
        rank, ranks = self._accelerator.process_index, self._accelerator.num_processes
        try:
            yield
        except BaseException as error:
            with suppress(Exception):  # of the store: what happened here matters more
                store.compare_set("ended", "", RankFailure.of(error, rank).to_json())  # the first says why
            raise
        store.set(f"done {rank}", "")
        everyone = [f"done {other}" for other in range(ranks)]
        while not store.check(everyone):
            self._signals.stop_if_requested()
            if store.check(["ended"]):
                raise RankFailure.from_json(store.get("ended")).as_error()
            time.sleep(_POLL_SECONDS)

    def _exchange(self, blocks: Sequence[Block], shelves: Callable[[int], Shelf]) -> None:
        """Give every process the entries in memory of all others, some blocks at a time."""
        if self._accelerator.num_processes == 1:
            return
        for number in range(max(gather_object([len(blocks)]))):
            mine: dict[int, dict[int, Any]] = {}
            if number < len(blocks):
                block = blocks[number]
                shelf = shelves(block.source)
                mine[block.source] = {place: shelf.read(place) for place in shelf.find(block.places, False).made}
            for theirs in gather_object([mine]):
                for source, entries in theirs.items():
                    shelves(source).write(entries)

    def _report(self, kind: str, everywhere: Sequence[Filled], seconds: float) -> None:
        kept, computed, foreign, outdated, bad = (
            sum(counts)
            for counts in zip(
                *((one.kept, one.computed, one.foreign, one.outdated, len(one.bad)) for one in everywhere), strict=True
            )
        )
        logger.info("cache %s: %d entries kept, %d computed, %.1f s", kind, kept, computed, seconds)
        if outdated:
            logger.info("cache %s: %d entries were of other images, captions or settings", kind, outdated)
        if foreign and self._options.caches.skip_cache_check:
            logger.warning("cache %s: %d .npz of another program are used as they are", kind, foreign)
        elif foreign:
            logger.warning(
                "cache %s: %d .npz of another program do not say of which %s they are: computed anew. "
                "--skip_cache_check uses such files as they are",
                kind,
                foreign,
                _MADE_OF[kind],
            )
        if damaged := [name for one in everywhere for name in one.damaged]:
            more = f"; and {len(damaged) - _NAMED} more" if len(damaged) > _NAMED else ""
            listed = "; ".join(damaged[:_NAMED])
            logger.warning("cache %s: computed anew, because it was damaged: %s%s", kind, listed, more)
        if bad:
            logger.warning("cache %s: %d samples cannot be encoded; others take their places", kind, bad)


def _latent_bytes(data: TrainingData, encoders: Encoders) -> int:
    """What the moments of all images take, those of mirrored ones with them."""
    buckets = data.buckets
    sizes_K = np.array([encoders.image_bytes(*buckets.size(bucket)) for bucket in range(len(buckets.sizes_K2))])
    variants_S = np.array([1 + data.options.subsets[source.subset].flip_aug for source in data.index.sources])
    images_SK = buckets.images_SK.astype(np.int64) + buckets.held_SK
    return int(variants_S @ images_SK @ sizes_K)


def _check_bad(data: TrainingData, bad: dict[int, str], options: TrainingOptions) -> None:
    """Refuse what training would refuse when it came to these samples."""
    named = [(data.index.name(row), reason) for row, reason in sorted(bad.items())]
    check_left_out(named, len(data.index) - len(named), options.data.max_bad_samples)


def _check_memory(kind: str, needed_bytes: int, processes: int) -> None:
    """Say how much memory a cache takes.

    Raises:
        InputError: more than there is.
    """
    logger.info("cache %s in memory: %.2f GiB a process", kind, needed_bytes / _GIB)
    available = _available_bytes()
    if needed_bytes * processes > available:
        raise InputError(
            f"--cache_{kind}: takes {needed_bytes / _GIB:.1f} GiB of memory in each of {processes} processes, and "
            f"{available / _GIB:.1f} GiB are free. Use --cache_{kind}_to_disk"
        )


def _available_bytes() -> int:
    """Memory that this machine, or the container that this runs in, can still give."""
    available = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        available = 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    with suppress(OSError, ValueError):
        group = Path("/sys/fs/cgroup")
        limit = int((group / "memory.max").read_text(encoding="ascii"))  # "max" is no limit, and a ValueError
        available = min(available, limit - int((group / "memory.current").read_text(encoding="ascii")))
    return available


def _sharers(roots: Sequence[Path], accelerator: Accelerator) -> dict[Path, tuple[int, int]]:
    """Of each folder: this process's place among those that see the same one, and how many they are."""
    (token,) = broadcast_object_list([secrets.token_hex(4)])
    rank = accelerator.process_index
    for root in roots:
        root.mkdir(parents=True, exist_ok=True)
        (root / f".process.{token}.{rank}").touch()
    accelerator.wait_for_everyone()
    views = [sorted(int(path.suffix[1:]) for path in root.glob(f".process.{token}.*")) for root in roots]
    all_views = gather_object([views])
    for root in roots:
        (root / f".process.{token}.{rank}").unlink(missing_ok=True)
    shares = {}
    for number, root in enumerate(roots):
        members = views[number]
        # Where a network disk shows some of them late, each does all rather than nobody something.
        agreed = rank in members and all(all_views[other][number] == members for other in members)
        shares[root] = (members.index(rank), len(members)) if agreed else (0, 1)
    return shares


@contextmanager
def _bar(name: str, shown: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over this process's share."""
    with ProgressBar(desc=name, disable=not shown, mininterval=0.5) as bar:

        def show(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        yield show
