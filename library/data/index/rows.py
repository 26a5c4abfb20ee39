"""One row an image: the table that scanning a shard or a folder makes, and that an index puts together.

A row says where the bytes of image and caption are, never what they are, so that it takes 49 bytes at any image size
and the table of a shard can be one array on disk.
"""

import hashlib
import re
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from library.data.image_formats.colour_profile import Conversion

IMAGE_EXTENSIONS = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".avif", ".gif", ".tif", ".tiff"}
)
# Extensions that are searched for only to tell the user about a wrong --caption_extension.
COMMON_CAPTION_EXTENSIONS = (".txt", ".caption", ".cap", ".tags")
NAMED = 5  # so many names of a long list stand in a message
# A face that an image's stem or key tells of: its centre's x and y, its width and its height in px.
FACE_NUMBERS = re.compile(r"_(\d+)_(\d+)_(\d+)_(\d+)(?:\.\w+)?$")


class CaptionKind(IntEnum):
    """Where the caption of a row is. Stored in caches: never renumber."""

    ABSENT = 0  # there is none: the image trains with an empty caption
    PLAIN = 1  # a text file: a member of the row's tar, or a file beside the image in a folder
    JSON = 2  # the "caption" field of such a file in JSON
    STORED = 3  # in the table's own text (from a parquet sidecar, or a DreamBooth folder's class words)


ROW = np.dtype(
    [
        ("image_offset", np.int64),  # of the image's first byte in the shard; 0 in a folder
        ("image_bytes", np.int64),
        ("caption_kind", np.uint8),
        # In the shard, or for STORED in the table's text; for a file in a folder how many characters of the image's
        # stem the file's has less.
        ("caption_offset", np.int64),
        ("caption_bytes", np.int32),
        ("name_offset", np.int64),  # in the table's text: the sample's key in a shard, the file's name in a folder
        ("name_bytes", np.int32),
        ("width", np.int32),  # px, as the source says; decoding goes by the image itself
        ("height", np.int32),
    ]
)


@dataclass
class Part:
    """What scanning one shard or folder gives.

    Attributes:
        rows: ROW array.
        text: uint8, the bytes that name_offset and STORED captions point into.
        bad: (key, reason) of images that cannot be used.
        unnamed: how many more cannot be used, by reason; they are in no file, and `bad` has an entry for many of them.
        warnings: sentences for the user; the source's name is put before them.
        without_image: samples that have no image.
        strange_extensions: what those samples have, with counts.
        further_images: images of samples that are not used, such as masks, by extension.
        other_captions: images that have a caption file, but with another extension than asked for, by extension.
        blank: keys of images whose caption file is blank, so that the next source of a caption counts.
        many_lines: keys of images whose captions have several lines.
        profiles: how many images have a colour profile that changes their colours, by the profiles' names.
        unusable_profiles: keys of images whose colour profile cannot be used.
        extras: arrays of where the rows' extra images are, by the arrays' names (library.data.index.extras).
    """

    rows: np.ndarray
    text: np.ndarray
    bad: list[tuple[str, str]] = field(default_factory=list)
    unnamed: Counter[str] = field(default_factory=Counter)
    warnings: list[str] = field(default_factory=list)
    without_image: int = 0
    strange_extensions: Counter[str] = field(default_factory=Counter)
    further_images: Counter[str] = field(default_factory=Counter)
    other_captions: Counter[str] = field(default_factory=Counter)
    blank: list[str] = field(default_factory=list)
    many_lines: list[str] = field(default_factory=list)
    profiles: Counter[str] = field(default_factory=Counter)
    unusable_profiles: list[str] = field(default_factory=list)
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    def add_absent(self, count: int, what: str, reason: str) -> None:
        """Count samples that cannot be used and are in no file, however many, by one entry.

        Args:
            what: they are, behind their number.
        """
        if count > 0:
            self.bad.append((f"({count} {what})", reason))
            self.unnamed[reason] += count - 1

    def note_profile(self, key: str, profile: Conversion) -> None:
        """Count what the colour profile of an image does."""
        if not profile.usable:
            self.unusable_profiles.append(key)
        elif profile.transform is not None:
            self.profiles[profile.name] += 1


