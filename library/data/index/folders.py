"""Rows of images in a folder with caption files beside them."""

import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path, PurePath

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_lines, caption_text, check_characters, is_json_name
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import MAX_BYTES, Header, header
from library.data.index.extras import FolderExtras, extra_arrays, places_in_folder
from library.data.index.folder_walk import is_image, stem_of
from library.data.index.rows import (
    COMMON_CAPTION_EXTENSIONS,
    FACE_NUMBERS,
    CaptionKind,
    Part,
    TextPool,
    row_array,
)
from library.data.index.sources import FileState, Source

_OTHER_EXTENSIONS = (*COMMON_CAPTION_EXTENSIONS, ".json")


def scan_folder(
    source: Source,
    files: Sequence[FileState],
    captions: Mapping[str, str] | None = None,
    extras: FolderExtras | None = None,
) -> Part:
    """Rows of the images among a folder's files, in their order; sizes come from the images' headers.

    The caption is the metadata's, else that of the caption file, else the class words. The caption file has the image's
    stem and the source's caption extension; where there is none, and the stem tells of a face, it may have the stem
    without the face's numbers, as in sd-scripts.

    Args:
        captions: by name, from metadata.
        extras: the files of extra images; an image that lacks one that the source wants is bad.
    """
    captions = captions or {}
    sizes = {file.name: file.size for file in files}
    small_letters = {name.lower(): name for name in sizes}
    pool = TextPool()
    part = Part(row_array([]), pool.array())
    rows, places = [], []
    for name in filter(is_image, sizes):
        try:
            if sizes[name] > MAX_BYTES:
                raise SampleError(f"an image file of {sizes[name]} bytes, {MAX_BYTES} are the most")
            caption = _caption(source, name, sizes, captions.get(name, ""), pool, part)
            found = _header(source.path / name, sizes[name])
            own_extras = places_in_folder(source.extras, extras or {}, name, pool)
        except SampleError as error:
            part.bad.append((name, str(error)))
            continue
        rows.append((0, sizes[name], *caption, *pool.add(name), *found.upright_wh_px))
        part.note_profile(name, found.profile)
        places.append(own_extras)
        part.other_captions.update(_other_captions(name, source.caption_extension, sizes, small_letters))
    part.rows, part.text = row_array(rows), pool.array()
    part.extras = extra_arrays(source.extras, places)
    return part


def _caption(
    source: Source, name: str, sizes: Mapping[str, int], of_metadata: str, pool: TextPool, part: Part
) -> tuple[int, int, int]:
    """Where the caption of an image is, as its row says it; blank captions and those of many lines are noted.

    Args:
        sizes: of the folder's files, by name.
        of_metadata: "" where that says nothing.

    Raises:
        SampleError: the caption file cannot be read, or the caption is too long.
    """
    caption = caption_lines(check_characters(of_metadata))
    where: tuple[int, int, int] = (CaptionKind.ABSENT, 0, 0)
    if caption:
        if len(caption) > MAX_CAPTION_BYTES:
            raise SampleError(f"a caption of {len(caption)} characters, {MAX_CAPTION_BYTES} are the most")
        where = (CaptionKind.STORED, *pool.add(caption))
    elif (file := _caption_file(stem_of(name), source.caption_extension, sizes)) is not None:
        less, file_name = file
        is_json = is_json_name(source.caption_extension)
        caption = caption_text(_bytes_of(source.path / file_name, sizes[file_name]), is_json)
        if caption:
            where = (CaptionKind.JSON if is_json else CaptionKind.PLAIN, less, sizes[file_name])
        else:
            part.blank.append(name)
    if not caption and source.class_words:
        where = (CaptionKind.STORED, *pool.add(source.class_words))
    if "\n" in caption:
        part.many_lines.append(name)
    return where


def _other_captions(
    name: str, extension: str, files: Mapping[str, int], small_letters: Mapping[str, str]
) -> Iterator[str]:
    """Which other caption files an image has, that may be meant: extensions, or "NAME…" of whole names.

    Args:
        small_letters: the files' names by themselves in small letters.
    """
    stem = stem_of(name)
    if stem + extension in files:
        return
    yield from (other for other in _OTHER_EXTENSIONS if other != extension and stem + other in files)
    if (other := small_letters.get((stem + extension).lower())) is not None:
        yield other[len(stem) :] if other.startswith(stem) else f"NAME{extension}, but for capital letters"
    if name + extension in files:
        yield f"NAME{PurePath(name).suffix}{extension}"


def _caption_file(stem: str, extension: str, files: Mapping[str, int]) -> tuple[int, str] | None:
    """An image's caption file, and how many characters of the image's stem its own has less; None if there is none."""
    face = FACE_NUMBERS.search(stem)
    for less in (0, len(stem) - face.start()) if face is not None else (0,):
        name = f"{stem[: len(stem) - less]}{extension}"
        if name in files:
            return less, name
    return None


def _bytes_of(path: Path, size: int) -> bytes:
    if size > MAX_CAPTION_BYTES:
        raise SampleError(f"a caption of {size} bytes, {MAX_CAPTION_BYTES} are the most")
    try:
        return path.read_bytes()
    except OSError as error:
        raise SampleError(f"its caption cannot be read: {error.strerror}") from error


def _header(path: Path, file_bytes: int) -> Header:
    """What the image's header says."""
    try:
        with path.open("rb", buffering=0) as file:
            return header(FileBytes(lambda offset, count: os.pread(file.fileno(), count, offset), file_bytes))
    except OSError as error:
        raise SampleError(f"cannot be read: {error.strerror}") from error
