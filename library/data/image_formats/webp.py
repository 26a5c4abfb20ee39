"""Chunks of WebP (RFC 9649): size, orientation and colour profile."""

from collections.abc import Iterator

from library.data.bad_samples import SampleError
from library.data.image_formats.exif import orientation_of
from library.data.image_formats.file_bytes import Facts, FileBytes

_HAS_EXIF, _HAS_ICC = 0x08, 0x20  # of the flags in VP8X


def is_webp(start: bytes) -> bool:
    """By the file's beginning."""
    return start[:4] == b"RIFF" and start[8:12] == b"WEBP"


def facts(read: FileBytes) -> Facts:
    """Size, profile and orientation; EXIF stands behind the pixels, which are passed over.

    Raises:
        SampleError: no size is found.
    """
    chunks = _chunks(read)
    kind, begin, _ = next(chunks, (b"", 0, 0))
    content = read(begin, 10)
    size = _size(kind, content)
    if size is None:
        raise SampleError("a WebP without a picture's header")
    wanted = content[0] if kind == b"VP8X" else 0
    icc, orientation = b"", 1
    for kind, begin, length in chunks if wanted & (_HAS_ICC | _HAS_EXIF) else ():
        if kind == b"ICCP" and wanted & _HAS_ICC:
            icc, wanted = read(begin, length), wanted & ~_HAS_ICC
        elif kind == b"EXIF" and wanted & _HAS_EXIF:
            orientation, wanted = orientation_of(read(begin, length)), wanted & ~_HAS_EXIF
        if not wanted & (_HAS_ICC | _HAS_EXIF):
            break
    return Facts(*size, orientation, icc)


def _chunks(read: FileBytes) -> Iterator[tuple[bytes, int, int]]:
    """Kind, place of the content and its bytes, of each chunk."""
    position = 12
    while len(head := read(position, 8)) == 8:
        size = int.from_bytes(head[4:], "little")
        yield head[:4], position + 8, size
        position += 8 + size + size % 2


def _size(kind: bytes, content: bytes) -> tuple[int, int] | None:
    """(width, height) that the first chunk gives."""
    if len(content) < 10:
        return None
    if kind == b"VP8X":
        return 1 + int.from_bytes(content[4:7], "little"), 1 + int.from_bytes(content[7:10], "little")
    if kind == b"VP8 " and content[3:6] == b"\x9d\x01\x2a":
        width, height = int.from_bytes(content[6:8], "little"), int.from_bytes(content[8:10], "little")
        return width & 0x3FFF, height & 0x3FFF
    if kind == b"VP8L" and content[0] == 0x2F:
        bits = int.from_bytes(content[1:5], "little")
        return 1 + (bits & 0x3FFF), 1 + (bits >> 14 & 0x3FFF)
    return None
