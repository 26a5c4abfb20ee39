"""The table of all images of a run: where their bytes are, how large they are, where their captions are."""

from collections import Counter
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from threading import Lock

import numpy as np

from library.data.folders import Subset, dreambooth_subset, image_files, listing, scan_folder
from library.data.index_cache import IndexCache, cache_for, file_state
from library.data.rows import IMAGE_EXTENSIONS, CaptionKind, Part, printable
from library.data.shards import scan_shard
from library.data.tar_headers import looks_like_tar
from library.errors import InputError

_NAMED = 5  # so many names of a long list stand in a message
_SCAN_THREADS = 8


@dataclass(frozen=True)
class Source:
    """A shard or a folder; its images are shown `repeats` times in an epoch."""

    path: Path
    is_shard: bool
    repeats: int = 1

    def name(self, key: str) -> str:
        """What messages call its image of that key."""
        return printable(f"{self.path}:{key}" if self.is_shard else str(self.path / key))


@dataclass(frozen=True)
class Index:
    """All rows of a run, in an order that depends on the data alone: shards by name, then folders by name.

    Attributes:
        sources: what the rows' `source` numbers.
        rows: array of rows.ROW.
        text: uint8, the bytes that rows point into for names and stored captions.
        caption_extension: of the caption files in folders.
        warnings: sentences for the user.
        bad: (name, reason) of images that were left out.
    """

    sources: tuple[Source, ...]
    rows: np.ndarray
    text: np.ndarray
    caption_extension: str
    warnings: tuple[str, ...] = ()
    bad: tuple[tuple[str, str], ...] = ()

    def __len__(self) -> int:
        return len(self.rows)

    def source(self, row: int) -> Source:
        """Where a row comes from."""
        return self.sources[self.rows["source"][row]]

    def key(self, row: int) -> str:
        """The sample's key in its shard, or the file's name in its folder."""
        offset = int(self.rows["name_offset"][row])
        return self.stored_text(offset, int(self.rows["name_bytes"][row]))

    def name(self, row: int) -> str:
        """What messages call an image: "shards/00000.tar:0000002", or the path of its file."""
        return self.source(row).name(self.key(row))

    def stored_text(self, offset: int, size: int) -> str:
        """Text that a row points to."""
        return self.text[offset : offset + size].tobytes().decode("utf-8", "surrogateescape")

    @property
    def repeats(self) -> np.ndarray:
        """(rows,) int32: how often an epoch shows each row."""
        return np.array([source.repeats for source in self.sources], np.int32)[self.rows["source"]]


@dataclass
class _Found:
    """What is to be scanned, found by looking at names only."""

    shards: list[Path] = field(default_factory=list)
    subsets: list[Subset] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def build_index(
    train_data_dir: Path,
    caption_extension: str,
    *,
    use_cache: bool = True,
    progress: Callable[[int, int], None] = lambda done, total: None,
) -> Index:
    """Index a folder of LAION shards and of images, or one shard.

    Args:
        train_data_dir: the folder (its sub-directories count only when they are named `N_class words`), or a tar file.
        caption_extension: with its dot, ".txt".
        use_cache: keep what was found, beside the data where that may be written.
        progress: called with (done, total), shards and images in folders counted; one call at a time, but not
            always from the caller's thread.

    Raises:
        InputError: no such folder, no image found, or no image has a caption.
    """
    with _read_errors(train_data_dir):
        found = _find(train_data_dir)
        if not found.shards and not found.subsets:
            raise InputError(_nothing_found(train_data_dir))
        cache = cache_for(train_data_dir) if use_cache else IndexCache(None)
        parts = _scan(found, caption_extension, cache, progress)
    sources = [Source(path, True) for path in found.shards]
    sources += [Source(subset.folder, False, subset.repeats) for subset in found.subsets]
    index = _joined(sources, parts, caption_extension, found.warnings)
    if not len(index):
        raise InputError(_no_usable_image(train_data_dir, index, parts))
    return _with_caption_check(index, train_data_dir, parts)


@contextmanager
def _read_errors(data: Path) -> Iterator[None]:
    """An operating system's error while reading the data becomes an InputError."""
    try:
        yield
    except OSError as error:
        raise InputError(
            f"--train_data_dir {data}: {error.filename or data} cannot be read: {error.strerror}"
        ) from error


def _find(data: Path) -> _Found:
    """What there is to scan."""
    if data.is_file():
        if looks_like_tar(data):
            return _Found(shards=[data])
        raise InputError(
            f"--train_data_dir {data} is a file, but not a tar. Name a folder of shards or images, or a tar."
        )
    if not data.is_dir():
        raise InputError(f"--train_data_dir {data}: there is no such folder.")
    found = _Found(shards=sorted(path for path in data.glob("*.tar") if path.is_file()))
    folders = sorted(path for path in data.iterdir() if path.is_dir() and not path.name.startswith("."))
    subsets = [subset for subset in map(dreambooth_subset, folders) if subset is not None]
    found.subsets = [subset for subset in subsets if subset.repeats > 0]
    images = image_files(data)
    if not found.subsets and images:
        found.subsets = [Subset(data, 1, "")]
    elif images:
        found.warnings.append(
            f"{len(images)} images directly in {data} are not used, because it has sub-directories named "
            "'N_class words'."
        )
    if found.shards or found.subsets:
        used = {subset.folder for subset in found.subsets}
        for folder in folders:
            if folder not in used and (count := len(image_files(folder))):
                found.warnings.append(
                    f"{count} images in {folder} are not used: its name is not 'N_class words' (N ≥ 1)."
                )
    if found.subsets and dreambooth_subset(data):
        found.warnings.append(
            f"{data} itself is named like a DreamBooth sub-directory. To have its images repeated and captioned by "
            f"its name, give its parent folder as --train_data_dir."
        )
    return found


