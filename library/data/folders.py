"""Rows of one folder of images with caption files beside them, and the DreamBooth sub-directories of a base folder."""

import contextlib
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePath

from library.data.decode import HEADER_BYTES, MAX_BYTES, SampleError, upright_size
from library.data.rows import (
    COMMON_CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    MAX_CAPTION_BYTES,
    CaptionKind,
    Part,
    TextPool,
    row_array,
)

_DREAMBOOTH = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Subset:
    """A folder of images: how often an epoch shows each, and the caption of those without a caption file ("": none)."""

    folder: Path
    repeats: int
    class_words: str


def dreambooth_subset(folder: Path) -> Subset | None:
    """The subset that a directory named `N_class words` is; None for another name."""
    match = _DREAMBOOTH.fullmatch(folder.name)
    return Subset(folder, int(match[1]), match[2].strip()) if match else None


def image_files(folder: Path) -> list[str]:
    """Names of the image files directly in a folder, sorted."""
    with os.scandir(folder) as entries:
        return sorted(entry.name for entry in entries if _is_image(entry.name) and entry.is_file())


def listing(folder: Path) -> list[tuple[str, int, int]]:
    """(name, bytes, mtime in ns) of every file directly in a folder, sorted: any change of the folder changes it."""
    with os.scandir(folder) as entries:
        files = [(entry.name, entry.stat()) for entry in entries if entry.is_file()]
    return sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in files)


def scan_folder(subset: Subset, caption_extension: str, progress: Callable[[], None] = lambda: None) -> Part:
    """Rows of the images directly in a folder, sorted by name; sizes come from the images' headers.

    The caption file has the image's stem and caption_extension; an image without one, or with an empty one, gets the
    class words.

    Args:
        progress: called after each image.

    Raises:
        OSError: the folder cannot be read.
    """
    sizes = {name: size for name, size, _ in listing(subset.folder)}
    pool = TextPool()
    part = Part(row_array([]), pool.array())
    rows = []
    for name in filter(_is_image, sizes):
        progress()
        stem = PurePath(name).stem
        try:
            if sizes[name] > MAX_BYTES:
                raise SampleError(f"an image file of {sizes[name]} bytes, {MAX_BYTES} are the most")
            caption_bytes = sizes.get(stem + caption_extension, 0)
            if caption_bytes > MAX_CAPTION_BYTES:
                raise SampleError(f"a caption of {caption_bytes} bytes, {MAX_CAPTION_BYTES} are the most")
            width_height = _size_from_image(subset.folder / name)
        except SampleError as error:
            part.bad.append((name, str(error)))
            continue
        if caption_bytes:
            caption = (CaptionKind.PLAIN, 0, caption_bytes)
        elif subset.class_words:
            caption = (CaptionKind.STORED, *pool.add(subset.class_words))
        else:
            caption = (CaptionKind.ABSENT, 0, 0)
        rows.append((0, 0, sizes[name], *caption, *pool.add(name), *width_height))
        part.other_captions.update(
            other for other in COMMON_CAPTION_EXTENSIONS if other != caption_extension and stem + other in sizes
        )
    part.rows, part.text = row_array(rows), pool.array()
    return part


def _is_image(name: str) -> bool:
    return PurePath(name).suffix.lower() in IMAGE_EXTENSIONS


def _size_from_image(path: Path) -> tuple[int, int]:
    """The upright size from the image's header: its beginning is enough, unless much metadata comes before."""
    try:
        with path.open("rb") as file:
            start = file.read(HEADER_BYTES)
            with contextlib.suppress(SampleError):
                return upright_size(start)
            return upright_size(start + file.read(MAX_BYTES))
    except OSError as error:
        raise SampleError(f"cannot be read: {error.strerror}") from error
