"""The samples of one shard that comes as a stream of bytes, in its order, each with its number there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_text, is_json_name
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import MAX_BYTES, upright_size
from library.data.index.rows import IMAGE_EXTENSIONS, printable
from library.data.index.tar_headers import TornTarError, walk
from library.data.stream.shard_bytes import Patience, ShardStream
from library.redaction import shown_address

_PIECE = 1 << 16  # bytes that are asked for at once


@dataclass(frozen=True)
class StreamSubset:
    """Where the captions of some shards are.

    Attributes:
        caption_extension: with its dot, ".txt".
        class_words: caption of the images without one ("": none).
        extras: names of the extra images that each sample must have, as members KEY.NAME.EXT.
    """

    caption_extension: str
    class_words: str = ""
    extras: tuple[str, ...] = ()


@dataclass(frozen=True)
class StreamSample:
    """One sample of a shard, its image still encoded.

    Attributes:
        number: of the sample in its shard, from 0; bad ones count.
        name: what messages call it.
        bad: why it cannot be used; "" if it can.
        size_px: upright width and height.
        others: extensions of its members besides the image.
        extras: its extra images by name, still encoded.
    """

    number: int
    name: str
    bad: str = ""
    image: bytes = b""
    size_px: tuple[int, int] = (0, 0)
    caption: str = ""
    others: frozenset[str] = frozenset()
    extras: Mapping[str, bytes] = field(default_factory=dict)


def shard_samples(address: str, subset: StreamSubset, patience: Patience) -> Iterator[StreamSample]:
    """All samples of a shard, bad ones among them.

    The caption is the member with the caption extension, else the JSON member's "caption", else the class words.

    Raises:
        ShardError: it cannot be read, or not any further.
        TornTarError: it ends or is damaged within the sample that would come next.
    """
    from webdataset.tariterators import group_by_keys

    twice: list[Exception] = []

    def note_twice(error: Exception) -> bool:
        twice.append(error)
        return True

    with closing(_Forward(ShardStream(address, patience))) as forward:
        groups = group_by_keys(_files(forward), handler=note_twice)
        for number, group in enumerate(groups):
            key = group.pop("__key__")
            del group["__url__"]
            name = printable(f"{shown_address(address)}:{key}")
            try:
                if twice:
                    raise SampleError("several members of one name in the tar")
                yield _sample(number, name, key, group, subset)
            except SampleError as error:
                yield StreamSample(number, name, str(error))
            twice.clear()


class _Forward:
    """Bytes of a stream by their position, which never falls."""

    def __init__(self, stream: ShardStream) -> None:
        self._stream, self._position, self._ahead = stream, 0, b""

    def __call__(self, size: int, position: int) -> bytes:
        """As many bytes from there on, fewer at the end."""
        while self._position < position:
            if not self._take(min(position - self._position, _PIECE)):
                return b""
        parts = []
        while size and (data := self._take(size)):
            parts.append(data)
            size -= len(data)
        return b"".join(parts)

    def _take(self, size: int) -> bytes:
        if not self._ahead:
            self._ahead = self._stream.read(max(size, _PIECE))
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        self._position += len(data)
        return data

    def close(self) -> None:
        self._stream.close()


def _files(read_at: _Forward) -> Iterator[dict[str, object]]:
    """The regular files of a tar, as webdataset has them; of one that is too large None in place of its content."""
    for member in walk(read_at, None):
        content: bytes | None = None
        if member.size <= MAX_BYTES:
            content = read_at(member.size, member.offset)
            if len(content) < member.size:
                raise TornTarError(f"it ends at byte {member.offset + len(content)}, inside a member")
        yield {"fname": member.name.removeprefix("./"), "data": content, "__url__": ""}


def _sample(number: int, name: str, key: str, members: dict[str, bytes | None], subset: StreamSubset) -> StreamSample:
    """The sample that a group of members is.

    Raises:
        SampleError: it cannot be used.
    """
    by_extension = {f".{extension}": content for extension, content in members.items()}
    images = sorted(IMAGE_EXTENSIONS & by_extension.keys())
    others = frozenset(by_extension) - set(images)
    if key.startswith("/") or ".." in key.split("/"):
        raise SampleError("its name in the tar leads out of the folder that it would be unpacked to")
    if len(images) != 1:
        what = f"only {' '.join(sorted(map(printable, others)))}"
        raise SampleError(f"{len(images)} images of one name in the tar" if images else f"no image, {what}")
    image = by_extension[images[0]]
    if image is None:
        raise SampleError(f"an image file of more than {MAX_BYTES} bytes")
    size_px = upright_size(FileBytes.of(image))
    extras = {extra: _extra(by_extension, extra) for extra in subset.extras}
    return StreamSample(number, name, "", image, size_px, _caption(by_extension, subset), others, extras)


def _extra(by_extension: dict[str, bytes | None], name: str) -> bytes:
    """The only member KEY.NAME.EXT."""
    found = [f".{name}{ending}" for ending in sorted(IMAGE_EXTENSIONS) if f".{name}{ending}" in by_extension]
    if len(found) != 1:
        raise SampleError(f"it has {len(found) or 'no'} extra image{'s' * (len(found) > 1)} '{name}'")
    content = by_extension[found[0]]
    if content is None:
        raise SampleError(f"an extra image '{name}' of more than {MAX_BYTES} bytes")
    return content


def _caption(by_extension: dict[str, bytes | None], subset: StreamSubset) -> str:
    extension = subset.caption_extension.lower()
    if extension in by_extension and not is_json_name(extension):
        content = by_extension[extension]
        if content is None or len(content) > MAX_CAPTION_BYTES:
            raise SampleError(f"a caption of more than {MAX_CAPTION_BYTES} bytes")
        if caption := caption_text(content, is_json=False):
            return caption
    content = by_extension.get(".json")
    if content and len(content) <= MAX_CAPTION_BYTES and _has_caption(content):
        return caption_text(content, is_json=True)
    return subset.class_words


def _has_caption(content: bytes) -> bool:
    """True if a JSON member has a caption; a damaged one has none."""
    try:
        found = json.loads(content)
    except (ValueError, RecursionError):
        return False
    return isinstance(found, dict) and isinstance(found.get("caption"), str) and bool(found["caption"].strip())
