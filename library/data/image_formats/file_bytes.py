"""A file's bytes, fetched in blocks where they are asked for: a header is read without the pixels behind it."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

FIRST_BLOCK = 1 << 10  # bytes; holds the header of nearly every image without metadata
_BLOCK = 1 << 12  # of further reads


class Facts(NamedTuple):
    """What an image's header says.

    Attributes:
        width, height: px as they are stored.
        orientation: EXIF's, 1 to 8.
        icc: the colour profile; b"" if there is none.
        channels: 1, 3 or 4; alpha is not counted.
    """

    width: int
    height: int
    orientation: int = 1
    icc: bytes = b""
    channels: int = 3


@dataclass
class FileBytes:
    """Bytes by their place.

    Attributes:
        read_at: so many bytes from an offset, fewer only at the end.
        size: of the file.
    """

    read_at: Callable[[int, int], bytes]
    size: int
    _start: int = 0
    _block: bytes = field(default=b"", repr=False)

    @classmethod
    def of(cls, data: bytes) -> "FileBytes":
        """Of a file in memory."""
        return cls(lambda offset, count: data[offset : offset + count], len(data), 0, data)

    def __call__(self, offset: int, count: int) -> bytes:
        """Bytes from an offset; fewer at the end."""
        begin = offset - self._start
        if begin >= 0 and (found := self._block[begin : begin + count]) and len(found) == count:
            return found
        count = max(0, min(count, self.size - offset))
        if not count:
            return b""
        least = _BLOCK if self._block else FIRST_BLOCK
        self._start, self._block = offset, self.read_at(offset, min(max(count, least), self.size - offset))
        return self._block[:count]
