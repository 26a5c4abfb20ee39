"""Rows of one LAION shard: a tar of KEY.jpg, KEY.json and KEY.txt, and the files beside it."""

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass, field

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_lines, caption_text, check_characters, is_json_name
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import MAX_BYTES, header, header_if_known
from library.data.index.extras import extra_arrays, places_in_shard
from library.data.index.rows import COMMON_CAPTION_EXTENSIONS, NAMED, CaptionKind, Part, TextPool, printable, row_array
from library.data.index.shard_members import (
    BEGINNING_BYTES,
    CAME_BEFORE,
    NO_KEY,
    OF_ITS_OWN,
    Group,
    MemberName,
    looks_like_image,
)
from library.data.index.sidecar import Facts, Sidecar, read_sidecar, stated_samples
from library.data.index.sources import Source
from library.data.index.tar_headers import Member, TornTarError, members

_NOT_IN_TAR = "its shard's parquet has it, the tar does not"


@dataclass
class _Scan:
    """What the headers of a tar say.

    Attributes:
        groups: by the part of the tar (one behind each end mark) and the key.
        lost: (name, reason) of images that are in no group.
        members: how many there are.
        torn: why the tar ended early; "" if it did not.
        cut: the key of the sample that it ended in, which may lack members.
    """

    groups: dict[tuple[int, str], Group[Member]] = field(default_factory=dict)
    lost: list[tuple[str, str]] = field(default_factory=list)
    members: int = 0
    torn: str = ""
    cut: str = ""


def scan_shard(source: Source) -> Part:
    """One pass over the tar's headers, and over its parquet file; of images only the headers are read.

    The caption is the member with the source's caption extension, else the JSON member's "caption", else the parquet's,
    else the class words. The size is the parquet's, else the JSON's, else from the image's header, and always from
    there if EXIF turns the image. A tar that is cut short gives its whole samples and a warning. Every image that is
    seen and not used is bad; what only the parquet knows of is, too, and a file that is no tar counts as what its
    parquet or stats say, else as one.

    Raises:
        OSError: the shard cannot be opened.
    """
    fd = os.open(source.path, os.O_RDONLY)
    try:
        scan = _scan(fd)
        groups = list(_samples(scan))
        sidecar = read_sidecar(source.path.with_suffix(".parquet"))
        facts, missing, warning = sidecar.of_keys([*(group.key for group in groups), *([scan.cut] if scan.cut else [])])
        part = Part(row_array([]), TextPool().array(), bad=scan.lost)
        _add_rows(fd, part, groups, facts, source)
    finally:
        os.close(fd)
    part.warnings += [*sidecar.warnings, *([warning] if warning else [])]
    if scan.cut:
        part.bad.append((scan.cut, "its shard ends or is damaged within it"))
    elif scan.torn and scan.members:
        part.bad.append(("", scan.torn))
    part.bad += [(key, _NOT_IN_TAR) for key in missing[:NAMED]]
    part.add_absent(len(missing) - NAMED, "more samples", _NOT_IN_TAR)
    if scan.torn or not scan.members:
        _add_unread(part, scan, sidecar, source)
    return part


def _add_rows(fd: int, part: Part, groups: list[Group[Member]], facts: dict[str, Facts], source: Source) -> None:
    """Put the samples that can be used into the part's rows, and what cannot be into its bad ones."""
    pool, rows, places = TextPool(), [], []
    captions, extras = (source.caption_extension.lower(), ".json"), tuple(extra.name for extra in source.extras)
    for group in groups:
        try:
            if problem := group.problem(captions, extras):
                raise SampleError(problem)
            image = group.members[group.image]
            if not image.size:
                raise SampleError("an image file without content")
            if image.size > MAX_BYTES:
                raise SampleError(f"an image file of {image.size} bytes, {MAX_BYTES} are the most")
            own_places = places_in_shard(source.extras, group.members)
            rows.append(_row(fd, group.key, image, group.members, facts.get(group.key), source, pool, part))
            places.append(own_places)
        except SampleError as error:
            part.bad += [(name, str(error)) for name in group.lost()]
            if not group.images:
                part.without_image += 1
                part.strange_extensions.update(group.extensions)
            continue
        own, others = group.unused_images(extras)
        part.bad += [(f"{group.key}{extension}", OF_ITS_OWN) for extension in own]
        part.further_images.update(others)
        part.other_captions.update(_other_caption_extensions(group.members, source.caption_extension))
    part.rows, part.text, part.extras = row_array(rows), pool.array(), extra_arrays(source.extras, places)


