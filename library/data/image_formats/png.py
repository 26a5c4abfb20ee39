"""Chunks of PNG (W3C, PNG Specification, third edition): size, orientation, profile, and the file without metadata."""

import zlib
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from library.data.bad_samples import SampleError
from library.data.image_formats.exif import orientation_of
from library.data.image_formats.file_bytes import Facts, FileBytes

START = b"\x89PNG\r\n\x1a\n"
_NEEDED = frozenset({b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"})
_TEXTS = (b"tEXt", b"zTXt")
_RAW_EXIF = b"Raw profile type exif"  # ImageMagick's keyword of EXIF as hexadecimal digits
_MOST_INFLATED = 1 << 24  # bytes of one chunk; a profile or EXIF is smaller
_IN_COLOUR = 2  # of the bits of the colour type
_MOST_EXIF = 1 << 20  # bytes of a chunk; the orientation stands in front


@dataclass(frozen=True)
class Png:
    """A PNG without its metadata.

    Attributes:
        data: the file with the chunks that pixels depend on.
        icc: its colour profile; b"" if it has none.
        orientation: EXIF's, 1 to 8.
    """

    data: bytes
    icc: bytes
    orientation: int


@dataclass(frozen=True)
class _Chunk:
    """A chunk's kind, and where its content is."""

    kind: bytes
    begin: int
    size: int


def facts(read: FileBytes) -> Facts:
    """What the chunks before the pixels say. EXIF behind them does not count, as it would cost reading all of them.

    Raises:
        SampleError: there is no header.
    """
    size, orientation, icc, channels = (0, 0), 1, b"", 3
    for chunk in _chunks(read):
        if chunk.kind == b"IHDR":
            header = read(chunk.begin, 10)
            channels = 3 if header[9:] and header[9] & _IN_COLOUR else 1
            size = int.from_bytes(header[:4], "big"), int.from_bytes(header[4:8], "big")
        elif chunk.kind == b"IDAT":
            break
        elif chunk.kind == b"iCCP" and not icc:
            icc = _profile(read(chunk.begin, min(chunk.size, _MOST_INFLATED)))
        elif chunk.kind == b"eXIf" or (chunk.kind in _TEXTS and read(chunk.begin, len(_RAW_EXIF)) == _RAW_EXIF):
            orientation = _orientation(chunk.kind, read(chunk.begin, min(chunk.size, _MOST_EXIF))) or orientation
    if size == (0, 0):
        raise SampleError("a PNG without a header")
    return Facts(*size, orientation, icc, channels)


def without_metadata(data: bytes) -> Png:
    """The file as its pixels need it. What metadata and their checksums are like costs no picture.

    Raises:
        SampleError: the pixels' data are not as their checksum says.
    """
    kept, icc, orientation, pixels_seen = [START], b"", 1, False
    for chunk in _chunks(FileBytes.of(data)):
        end = chunk.begin + chunk.size
        if chunk.kind in _NEEDED:
            if chunk.kind == b"IDAT":
                pixels_seen = True
                _check(data, chunk)
            kept.append(data[chunk.begin - 8 : end + 4])
        elif chunk.kind == b"iCCP" and not icc:
            icc = _profile(data[chunk.begin : end])
        elif not pixels_seen and (chunk.kind == b"eXIf" or chunk.kind in _TEXTS):
            orientation = _orientation(chunk.kind, data[chunk.begin : end]) or orientation
        if chunk.kind == b"IEND":
            break
    return Png(b"".join(kept), icc, orientation)


def _chunks(read: FileBytes) -> Iterator[_Chunk]:
    """All chunks in their order; fewer of a file that is cut."""
    position = len(START)
    while len(head := read(position, 8)) == 8:
        size = int.from_bytes(head[:4], "big")
        yield _Chunk(head[4:], position + 8, size)
        position += 12 + size


def _check(data: bytes, chunk: _Chunk) -> None:
    end = chunk.begin + chunk.size
    told = data[end : end + 4]
    if len(told) == 4 and zlib.crc32(data[chunk.begin - 4 : end]) != int.from_bytes(told, "big"):
        raise SampleError("its data are damaged: the checksum of a PNG's IDAT chunk does not hold")


def _profile(content: bytes) -> bytes:
    """The profile of an iCCP chunk: behind its name and its way of packing, of which there is one."""
    return _inflated(content.partition(b"\0")[2][1:])


def _orientation(kind: bytes, content: bytes) -> int:
    """The orientation in an eXIf chunk, or in text that ImageMagick writes in place of one; 0 in other text."""
    if kind == b"eXIf":
        return orientation_of(content)
    keyword, _, text = content.partition(b"\0")
    if keyword != _RAW_EXIF:
        return 0
    text = _inflated(text[1:]) if kind == b"zTXt" else text
    with suppress(ValueError):  # three lines come first: an empty one, "exif" and the number of bytes
        return orientation_of(bytes.fromhex(b"".join(text.split(b"\n")[3:]).decode("ascii", "replace")))
    return 0


def _inflated(packed: bytes) -> bytes:
    """What zlib unpacks; b"" of what it cannot, or of too much."""
    with suppress(zlib.error):
        unpacking = zlib.decompressobj()
        found = unpacking.decompress(packed, _MOST_INFLATED)
        return found if unpacking.eof else b""
    return b""