def _scan(found: _Found, caption_extension: str, cache: IndexCache, progress: Callable[[int, int], None]) -> list[Part]:
    """The tables of all sources, in their order; several at a time."""
    total = len(found.shards) + sum(len(image_files(subset.folder)) for subset in found.subsets)
    done, one_at_a_time = 0, Lock()

    def advance() -> None:
        nonlocal done
        with one_at_a_time:
            done += 1
            progress(min(done, total), total)

    def shard(path: Path) -> Part:
        state = [file_state(path), file_state(path.with_suffix(".parquet")), caption_extension]
        part = cache.get(path.name, state, partial(scan_shard, path, caption_extension))
        advance()
        return part

    def folder(subset: Subset) -> Part:
        state = [listing(subset.folder), subset.class_words, caption_extension]
        scan = partial(scan_folder, subset, caption_extension, advance)
        return cache.get(f"{subset.folder.name}/", state, scan)

    progress(0, total)
    with ThreadPoolExecutor(_SCAN_THREADS) as pool:
        try:
            shards = pool.map(shard, found.shards)
            folders = pool.map(folder, found.subsets)
            parts = [*shards, *folders]
        except BaseException:  # Ctrl-C, too, does not wait for what has not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    progress(total, total)
    return parts


def _joined(sources: list[Source], parts: list[Part], caption_extension: str, warnings: list[str]) -> Index:
    """One table of all parts."""
    text_start = 0
    tables = []
    for number, part in enumerate(parts):
        rows = part.rows.copy()
        rows["source"] = number
        rows["name_offset"] += text_start
        rows["caption_offset"][rows["caption_kind"] == CaptionKind.STORED] += text_start
        text_start += len(part.text)
        tables.append(rows)
        warnings = warnings + [f"{sources[number].path}: {warning}" for warning in part.warnings]
    bad = _bad(sources, parts)
    if bad:
        warnings.append(
            f"{len(bad)} images cannot be read and are left out: {_some([': '.join(entry) for entry in bad])}"
        )
    if without := sum(part.without_image for part in parts):
        strange = sum((part.strange_extensions for part in parts), Counter()).most_common(_NAMED)
        warnings.append(
            f"{without} samples in the shards have no image ({_extensions()}), only "
            f"{', '.join(extension for extension, _ in strange)}; they are left out."
        )
    return Index(
        tuple(sources),
        np.concatenate(tables),
        np.concatenate([part.text for part in parts]),
        caption_extension,
        tuple(warnings),
        bad,
    )


def _bad(sources: list[Source], parts: list[Part]) -> tuple[tuple[str, str], ...]:
    """(name, reason) of what the scans left out."""
    pairs = zip(sources, parts, strict=True)
    return tuple((source.name(key), reason) for source, part in pairs for key, reason in part.bad)


def _with_caption_check(index: Index, data: Path, parts: list[Part]) -> Index:
    """The index, with a warning where captions are missing.

    Raises:
        InputError: they are missing for all.
    """
    missing = np.flatnonzero(index.rows["caption_kind"] == CaptionKind.ABSENT)
    if not len(missing):
        return index
    others = sum((part.other_captions for part in parts), Counter())
    hint = ""
    if others:
        extension, count = others.most_common(1)[0]
        hint = f" {count} of them have a file ending in '{extension}': give --caption_extension {extension}."
    looked_for = f"'{index.caption_extension}' (--caption_extension)"
    if len(missing) == len(index):
        raise InputError(
            f"--train_data_dir {data}: none of the {len(index)} images has a caption. Looked for a file of the image's "
            f"name ending in {looked_for}; in shards also for 'caption' in the .json and the .parquet.{hint}"
        )
    warning = (
        f"{len(missing)} of {len(index)} images have no caption ending in {looked_for} and train with an empty one: "
        f"{_some([index.name(int(row)) for row in missing[:_NAMED]], len(missing))}.{hint}"
    )
    return Index(index.sources, index.rows, index.text, index.caption_extension, (*index.warnings, warning), index.bad)


def _nothing_found(data: Path) -> str:
    """The message when neither shards nor images are where they are looked for."""
    deeper = next(
        (path for path in sorted(data.rglob("*")) if path.suffix.lower() in {*IMAGE_EXTENSIONS, ".tar"}), None
    )
    hint = ""
    if deeper is not None:
        hint = (
            f" There is {deeper}, deeper than is looked: give --train_data_dir {deeper.parent}, or name the "
            f"sub-directory 'N_class words' (N: how often an epoch shows its images)."
        )
    return (
        f"--train_data_dir {data}: 0 images found. Looked there for shards (*.tar), images ({_extensions()}) "
        f"and sub-directories named 'N_class words'.{hint}"
    )


def _no_usable_image(data: Path, index: Index, parts: list[Part]) -> str:
    """The message when there are sources, but not one image in them."""
    sources = f"{len(parts)} shards and folders (images are {_extensions()})"
    return f"--train_data_dir {data}: 0 images found in {sources}. {' '.join(index.warnings[:_NAMED])}".rstrip()


def _extensions() -> str:
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _some(names: list[str], count: int | None = None) -> str:
    """The first few of a list."""
    count = len(names) if count is None else count
    return "; ".join(names[:_NAMED]) + (f"; and {count - _NAMED} more" if count > _NAMED else "")
