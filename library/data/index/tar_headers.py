"""Where the members of a tar file are, found by one pass over its headers without reading their contents.

Layout: POSIX.1-2001 (pax) and GNU tar's manual, "Basic Tar Format". tarfile from the standard library does the same
with an object a member; this walker takes about a quarter of its time, which is hours on a set of 40,000 shards.
"""

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

BLOCK = 512  # bytes; headers and contents start at multiples of it
_REGULAR = b"0\x007"  # regular file, its old spelling, contiguous file
_MAX_EXTENSION_BYTES = 1 << 20  # a long name or pax header larger than this is no real one
_USED_FIELDS = ("path", "size")  # of pax headers
_MAX_DIGITS = 19  # of a decimal size


class TornTarError(ValueError):
    """The tar ends early or holds something that is no header; what was yielded before is good."""


@dataclass(frozen=True)
class Member:
    """A regular file in a tar: its path there and where its contents are, in bytes."""

    name: str
    offset: int
    size: int


def members(fd: int) -> Iterator[Member]:
    """All regular files of an open tar in their order; other members are passed over.

    Raises:
        TornTarError: after the last whole member, when the file is cut short or damaged there.
    """
    yield from walk(lambda size, position: os.pread(fd, size, position), os.fstat(fd).st_size)


def walk(read_at: Callable[[int, int], bytes], file_bytes: int | None) -> Iterator[Member]:
    """`members` of a tar that is read in any way.

    Args:
        read_at: so many bytes at a position, fewer only at the end; positions never fall.
        file_bytes: of the whole tar; None where that is not known.
    """
    position = 0
    shared_pax: dict[str, str] = {}
    pax: dict[str, str] = {}
    long_name: str | None = None
    while True:
        header = read_at(BLOCK, position)
        if len(header) < BLOCK:
            end = position + len(header) if file_bytes is None else file_bytes
            raise TornTarError(f"it ends at byte {end} without an end mark")
        if header[0] == 0 and not any(header):
            return
        if not _checksum_holds(header):
            raise TornTarError(f"there is no tar header at byte {position}")
        kind = header[156:157]
        size = _number(header[124:136])
        offset = position + BLOCK
        extension = kind in b"LKxg"
        if not extension and "size" in (fields := {**shared_pax, **pax}):
            size = _decimal(fields["size"])
        if file_bytes is not None and offset + size > file_bytes:
            raise TornTarError(f"it ends at byte {file_bytes}, inside the member at byte {position}")
        if extension:
            if size > _MAX_EXTENSION_BYTES:
                raise TornTarError(f"the extended header at byte {position} is {size} bytes long")
            content = read_at(size, offset)
            if len(content) < size:
                raise TornTarError(f"it ends at byte {offset + len(content)}, inside the member at byte {position}")
            if kind == b"L":
                long_name = _text(content)
            elif kind == b"x":
                pax = _pax_fields(content)
            elif kind == b"g":
                shared_pax.update(_pax_fields(content))
        else:
            if kind in _REGULAR:
                name = pax.get("path") or long_name or shared_pax.get("path") or _short_name(header)
                yield Member(name, offset, size)
            pax, long_name = {}, None
        position = offset + -(-size // BLOCK) * BLOCK


def looks_like_tar(path: Path) -> bool:
    """True if the file starts with a tar header."""
    with path.open("rb") as file:
        header = file.read(BLOCK)
    return len(header) == BLOCK and _checksum_holds(header)


def _checksum_holds(header: bytes) -> bool:
    """The checksum is the sum of the header's bytes, its own field counted as spaces."""
    try:
        return sum(header) - sum(header[148:156]) + 8 * 32 == _number(header[148:156])
    except TornTarError:
        return False


def _number(field: bytes) -> int:
    """An octal number, or a base-256 one (GNU, for sizes of 8 GiB and more)."""
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    try:
        return int(field.strip(b" \0") or b"0", 8)
    except ValueError as error:
        raise TornTarError(f"{field!r} is no number") from error


def _decimal(text: str) -> int:
    if not text.isdecimal() or len(text) > _MAX_DIGITS:
        raise TornTarError(f"a pax header gives the size {text!r}")
    return int(text)


def _text(field: bytes) -> str:
    return field.split(b"\0", 1)[0].decode("utf-8", "surrogateescape")


def _short_name(header: bytes) -> str:
    """The name within the header; ustar keeps the front of a longer one in a field of its own (GNU has times there)."""
    name = _text(header[:100])
    prefix = _text(header[345:500]) if header[257:263] == b"ustar\0" else ""
    return f"{prefix}/{name}" if prefix else name


def _pax_fields(content: bytes) -> dict[str, str]:
    """`LENGTH KEY=VALUE\\n` records, LENGTH counting the whole record; of the fields those that are used here."""
    fields = {}
    content = content.rstrip(b"\0")
    start = 0
    while start < len(content):
        length = content[start : start + _MAX_DIGITS + 1].partition(b" ")[0]
        if not length.isdigit() or not len(length) < int(length) <= len(content) - start:
            raise TornTarError("it holds a damaged pax header")
        record = content[start + len(length) + 1 : start + int(length)]
        key, _, value = record.rstrip(b"\n").partition(b"=")
        if (name := key.decode("utf-8", "replace")) in _USED_FIELDS:
            fields[name] = value.decode("utf-8", "surrogateescape")
        start += int(length)
    return fields
