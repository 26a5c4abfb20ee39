"""Where the members of a tar file are, found by one pass over its headers without reading their contents.

Layout: POSIX.1-2001 (pax) and GNU tar's manual, "Basic Tar Format". tarfile from the standard library does the same
with an object a member; this walker takes about a quarter of its time, which is hours on a set of 40,000 shards.
Unlike tarfile it reads on behind an end mark (what `cat a.tar b.tar` makes has one in its middle), says where a file
ends without one, and takes a name's front from its own field only where the header is POSIX's.
"""

import contextlib
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

BLOCK = 512  # bytes; headers and contents start at multiples of it
_REGULAR = b"0\x007"  # regular file, its old spelling, contiguous file
_WITHOUT_CONTENT = b"123456"  # links, devices, folders, pipes: whatever size their headers have
_PASSED_OVER = b"5DV"  # folders, those of incremental archives, the label of an archive
_KINDS = {
    b"1": "a hard link",
    b"2": "a symbolic link",
    b"S": "a sparse file",
    b"M": "the rest of a file in another tar",
}
_SPARSE = "a sparse file"
MAX_EXTENSION_BYTES = 1 << 20  # a long name or pax header larger than this is no real one
_USED_FIELDS = ("path", "size", "linkpath")  # of pax headers, and those that mark sparse files
_SPARSE_FIELD = "GNU.sparse."
_MAX_DIGITS = 19  # of a decimal size
_ZEROS = 1 << 20  # bytes that are looked at at once behind an end mark


class TornTarError(ValueError):
    """The tar ends early or holds something that is no header; what was yielded before is good.

    Attributes:
        inside: the name of the member that it ends in, "" where that is not known.
        behind_end: behind an end mark, so that no sample is cut.
    """

    def __init__(self, message: str, inside: str = "", behind_end: bool = False) -> None:
        super().__init__(message)
        self.inside, self.behind_end = inside, behind_end


class Member(NamedTuple):
    """A file in a tar: its path there and where its contents are, in bytes.

    Attributes:
        part: 0, and one more behind each end mark: such tars were put together out of several.
        odd: why its contents are not simply there ("a hard link to a.jpg"); "" for a regular file.
    """

    name: str
    offset: int
    size: int
    part: int = 0
    odd: str = ""


ReadAt = Callable[[int, int], bytes]  # size, position: so many bytes from there on, fewer only at the end


def members(fd: int) -> Iterator[Member]:
    """All files of an open tar in their order; folders are passed over.

    Raises:
        TornTarError: after the last whole member, when the file is cut short or damaged there.
    """
    file_bytes = os.fstat(fd).st_size

    def behind_zeros(position: int) -> int:
        while data := os.pread(fd, _ZEROS, position):
            if rest := data.lstrip(b"\0"):
                return position + (len(data) - len(rest)) // BLOCK * BLOCK
            position += len(data)
        return file_bytes

    yield from walk(lambda size, position: os.pread(fd, size, position), file_bytes, behind_zeros)


def walk(
    read_at: ReadAt, file_bytes: int | None, behind_zeros: Callable[[int], int] = lambda position: position
) -> Iterator[Member]:
    """`members` of a tar that is read in any way.

    Args:
        read_at: positions never fall.
        file_bytes: of the whole tar; None where that is not known.
        behind_zeros: from a position in zeros to one further on that is still in them, or to the next block.
    """
    walker = _Walker(read_at, file_bytes)
    position, part, ended = 0, 0, -1  # ended: where the last end mark is
    while True:
        header = read_at(BLOCK, position)
        if len(header) == BLOCK and not header[0] and not any(header):
            ended = position if ended < 0 else ended
            position = behind_zeros(position + BLOCK)
            continue
        if len(header) < BLOCK:
            if ended >= 0:
                return
            # What a stream passes over is not missed before the next header.
            end = f"at byte {file_bytes or position + len(header)}" if file_bytes or header else f"by byte {position}"
            kind = _other_kind(header) if position == 0 else ""
            raise TornTarError(f"it is {kind}" if kind else f"it ends {end} without an end mark")
        if not _checksum_holds(header):
            if kind := _other_kind(header) if position == 0 else "":
                raise TornTarError(f"it is {kind}")
            behind = f", behind its end mark at byte {ended}" if ended >= 0 else ""
            raise TornTarError(f"there is no tar header at byte {position}{behind}", behind_end=ended >= 0)
        if ended >= 0:
            part, ended = part + walker.begun, -1
            walker = _Walker(read_at, file_bytes)
        member, position = walker.take(header, position)
        if member is not None:
            yield member._replace(part=part) if part else member


