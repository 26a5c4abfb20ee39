"""Rows of images in a folder with caption files beside them."""

import contextlib
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePath

from library.data.bad_samples import SampleError
from library.data.image_header import HEADER_BYTES, MAX_BYTES, upright_size
from library.data.index.extras import FolderExtras, extra_arrays, places_in_folder
from library.data.index.rows import (
    COMMON_CAPTION_EXTENSIONS,
    MAX_CAPTION_BYTES,
    CaptionKind,
    Part,
    TextPool,
    row_array,
)
from library.data.index.sources import FileState, Source, is_image


def scan_folder(
    source: Source,
    files: Sequence[FileState],
    captions: Mapping[str, str] | None = None,
    extras: FolderExtras | None = None,
) -> Part:
    """Rows of the images among a folder's files, in their order; sizes come from the images' headers.

    The caption file has the image's stem and the source's caption extension; an image without one, or with an empty
    one, gets the class words.

    Args:
        captions: by name, from metadata; they come before caption files.
        extras: the files of extra images; an image that lacks one that the source wants is bad.
    """
    captions = captions or {}
    sizes = {file.name: file.size for file in files}
    pool = TextPool()
    part = Part(row_array([]), pool.array())
    rows, places = [], []
    for name in filter(is_image, sizes):
        stem = PurePath(name).stem
        try:
            if sizes[name] > MAX_BYTES:
                raise SampleError(f"an image file of {sizes[name]} bytes, {MAX_BYTES} are the most")
            caption_bytes = sizes.get(stem + source.caption_extension, 0)
            if caption_bytes > MAX_CAPTION_BYTES:
                raise SampleError(f"a caption of {caption_bytes} bytes, {MAX_CAPTION_BYTES} are the most")
            width_height = _size_from_image(source.path / name)
            own_extras = places_in_folder(source.extras, extras or {}, name, pool)
        except SampleError as error:
            part.bad.append((name, str(error)))
            continue
        if captions.get(name):
            caption = (CaptionKind.STORED, *pool.add(captions[name]))
        elif caption_bytes:
            caption = (CaptionKind.PLAIN, 0, caption_bytes)
        elif source.class_words:
            caption = (CaptionKind.STORED, *pool.add(source.class_words))
        else:
            caption = (CaptionKind.ABSENT, 0, 0)
        rows.append((0, sizes[name], *caption, *pool.add(name), *width_height))
        places.append(own_extras)
        part.other_captions.update(
            other for other in COMMON_CAPTION_EXTENSIONS if other != source.caption_extension and stem + other in sizes
        )
    part.rows, part.text = row_array(rows), pool.array()
    part.extras = extra_arrays(source.extras, places)
    return part


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
