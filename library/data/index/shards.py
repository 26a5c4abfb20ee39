"""Rows of one LAION shard: a tar of KEY.jpg, KEY.json and KEY.txt, and the parquet file beside it."""

import json
import os
from dataclasses import dataclass, field
from pathlib import Path

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_lines, caption_text, check_characters, is_json_name
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import MAX_BYTES, header, header_if_known
from library.data.index.extras import extra_arrays, places_in_shard
from library.data.index.rows import (
    COMMON_CAPTION_EXTENSIONS,
    IMAGE_EXTENSIONS,
    CaptionKind,
    Part,
    TextPool,
    printable,
    row_array,
)
from library.data.index.sources import Source
from library.data.index.tar_headers import Member, TornTarError, members


@dataclass
class _Sample:
    """Members of one key, and whether the table's text was stored for it."""

    image: Member | None = None
    others: dict[str, Member] = field(default_factory=dict)  # by extension
    images: int = 0


@dataclass(frozen=True)
class _Facts:
    """What sidecar or JSON say of a sample."""

    width: int = 0
    height: int = 0
    caption: str | None = None


def scan_shard(source: Source) -> Part:
    """One pass over the tar's headers, and over its parquet file; of images only the headers are read.

    The caption is the member with the source's caption extension, else the JSON member's "caption", else the parquet's,
    else the class words. The size is the parquet's, else the JSON's, else from the image's header, and always from
    there if EXIF turns the image. A tar that is cut short gives its whole samples and a warning. What has no image, two
    of them, not each extra image that the source wants, or a name that leads out of the tar, and what only the parquet
    knows of, is bad.

    Raises:
        OSError: the shard cannot be opened.
    """
    fd = os.open(source.path, os.O_RDONLY)
    try:
        samples, torn, cut = _samples(fd)
        sidecar, warnings = _read_sidecar(source.path.with_suffix(".parquet"))
        pool = TextPool()
        part = Part(row_array([]), pool.array())
        rows, places = [], []
        for key, sample in samples.items():
            if sample.image is None:
                part.without_image += 1
                part.strange_extensions.update(sample.others.keys())
                part.bad.append((key, f"no image, only {' '.join(sorted(sample.others))}"))
                continue
            facts = sidecar.get(key.rpartition("/")[2])
            try:
                _check(key, sample)
                extras = places_in_shard(source.extras, sample.others)
                rows.append(_row(fd, key, sample.image, sample.others, facts, source, pool, part))
                places.append(extras)
            except SampleError as error:
                part.bad.append((key, str(error)))
                continue
            part.other_captions.update(_other_caption_extensions(sample.others, source.caption_extension))
    finally:
        os.close(fd)
    if cut:
        part.bad.append((cut, "its shard ends or is damaged within it"))
    present = {key.rpartition("/")[2] for key in (*samples, cut)}
    part.bad += [(key, "its shard's parquet has it, the tar does not") for key in sidecar if key not in present]
    if torn:
        warnings.append(f"{torn}; the {len(rows)} whole samples before that are used. Fetch this shard again.")
    part.rows, part.text, part.warnings = row_array(rows), pool.array(), warnings
    part.extras = extra_arrays(source.extras, places)
    return part


def _samples(fd: int) -> tuple[dict[str, _Sample], str, str]:
    """Members by key (the base name up to its first dot, as in webdataset).

    Then why the tar ended early, and the key of the sample that it ended in, which may lack members ("" if it did not).
    """
    samples: dict[str, _Sample] = {}
    key = ""
    try:
        for member in members(fd):
            folder, _, name = member.name.removeprefix("./").rpartition("/")
            base, _, extension = name.partition(".")
            extension = printable(f".{extension.lower()}")
            if not base or extension == ".":
                continue
            # The folder belongs to the key, so that a/1.jpg and b/1.jpg stay two samples.
            key = f"{folder}/{base}" if folder else base
            sample = samples.setdefault(key, _Sample())
            if extension in IMAGE_EXTENSIONS:
                sample.image = member
                sample.images += 1
            else:
                sample.others[extension] = member
    except TornTarError as error:
        samples.pop(key, None)
        return samples, str(error), key
    return samples, "", ""


def _check(key: str, sample: _Sample) -> None:
    """What makes a sample bad before anything of it is read.

    Raises:
        SampleError: with the reason.
    """
    if key.startswith("/") or ".." in key.split("/"):
        raise SampleError("its name in the tar leads out of the folder that it would be unpacked to")
    if sample.images > 1:
        raise SampleError(f"{sample.images} images of one name in the tar")
    if sample.image is not None and sample.image.size > MAX_BYTES:
        raise SampleError(f"an image file of {sample.image.size} bytes, {MAX_BYTES} are the most")