class _Walker:
    """What one header after another says; extended headers are about those that follow them."""

    def __init__(self, read_at: ReadAt, file_bytes: int | None) -> None:
        self._read_at, self._file_bytes = read_at, file_bytes
        self._shared_pax: dict[str, str] = {}
        self._pax: dict[str, str] = {}
        self._long: dict[bytes, str] = {}  # names (L) and links' targets (K) that are too long for a header
        self.begun = False

    def take(self, header: bytes, position: int) -> tuple[Member | None, int]:
        """The member that a header begins, None where it begins none; and where the next header is."""
        self.begun = True
        kind, offset = header[156:157], position + BLOCK
        if kind == b"0" and not (self._pax or self._long or self._shared_pax):  # nearly all are such: the short way
            size, name = _number(header[124:136]), _short_name(header)
            self._check_end(offset + size, position, name)
            after = offset + -(-size // BLOCK) * BLOCK
            return (None if name.endswith("/") else Member(name, offset, size)), after
        fields = {**self._shared_pax, **self._pax}
        extension = kind in b"LKxg"
        if kind in _WITHOUT_CONTENT:
            size = 0
        elif not extension and fields.get("size"):
            size = _decimal(fields["size"])
        else:
            size = _number(header[124:136])
        if kind == b"S":
            offset += self._blocks_of_map(header, offset)
        after = offset + -(-size // BLOCK) * BLOCK
        if extension:
            self._check_end(offset + size, position)
            self._extend(kind, size, offset, position)
            return None, after
        pax, long, self._pax, self._long = self._pax, self._long, {}, {}
        name = pax.get("path") or long.get(b"L") or self._shared_pax.get("path") or _short_name(header)
        self._check_end(offset + size, position, name)
        odd = "" if kind in _REGULAR else _KINDS.get(kind, f"of the kind {kind!r}")
        if any(key.startswith(_SPARSE_FIELD) for key in fields):
            odd, name = _SPARSE, fields.get(f"{_SPARSE_FIELD}name") or name
        if kind in b"12":
            odd += f" to {fields.get('linkpath') or long.get(b'K') or _text(header[157:257])}"
        if kind in _PASSED_OVER or (not odd and name.endswith("/")):  # the oldest way to spell a folder
            return None, after
        return Member(name, offset, size, odd=odd), after

    def _check_end(self, end: int, position: int, name: str = "") -> None:
        if self._file_bytes is not None and end > self._file_bytes:
            raise TornTarError(f"it ends at byte {self._file_bytes}, inside the member at byte {position}", inside=name)

    def _extend(self, kind: bytes, size: int, offset: int, position: int) -> None:
        """Read a long name or a pax header."""
        if size > MAX_EXTENSION_BYTES:
            raise TornTarError(f"the extended header at byte {position} is {size} bytes long")
        content = self._read_at(size, offset)
        if len(content) < size:
            raise TornTarError(f"it ends at byte {offset + len(content)}, inside the member at byte {position}")
        if kind == b"x":
            self._pax = _pax_fields(content)
        elif kind == b"g":
            self._shared_pax.update(_pax_fields(content))
        else:
            self._long[kind] = _text(content)

    def _blocks_of_map(self, header: bytes, position: int) -> int:
        """Bytes of a GNU sparse file's map that stand between header and contents; each block says if one follows."""
        size, more = 0, header[482]
        while more:
            block = self._read_at(BLOCK, position + size)
            if len(block) < BLOCK:
                raise TornTarError(f"it ends at byte {position + size + len(block)}, inside the map of a sparse file")
            size, more = size + BLOCK, block[504]
        return size


def looks_like_tar(path: Path) -> bool:
    """True if the file starts with a tar header, or as a tar's end mark does."""
    with path.open("rb") as file:
        header = file.read(BLOCK)
    return len(header) == BLOCK and (not any(header) or _checksum_holds(header))


def other_kind(path: Path) -> str:
    """What a file that is no tar is, with what to do; "" where that is unknown."""
    with path.open("rb") as file:
        return _other_kind(file.read(BLOCK))


def names_of(before: bytes, size: int) -> Iterator[str]:
    """The names that a regular file of a tar may have, by its header and by extended ones before that.

    Args:
        before: what stands in front of its contents, in whole blocks; extended headers are found as far as it reaches.
        size: of the contents. No name comes where the header says another.
    """
    header, end = before[-BLOCK:], len(before) - BLOCK
    if end < 0 or not _checksum_holds(header) or header[156:157] not in _REGULAR:
        return
    with contextlib.suppress(TornTarError):
        if _number(header[124:136]) not in (0, size):  # 0: the size stands in a pax header
            return
        yield _short_name(header)
        while (at := _extension_before(before, end)) is not None:
            content = before[at + BLOCK : end][: _number(before[at + 124 : at + 136])]
            is_pax = before[at + 156 : at + 157] == b"x"
            if name := _pax_fields(content).get("path") if is_pax else _text(content):
                yield name
            end = at


def _extension_before(before: bytes, end: int) -> int | None:
    """Where the extended header begins whose content ends there."""
    for at in range(end - 2 * BLOCK, -1, -BLOCK):
        header = before[at : at + BLOCK]
        if header[156:157] in (b"x", b"L") and _checksum_holds(header):
            return at if at + BLOCK + -(-_number(header[124:136]) // BLOCK) * BLOCK == end else None
    return None


_BEGINNINGS = {
    b"\x1f\x8b": "a tar or file compressed by gzip; unpack it (mv 0.tar 0.tar.gz; gunzip 0.tar.gz)",
    b"BZh": "a tar or file compressed by bzip2; unpack it first (bunzip2)",
    b"\xfd7zXZ\0": "a tar or file compressed by xz; unpack it first (unxz)",
    b"\x28\xb5\x2f\xfd": "a tar or file compressed by zstd; unpack it first (unzstd)",
    b"\x04\x22\x4d\x18": "a tar or file compressed by lz4; unpack it first (lz4 -d)",
    b"PK": "a zip archive; unpack it, and pack it as a tar",
    b"7z\xbc\xaf": "a 7z archive; unpack it, and pack it as a tar",
    b"Rar!": "a rar archive; unpack it, and pack it as a tar",
    b"PAR1": "a parquet file",
    b"version https:" + b"//git-lfs": "a pointer of git-lfs, not the file; fetch it (git lfs pull)",
    b"<": "a page of HTML or XML, such as a server's error; fetch it again",
    b"{": "JSON, such as a server's error; fetch it again",
}


def _other_kind(beginning: bytes) -> str:
    if not beginning:
        return "empty, it ends at byte 0"
    text = beginning.lstrip(b"\xef\xbb\xbf \r\n\t")
    return next((what for start, what in _BEGINNINGS.items() if text.startswith(start)), "")


def _checksum_holds(header: bytes) -> bool:
    """The checksum is the sum of the header's bytes, its own field counted as spaces; old tars take them as signed."""
    try:
        expected = _number(header[148:156])
    except TornTarError:
        return False
    counted = _sum(header[:256]) + _sum(header[256:]) - sum(header[148:156]) + 8 * 32
    return expected == counted or expected == counted - 256 * sum(byte > 127 for byte in header)


def _sum(data: bytes) -> int:
    """The sum of at most 256 bytes: Adler-32 has it, and one more, in its lower half (RFC 1950, section 8.2).

    It is taken modulo 65521 there, which is more than 1 + 256 * 255. This takes a fifth of the time of sum().
    """
    return (zlib.adler32(data) & 0xFFFF) - 1


def _number(field: bytes) -> int:
    """An octal number, or a base-256 one (GNU, for sizes of 8 GiB and more)."""
    if (digits := field.rstrip(b" \0")).isdigit():
        return _octal(digits, field)
    if field[0] == 0x80:
        return int.from_bytes(field[1:], "big")
    digits = field.split(b"\0", 1)[0].strip() or b"0"
    if not digits.isdigit():  # int() takes signs and underscores
        raise TornTarError(f"{field!r} is no number")
    return _octal(digits, field)


def _octal(digits: bytes, field: bytes) -> int:
    try:
        return int(digits, 8)
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
        name = key.decode("utf-8", "replace")
        if name in _USED_FIELDS or name.startswith(_SPARSE_FIELD):
            fields[name] = value.decode("utf-8", "surrogateescape")
        start += int(length)
    return fields