@dataclass(frozen=True)
class Summary:
    """What an index keeps in memory of a part, however many rows it has.

    Attributes:
        count: rows.
        digest: of rows, text and extras.
        without_caption: how many rows have none.
        named_without_caption: keys of the first of those.
        blank, many_lines, unusable_profiles: how many keys Part has.
        named_blank, named_many_lines, named_unusable_profiles: the first of those.
        bad, unnamed, warnings, without_image, strange_extensions, further_images, other_captions, profiles:
            as in Part.
    """

    count: int
    digest: str
    without_caption: int
    named_without_caption: list[str]
    blank: int
    named_blank: list[str]
    many_lines: int
    named_many_lines: list[str]
    unusable_profiles: int
    named_unusable_profiles: list[str]
    profiles: dict[str, int]
    bad: list[list[str]]
    unnamed: dict[str, int]
    warnings: list[str]
    without_image: int
    strange_extensions: dict[str, int]
    further_images: dict[str, int]
    other_captions: dict[str, int]

    @classmethod
    def of(cls, part: Part) -> "Summary":
        """Of a part that has just been scanned."""
        absent = np.flatnonzero(part.rows["caption_kind"] == CaptionKind.ABSENT)
        content = hashlib.sha256(part.rows.tobytes())
        content.update(part.text.tobytes())
        for name, array in part.extras.items():
            content.update(name.encode() + array.tobytes())
        return cls(
            len(part.rows),
            content.hexdigest(),
            len(absent),
            [row_key(part.rows[row], part.text) for row in absent[:NAMED]],
            len(part.blank),
            part.blank[:NAMED],
            len(part.many_lines),
            part.many_lines[:NAMED],
            len(part.unusable_profiles),
            part.unusable_profiles[:NAMED],
            dict(part.profiles),
            [[key, reason] for key, reason in part.bad],
            dict(part.unnamed),
            part.warnings,
            part.without_image,
            dict(part.strange_extensions),
            dict(part.further_images),
            dict(part.other_captions),
        )


def row_key(record: np.void, text: np.ndarray) -> str:
    """The sample's key in its shard, or the file's name in its folder."""
    offset = int(record["name_offset"])
    return stored_text(text, offset, int(record["name_bytes"]))


def row_keys(rows: np.ndarray, text: np.ndarray) -> list[bytes]:
    """The keys of some rows, in UTF-8."""
    whole, ends = text.tobytes(), rows["name_offset"] + rows["name_bytes"]
    return [whole[start:end] for start, end in zip(rows["name_offset"].tolist(), ends.tolist(), strict=True)]


def stored_text(text: np.ndarray, offset: int, size: int) -> str:
    """Text of a table, at the place that a row gives."""
    return text[offset : offset + size].tobytes().decode("utf-8", "surrogateescape")


class TextPool:
    """Bytes laid end to end; `add` says where they are. The same text is kept once."""

    def __init__(self) -> None:
        self._parts: list[bytes] = []
        self._where: dict[bytes, int] = {}
        self._size = 0

    def add(self, text: str) -> tuple[int, int]:
        """(offset, bytes) of the text in UTF-8 (bytes of a file name that are no UTF-8 survive)."""
        data = text.encode("utf-8", "surrogateescape")
        if data not in self._where:
            self._where[data] = self._size
            self._parts.append(data)
            self._size += len(data)
        return self._where[data], len(data)

    def array(self) -> np.ndarray:
        """All of it, uint8."""
        return np.frombuffer(b"".join(self._parts), np.uint8)


def first_few(names: Sequence[str], count: int | None = None) -> str:
    """The first few of a list for a message, and how many more there are.

    Args:
        names: the list, or its beginning.
        count: of the whole list, where `names` is its beginning.
    """
    more = (len(names) if count is None else count) - NAMED
    return "; ".join(names[:NAMED]) + (f"; and {more} more" if more > 0 else "")


def printable(name: str) -> str:
    """A name as messages show it. In a tar it can hold any bytes: none may move a cursor, or fail to be printed."""
    return name if name.isprintable() else "".join(c if c.isprintable() else ascii(c)[1:-1] for c in name)


def row_array(rows: Iterable[tuple[int, ...]]) -> np.ndarray:
    """A ROW array from tuples in ROW's order."""
    return np.array(list(rows), dtype=ROW)
