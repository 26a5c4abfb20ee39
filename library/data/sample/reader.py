"""Bytes of images, of extra images and of captions of an index, read where they are."""

import os
from collections import OrderedDict
from pathlib import Path, PurePath

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_lines, caption_text
from library.data.image_header import MAX_BYTES
from library.data.index.rows import CaptionKind
from library.data.index.shard_members import MemberName
from library.data.index.table import Index
from library.data.index.tar_headers import BLOCK, MAX_EXTENSION_BYTES, names_of

# Of a tar, in front of a member's contents: names that do not fit into its header stand there. What does not do is
# followed by the next; the last holds a long name and a pax header of the largest sizes that the index takes.
_BYTES_BEFORE = (16 * BLOCK, 256 * BLOCK, 2 * (MAX_EXTENSION_BYTES + 2 * BLOCK))
_MAX_OPEN = 64  # shards kept open; the usual limit of a process is 1024 files


class Reader:
    """Reads rows of an index. Shards are opened when first needed; copies in other processes open their own."""

    def __init__(self, index: Index) -> None:
        self.index = index
        self._open: OrderedDict[Path, int] = OrderedDict()

    def image(self, row: int) -> bytes:
        """The encoded image.

        Raises:
            SampleError: it cannot be read any more.
        """
        source = self.index.source(row)
        if not source.is_shard:
            return self._file(source.path / self.index.key(row), MAX_BYTES)
        record = self.index.record(row)
        return self._member(row, int(record["image_offset"]), int(record["image_bytes"]))

    def extras(self, row: int) -> dict[str, bytes]:
        """The encoded extra images that the row's subset wants, by name.

        Raises:
            SampleError: one cannot be read any more.
        """
        source = self.index.source(row)
        found = {}
        for extra in source.extras:
            offset, size, path = self.index.extra(row, extra)
            if source.is_shard:
                found[extra.name] = self._member(row, offset, size)
            else:
                root = self.index.subsets[source.subset].path if extra.folder is None else extra.folder
                found[extra.name] = self._file(root / path, MAX_BYTES)
        return found

    def caption(self, row: int) -> str:
        """The caption as the data set gives it, "" where there is none: its lines that are not empty.

        Raises:
            SampleError: it cannot be read, or is in an unknown encoding.
        """
        record = self.index.record(row)
        kind, offset, size = int(record["caption_kind"]), int(record["caption_offset"]), int(record["caption_bytes"])
        if kind == CaptionKind.ABSENT:
            return ""
        if kind == CaptionKind.STORED:
            return caption_lines(self.index.stored_caption(row))
        source = self.index.source(row)
        if source.is_shard:
            data = self._member(row, offset, size)
        else:
            stem = PurePath(self.index.key(row)).stem
            path = source.path / f"{stem[: len(stem) - offset]}{source.caption_extension}"
            data = self._file(path, MAX_CAPTION_BYTES)
        return caption_text(data, kind == CaptionKind.JSON)

    def close(self) -> None:
        """Close the shards; the next read opens them again."""
        while self._open:
            os.close(self._open.popitem()[1])

    def _member(self, row: int, offset: int, size: int) -> bytes:
        """A member of a row's shard; the header before it tells whether it is still the one that was indexed."""
        key, path = self.index.key(row), self.index.source(row).path
        try:
            data = os.pread(self._descriptor(path), BLOCK + size, offset - BLOCK)
            if len(data) < BLOCK + size:
                raise SampleError("its shard has become shorter since it was indexed")
            if not _is_named(key, data[:BLOCK], size) and not self._is_named_before(key, path, offset, size):
                raise SampleError("its shard has changed since it was indexed")
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from error
        return data[BLOCK:]

    def _is_named_before(self, key: str, path: Path, offset: int, size: int) -> bool:
        """Whether an extended header in front of a member gives it the key."""
        for before in _BYTES_BEFORE:
            start = max(0, offset - before)
            if _is_named(key, os.pread(self._descriptor(path), offset - start, start), size):
                return True
        return False

    def _descriptor(self, path: Path) -> int:
        if path in self._open:
            self._open.move_to_end(path)
            return self._open[path]
        descriptor = os.open(path, os.O_RDONLY)
        self._open[path] = descriptor
        if len(self._open) > _MAX_OPEN:
            os.close(self._open.popitem(last=False)[1])
        return descriptor

    @staticmethod
    def _file(path: Path, most_bytes: int) -> bytes:
        try:
            with path.open("rb") as file:
                data = file.read(most_bytes + 1)
        except OSError as error:
            raise SampleError(f"cannot be read: {error.strerror}") from error
        if len(data) > most_bytes:
            raise SampleError(f"a file of more than {most_bytes} bytes")
        return data

    def __getstate__(self) -> dict[str, object]:
        return {"index": self.index, "_open": OrderedDict()}

    def __del__(self) -> None:
        self.close()


def _is_named(key: str, before: bytes, size: int) -> bool:
    """Whether a member with these blocks before its contents is one of the key."""
    return any((name := MemberName.of(found)) is not None and name.key == key for found in names_of(before, size))
