"""Segments of JPEG (ITU-T T.81, annex B): size, orientation and colour profile, and the file without metadata."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np

from library.data.image_formats.exif import orientation_of
from library.data.image_formats.file_bytes import Facts, FileBytes

START = b"\xff\xd8"
END = b"\xff\xd9"
_SOF = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}  # a frame's header: precision, height, width, components
_SEQUENTIAL = frozenset({0xC0, 0xC1})  # the sequential frames with Huffman codes, which nearly all files are
_PROGRESSIVE = frozenset({0xC2, 0xC6, 0xCA, 0xCE})
_SOS, _EOI, _DRI = 0xDA, 0xD9, 0xDD
_APP0, _APP1, _APP2, _APP14, _APP15, _COM = 0xE0, 0xE1, 0xE2, 0xEE, 0xEF, 0xFE
_NO_CONTENT = frozenset({0x01, *range(0xD0, 0xD8)})  # markers without a segment
_FRAME = struct.Struct(">HHB")  # behind the precision: height, width, components
_NOT_PLAIN = _NO_CONTENT | {0, 0xFF, _APP1, _APP2, _SOS, _EOI}  # metadata, or no segment that is passed over
_ICC = b"ICC_PROFILE\0"  # then the number of this part, from 1, and how many there are (ICC.1:2022, B.4)
_XMP = b"http://ns.adobe.com/xap/1.0/\0"
_BETWEEN_SCANS = frozenset({0xC4, 0xCC, 0xDB, _DRI, _COM, *range(_APP0, 0xF0)})  # tables and metadata


@dataclass(frozen=True)
class Jpeg:
    """A JPEG without its metadata.

    Attributes:
        data: the file with all segments that pixels depend on, up to its end mark.
        icc: its colour profile; b"" if it has none.
        orientation: EXIF's, 1 to 8.
        scans: how often the data pass over the picture.
        progressive: whether each scan refines the picture.
        data_start, data_end: where the entropy-coded bytes are in `data`, if they are one sequential scan; else 0.
        ended: an end mark was there.
        restarts: the data are cut by restart markers into parts that are decoded for themselves.
    """

    data: bytes
    icc: bytes
    orientation: int
    scans: int
    progressive: bool
    data_start: int
    data_end: int
    ended: bool
    restarts: bool


@dataclass(frozen=True)
class _Segment:
    """A marker with the place of its content."""

    marker: int
    begin: int
    end: int


@dataclass
class _Metadata:
    """EXIF, XMP and profile; of EXIF and XMP the first that comes counts.

    Attributes:
        parts: of the profile, by their numbers.
    """

    exif: bytes = b""
    xmp: bytes = b""
    parts: dict[int, bytes] = field(default_factory=dict)

    def add(self, marker: int, content: bytes) -> None:
        """Look into a segment."""
        if marker == _APP1 and not self.exif and content.startswith(b"Exif\0"):
            self.exif = content
        elif marker == _APP1 and not self.xmp and content.startswith(_XMP):
            self.xmp = content
        elif marker == _APP2 and content.startswith(_ICC) and len(content) > len(_ICC) + 2:
            self.parts.setdefault(content[len(_ICC)], content[len(_ICC) + 2 :])

    @property
    def orientation(self) -> int:
        """EXIF's, 1 to 8."""
        return orientation_of(self.exif, self.xmp)

    @property
    def icc(self) -> bytes:
        """The profile, put together."""
        return b"".join(self.parts[number] for number in sorted(self.parts))


def facts(read: FileBytes) -> Facts:
    """What the segments before the first scan say.

    Raises:
        OSError: no frame's header is found.
    """
    metadata = _Metadata()
    for segment in _segments(read):
        if segment.marker in _SOF and len(frame := read(segment.begin, 6)) == 6:
            height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
            return Facts(width, height, metadata.orientation, metadata.icc, frame[5])
        if segment.marker in (_APP1, _APP2):
            metadata.add(segment.marker, read(segment.begin, segment.end - segment.begin))
    raise OSError("image file is truncated: a JPEG without a frame's header")


