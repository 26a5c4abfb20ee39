"""Where caches on disk lie: beside the images of plain folders, else in block files beside the data or the output."""

import os
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import chain
from pathlib import Path

from library.data.cache.block_files import PARTIAL_BLOCKS, BlockShelf
from library.data.cache.entries import BorrowingShelf, Shelf
from library.data.cache.npz_files import Beside, NpzShelf, Picture, TextLayout, TextOutputs
from library.data.cache.settings import Settings
from library.data.index.folder_use import may_write
from library.data.index.kept_tables import digest, kept_name
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets

_FOLDER = ".encoding_cache"
_MOST_STEM_BYTES = 220  # of an image's name, so that what is added to it for its .npz has room in a name of 255
_LEFT_BEHIND_SECONDS = 24 * 3600  # what a killed process left half written is deleted when it is older

BesideOf = Callable[[int], Callable[[int], Beside]]  # from a source's number and a place in it to the row's .npz


def cache_root(data: Path, output_dir: Path) -> Path:
    """The folder of a subset's block files: beside the data, or in --output_dir where that may not be written."""
    beside = _beside(data)
    of_kinds = _folders_in(beside)
    of_sources = (folder for kind in of_kinds for folder in _folders_in(kind))
    if all(map(may_write, chain((beside,), of_kinds, of_sources))):  # another user may have made some of them
        return beside
    return output_dir / "cache" / digest(str(beside.parent.resolve()))


def _folders_in(folder: Path) -> list[Path]:
    """The folders in a folder; none where it is not there or may not be read."""
    try:
        with os.scandir(folder) as entries:
            return [Path(entry.path) for entry in entries if entry.is_dir()]
    except OSError:
        return []


def _beside(data: Path) -> Path:
    """The folder of block files beside the data, which all its users share."""
    return (data if data.is_dir() else data.parent) / _FOLDER


def sources_beside_images(index: Index) -> frozenset[int]:
    """Sources whose entries can be .npz beside the images: one source a folder, and one image a name.

    In a folder that may not be written to, those of another user are read.
    """
    seen: set[tuple[Path, tuple[int, int]]] = set()
    found = []
    for number, source in enumerate(index.sources):
        if source.is_shard or (source.path, source.share) in seen:
            continue
        seen.add((source.path, source.share))
        rows = range(int(index.starts_S[number]), int(index.starts_S[number + 1]))
        stems = {Path(index.key(row)).stem for row in rows}
        if len(stems) == len(rows) and all(len(os.fsencode(stem)) <= _MOST_STEM_BYTES for stem in stems):
            found.append(number)
    return frozenset(found)


def disk_shelf(
    index: Index,
    kind: str,
    settings: Settings,
    beside: BesideOf,
    roots: Sequence[Path],
    npz: frozenset[int],
    number: int,
) -> Shelf:
    """The shelf of a source; other settings have another.

    Args:
        settings: what the entries are made with.
        roots: of each subset, the folder of its block files.
        npz: the sources whose entries can lie beside the images.
    """
    source = index.sources[number]
    data = index.subsets[source.subset].path
    if number in npz and may_write(source.path):
        return NpzShelf(beside(number))
    name = str(source.path.relative_to(data))
    made_from = [source.subset, source.share, source.caption_extension, settings.of_source(number)]
    folder = Path(kind) / kept_name(name, made_from, index.tables[number].notes["digest"])
    own = BlockShelf(roots[source.subset] / folder)
    if number in npz:
        return BorrowingShelf(own, NpzShelf(beside(number)))
    of_all = _beside(data)
    return own if roots[source.subset] == of_all else BorrowingShelf(own, BlockShelf(of_all / folder))


def pictures_of(
    index: Index,
    buckets: Buckets,
    settings: Settings,
    mirrored: Sequence[bool],
    ending: str,
    latent_px: int,
    channels: int,
    number: int,
) -> Callable[[int], Picture]:
    """The .npz of the latents of a source's images, by place.

    Args:
        settings: what the entries are made with.
        mirrored: of each subset, whether the latents of mirrored images are kept, too.
        ending: of the files' names, by the model's family.
        latent_px: pixels a side that one latent stands for.
        channels: of the latents.
        number: of the source.
    """
    source = index.sources[number]
    buckets_n, first = buckets.buckets_of(number), int(index.starts_S[number])

    def picture(place: int) -> Picture:
        record = index.record(first + place)
        path = source.path / index.key(first + place)
        size = buckets.size(int(buckets_n[place]))
        size_wh_px = (int(record["width"]), int(record["height"]))
        made_with, is_mirrored = settings(first + place), mirrored[source.subset]
        return Picture(path, made_with, size_wh_px, size, ending, is_mirrored, latent_px, channels)

    return picture


def text_outputs_of(index: Index, settings: Settings, layout: TextLayout, number: int) -> Callable[[int], TextOutputs]:
    """The .npz of what the text encoders make of a source's captions, by place."""
    folder, first = index.sources[number].path, int(index.starts_S[number])
    return lambda place: TextOutputs(folder / index.key(first + place), settings(first + place), layout)


def clear_left_behind(root: Path) -> None:
    """Delete the block files that a killed process left half written."""
    old = time.time() - _LEFT_BEHIND_SECONDS
    for path in root.glob(f"*/*/{PARTIAL_BLOCKS}"):
        with suppress(OSError):
            if path.is_file() and not path.is_symlink() and path.stat().st_mtime < old:
                path.unlink()