def _row(
    fd: int,
    key: str,
    image: Member,
    others: dict[str, Member],
    facts: _Facts | None,
    source: Source,
    pool: TextPool,
    part: Part,
) -> tuple[int, ...]:
    """One row in ROW's order. A blank caption member and a caption of many lines are noted in the part.

    Raises:
        SampleError: no size is given and the image's header cannot be read, or the caption cannot be, or is too long.
    """
    plain = None if is_json_name(source.caption_extension) else others.get(source.caption_extension.lower())
    caption_of_plain = _plain_caption(fd, plain)
    has_size = facts is not None and facts.width > 0 and facts.height > 0
    json_facts = _Facts() if caption_of_plain and has_size else _read_json(fd, others.get(".json"))
    if plain is not None and not caption_of_plain:
        part.blank.append(key)
    text = caption_of_plain or json_facts.caption or (facts.caption if facts is not None else None)
    if plain is not None and caption_of_plain:
        caption = (CaptionKind.PLAIN, plain.offset, plain.size)
    elif json_facts.caption:
        check_characters(json_facts.caption)
        caption = (CaptionKind.JSON, others[".json"].offset, others[".json"].size)
    elif facts is not None and facts.caption:
        caption = (CaptionKind.STORED, *pool.add(facts.caption))
    elif source.class_words:
        caption = (CaptionKind.STORED, *pool.add(source.class_words))
    else:
        caption = (CaptionKind.ABSENT, 0, 0)
    told = facts if facts is not None and has_size else json_facts
    if told.width > 0 and told.height > 0:
        found = header_if_known(_bytes_of(fd, image))
        # Those who write such files give the size as stored: of what EXIF turns, the header is asked.
        size = found.upright_wh_px if found.is_turned else (told.width, told.height)
    else:
        found = header(_bytes_of(fd, image))
        size = found.upright_wh_px
    part.note_profile(key, found.profile)
    if text and "\n" in caption_lines(text):
        part.many_lines.append(key)
    return (image.offset, image.size, *caption, *pool.add(key), *size)


def _plain_caption(fd: int, member: Member | None) -> str:
    """The caption in a member that is a text; "" from one that is missing or blank.

    Raises:
        SampleError: it is too long, or in an unknown encoding.
    """
    if member is None or not member.size:
        return ""
    if member.size > MAX_CAPTION_BYTES:
        raise SampleError(f"a caption of {member.size} bytes, {MAX_CAPTION_BYTES} are the most")
    return caption_text(os.pread(fd, member.size, member.offset), is_json=False)


def _bytes_of(fd: int, image: Member) -> FileBytes:
    """An image's bytes in the shard."""
    return FileBytes(lambda offset, count: os.pread(fd, count, image.offset + offset), image.size)


def _read_json(fd: int, member: Member | None) -> _Facts:
    """Size and caption from a sample's JSON member; nothing from one that is missing or damaged."""
    if member is None or member.size > MAX_CAPTION_BYTES:
        return _Facts()
    try:
        content = json.loads(os.pread(fd, member.size, member.offset))
    except (ValueError, RecursionError):  # ValueError: also of bytes that are not UTF-8
        return _Facts()
    if not isinstance(content, dict):
        return _Facts()
    return _Facts(_pixels(content.get("width")), _pixels(content.get("height")), _caption(content.get("caption")))


def _read_sidecar(path: Path) -> tuple[dict[str, _Facts], list[str]]:
    """Facts by key from a shard's parquet file, successful rows only, and warnings; nothing where there is no file."""
    if not path.is_file():
        return {}, []
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.ParquetFile(path)
        present = [name for name in ("key", "status", "width", "height", "caption") if name in file.schema_arrow.names]
        table = file.read(columns=present)
        columns = {name: table[name].to_pylist() for name in present}
    except (pa.ArrowException, OSError, ValueError) as error:  # ValueError: text that is not UTF-8
        reason = " ".join(str(error).split())
        return {}, [f"its parquet file cannot be read ({reason}); sizes come from the shard itself."]
    if "key" not in present:
        return {}, ["its parquet file has no column 'key'; sizes come from the shard itself."]
    nothing = [None] * table.num_rows
    rows = zip(
        columns["key"],
        columns.get("status", ["success"] * table.num_rows),
        columns.get("width", nothing),
        columns.get("height", nothing),
        columns.get("caption", nothing),
        strict=True,
    )
    return {
        str(key): _Facts(_pixels(width), _pixels(height), _caption(caption))
        for key, status, width, height, caption in rows
        if status == "success"
    }, []


def _pixels(value: object) -> int:
    """A size that a file gives, 0 unless it is a sensible whole number."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    return value if isinstance(value, int) and 0 < value < 1 << 31 else 0


def _caption(value: object) -> str | None:
    """A caption that a file gives; None if there is none or it is empty."""
    return value if isinstance(value, str) and value.strip() else None


def _other_caption_extensions(others: dict[str, Member], caption_extension: str) -> list[str]:
    return [name for name in COMMON_CAPTION_EXTENSIONS if name != caption_extension and name in others]