def plain_facts(beginning: bytes) -> Facts | None:
    """The same, by a file's first bytes, where they hold the frame's header and neither metadata nor anything odd come
    before it; None of all others. Most files of large sets are such, and the index looks at each of them.
    """
    position, last = len(START), len(beginning) - 10
    while position <= last and beginning[position] == 0xFF:
        marker = beginning[position + 1]
        if marker in _SOF:
            height, width, channels = _FRAME.unpack_from(beginning, position + 5)
            return Facts(width, height, channels=channels)
        length = beginning[position + 2] << 8 | beginning[position + 3]
        if marker in _NOT_PLAIN or length < 2:
            return None
        position += 2 + length
    return None


def without_metadata(data: bytes) -> Jpeg:
    """The file as its pixels need it.

    Raises:
        OSError: its frame or its first scan is missing.
    """
    read = FileBytes.of(data)
    kept, metadata, restarts = [START], _Metadata(), False
    frame: tuple[int, int] | None = None  # marker and components
    scan: _Segment | None = None
    for segment in _segments(read):
        content = data[segment.begin : segment.end]
        metadata.add(segment.marker, content)
        restarts |= segment.marker == _DRI and any(content)
        if segment.marker in _SOF and len(content) > 5:
            frame = segment.marker, content[5]
        if _is_needed(segment, content):
            kept.append(data[segment.begin - 4 : segment.end])
        if segment.marker == _SOS:
            scan = segment
    if frame is None or scan is None:
        raise OSError("image file is truncated: a JPEG without picture data")
    one_scan = frame[0] in _SEQUENTIAL and data[scan.begin : scan.begin + 1] == bytes([frame[1]])
    end, scans, ended = _end_of_data(data, scan.end, one_scan)
    head = b"".join(kept)
    bare = head + data[scan.end : end] + END
    data_start, data_end = (len(head), len(head) + end - scan.end) if one_scan else (0, 0)
    progressive = frame[0] in _PROGRESSIVE
    return Jpeg(bare, metadata.icc, metadata.orientation, scans, progressive, data_start, data_end, ended, restarts)


def _segments(read: FileBytes) -> Iterator[_Segment]:
    """The segments up to the first scan's header, that one included; fewer of a file that is cut."""
    position = len(START)
    while len(head := read(position, 4)) == 4:
        if head[0] != 0xFF or head[1] in (0, 0xFF):  # what stands between segments is passed over, as libjpeg does
            position += 1
            continue
        marker = head[1]
        if marker in _NO_CONTENT:
            position += 2
            continue
        length = int.from_bytes(head[2:], "big")
        if marker == _EOI or length < 2:
            return
        yield _Segment(marker, position + 4, position + 2 + length)
        if marker == _SOS:
            return
        position += 2 + length


def _is_needed(segment: _Segment, content: bytes) -> bool:
    """Whether decoding asks for it: JFIF's and Adobe's segments say which colours these are, others are metadata."""
    if segment.marker == _APP0:
        return content.startswith(b"JFIF\0") and len(content) >= 14
    if segment.marker == _APP14:
        return content.startswith(b"Adobe") and len(content) >= 12
    return not (_APP0 <= segment.marker <= _APP15 or segment.marker == _COM)


def _end_of_data(data: bytes, position: int, one_scan: bool) -> tuple[int, int, bool]:
    """Where the data of the last scan end, how many scans there are, and whether an end mark follows.

    Args:
        position: of the first entropy-coded byte.
        one_scan: nothing belongs to the picture behind the first scan.
    """
    scans = 1
    for found in _markers(data, position):
        if found < position:  # within a segment
            continue
        marker, position = data[found + 1], found
        if marker == _EOI or one_scan:
            return position, scans, marker == _EOI
        if marker != _SOS and marker not in _BETWEEN_SCANS:
            return position, scans, False
        scans += marker == _SOS
        position += 2 + max(2, int.from_bytes(data[position + 2 : position + 4], "big"))
    return len(data), scans, False


def _markers(data: bytes, position: int) -> list[int]:
    """Where 0xFF is followed by what it cannot be within entropy-coded data: all but 0, fill and restart markers."""
    if position >= len(data):
        return []
    values = np.frombuffer(data, np.uint8, offset=position)
    marks = np.flatnonzero(values[:-1] == 0xFF)
    behind = values[marks + 1]
    restart = (behind >= 0xD0) & (behind <= 0xD7)
    return (marks[(behind != 0) & (behind != 0xFF) & ~restart] + position).tolist()