def _add_unread(part: Part, scan: _Scan, sidecar: Sidecar, source: Source) -> None:
    """Count what a damaged tar, or a file that is none, should have had: by its stats where no parquet tells."""
    stated = None if sidecar.known else stated_samples(source.path.with_name(f"{source.path.stem}_stats.json"))
    reason = scan.torn or "it holds no file"
    lacking = 0 if stated is None else stated - len(part.rows) - len(part.bad)
    part.add_absent(lacking, "samples that its stats file has besides", reason)
    if not scan.members and not scan.cut and not sidecar.known and stated is None:
        part.bad.append(("", reason))
        return
    again = "" if scan.torn.startswith("it is") else " Fetch this shard again."
    part.warnings.append(f"{reason}; the {len(part.rows)} whole samples before that are used.{again}")


def _scan(fd: int) -> _Scan:
    """Sort the members of a tar by their keys."""
    scan, last = _Scan(), (0, "")
    runs = 0  # of members of one key that follow one another
    added_in: dict[tuple[int, str], int] = {}
    again: dict[int, tuple[str, list[str]]] = {}
    try:
        for member in members(fd):
            scan.members += 1
            name = MemberName.of(member.name)
            if name is None:
                if not member.odd and looks_like_image(os.pread(fd, min(member.size, BEGINNING_BYTES), member.offset)):
                    scan.lost.append((printable(member.name), NO_KEY))
                continue
            at = (member.part, name.key)
            runs, last = runs + (at != last), at
            group = scan.groups.get(at)
            if group is None:
                group = scan.groups[at] = Group(name.key, name.short_key)
            if group.add(name.extension, member, member.odd):
                added_in[at] = runs
            elif added_in[at] == runs:
                group.twice.append(name.extension)
            else:
                again.setdefault(runs, (name.key, []))[1].append(name.extension)
    except TornTarError as error:
        scan.torn = str(error)
        inside = MemberName.of(error.inside)
        if inside is not None and inside.key != last[1]:
            scan.cut = inside.key
        elif not error.behind_end and scan.groups.pop(last, None) is not None:
            scan.cut = last[1]
    for key, extensions in again.values():
        scan.lost += [(name, CAME_BEFORE) for name in Group(key, key, twice=extensions).lost()]
    return scan


def _samples(scan: _Scan) -> Iterator[Group[Member]]:
    """The groups that are samples; what came before in the tar is noted as lost.

    KEY.0.txt beside KEY.jpg is one more text of that sample: a group whose key has further dots and that has no image
    is left out where the group of the short key has one.
    """
    seen: set[str] = set()
    for (part, key), group in scan.groups.items():
        if key != group.short_key and not group.images:
            short = scan.groups.get((part, group.short_key))
            if short is not None and short.images:
                continue
        if part and key in seen:
            scan.lost += [(name, CAME_BEFORE) for name in group.lost()]
            continue
        seen.add(key)
        yield group


def _row(
    fd: int,
    key: str,
    image: Member,
    others: dict[str, Member],
    facts: Facts | None,
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
    json_facts = Facts() if caption_of_plain and has_size else _read_json(fd, others.get(".json"))
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


def _read_json(fd: int, member: Member | None) -> Facts:
    """Size and caption from a sample's JSON member; nothing from one that is missing or damaged."""
    if member is None or member.size > MAX_CAPTION_BYTES:
        return Facts()
    try:
        content = json.loads(os.pread(fd, member.size, member.offset))
    except (ValueError, RecursionError):  # ValueError: also of bytes that are not UTF-8
        return Facts()
    if not isinstance(content, dict):
        return Facts()
    return Facts.of(content)


def _other_caption_extensions(others: dict[str, Member], caption_extension: str) -> list[str]:
    return [name for name in COMMON_CAPTION_EXTENSIONS if name != caption_extension and name in others]
