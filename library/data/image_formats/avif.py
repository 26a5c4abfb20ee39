"""Boxes of AVIF (ISO/IEC 14496-12; AV1 Image File Format 1.1): size, orientation and profile; the file without EXIF."""

import re
from collections.abc import Iterator

from library.data.bad_samples import SampleError
from library.data.image_formats.file_bytes import Facts, FileBytes

_MOST_BYTES = 1 << 24  # of the box that describes the items
# EXIF's orientation by what irot (quarter turns, anti-clockwise) and imir (None, or its axis) ask for together.
_ORIENTATIONS: dict[tuple[int, int | None], int] = {
    (0, None): 1,
    (1, None): 8,
    (2, None): 3,
    (3, None): 6,
    (0, 0): 4,
    (1, 0): 5,
    (2, 0): 2,
    (3, 0): 7,
    (0, 1): 2,
    (1, 1): 7,
    (2, 1): 4,
    (3, 1): 5,
}
_EXIF_ITEM = re.compile(rb"(infe(?:\x02.{7}|\x03.{9}))Exif", re.DOTALL)


def is_avif(start: bytes) -> bool:
    """By the file's beginning."""
    return start[4:8] == b"ftyp" and start[8:12] in (b"avif", b"avis", b"mif1")


def facts(read: FileBytes) -> Facts:
    """What is said of the primary item. EXIF's orientation does not count in this format.

    Raises:
        SampleError: the boxes do not give them; pictures of unusual structure.
    """
    meta = _meta(read)
    try:
        return _facts(meta)
    except (IndexError, KeyError) as error:
        raise SampleError("an AVIF whose size is not found") from error


def without_exif(data: bytes) -> bytes:
    """The file with its EXIF named as something that is passed over."""
    place, size = _place_of_meta(FileBytes.of(data))
    return data[:place] + _EXIF_ITEM.sub(rb"\1free", data[place : place + size]) + data[place + size :]


def _place_of_meta(read: FileBytes) -> tuple[int, int]:
    """Where the content of the box is that describes the items, and its bytes; (0, 0) if there is none."""
    position = 0
    while len(head := read(position, 16)) >= 8:
        size, header = _box_size(head, read.size - position)
        if head[4:8] == b"meta":
            return position + header, min(size - header, _MOST_BYTES)
        position += size
    return 0, 0


def _meta(read: FileBytes) -> bytes:
    place, size = _place_of_meta(read)
    return read(place + 4, max(0, size - 4))  # behind version and flags


def _facts(meta: bytes) -> Facts:
    boxes = dict(_boxes(meta))
    primary_box, properties = boxes[b"pitm"], dict(_boxes(boxes[b"iprp"]))
    primary = int.from_bytes(primary_box[4:8] if primary_box[0] else primary_box[4:6], "big")
    listed = list(_boxes(properties[b"ipco"]))
    width = height = turns = 0
    icc = b""
    axis = None
    for number in _associated(properties[b"ipma"], primary):
        kind, content = listed[number - 1]
        if kind == b"ispe":
            width, height = int.from_bytes(content[4:8], "big"), int.from_bytes(content[8:12], "big")
        elif kind == b"irot":
            turns = content[0] & 3
        elif kind == b"imir":
            axis = content[0] & 1
        elif kind == b"colr" and content[:4] in (b"prof", b"rICC"):
            icc = content[4:]
    if not width:
        raise KeyError("ispe")
    return Facts(width, height, _ORIENTATIONS[turns, axis], icc)


def _associated(box: bytes, item: int) -> list[int]:
    """The numbers, from 1, of an item's properties."""
    id_bytes, wide = (4 if box[0] else 2), box[3] & 1
    position = 8
    for _ in range(int.from_bytes(box[4:8], "big")):
        found = int.from_bytes(box[position : position + id_bytes], "big")
        count, position = box[position + id_bytes], position + id_bytes + 1
        end = position + count * (1 + wide)
        if found == item:
            step, mask = 1 + wide, 0x7FFF if wide else 0x7F  # the first bit says whether it is essential
            return [int.from_bytes(box[at : at + step], "big") & mask for at in range(position, end, step)]
        position = end
    return []


def _boxes(content: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Kind and content of the boxes in a box."""
    position = 0
    while len(head := content[position : position + 16]) >= 8:
        size, header = _box_size(head, len(content) - position)
        yield head[4:8], content[position + header : position + size]
        position += size


def _box_size(head: bytes, rest: int) -> tuple[int, int]:
    """Bytes of a box, and of its head."""
    size = int.from_bytes(head[:4], "big")
    if size == 1 and len(head) == 16:
        return max(16, int.from_bytes(head[8:], "big")), 16
    return (max(8, size) if size else rest), 8
