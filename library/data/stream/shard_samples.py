"""The samples of one shard that comes as a stream of bytes, in its order, each with its number there."""

import json
from collections.abc import Iterator, Mapping
from contextlib import closing
from dataclasses import dataclass, field, replace

from library.data.bad_samples import SampleError
from library.data.caption_text import MAX_CAPTION_BYTES, caption_text, is_json_name
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import MAX_BYTES, upright_size
from library.data.index.rows import IMAGE_EXTENSIONS, printable
from library.data.index.shard_members import (
    BEGINNING_BYTES,
    CAME_BEFORE,
    NO_KEY,
    OF_ITS_OWN,
    Group,
    MemberName,
    looks_like_image,
)
from library.data.index.tar_headers import Member, TornTarError, walk
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

    @property
    def captions(self) -> tuple[str, ...]:
        """Extensions of members that a caption can come from."""
        return self.caption_extension.lower(), ".json"

    def uses(self, extension: str) -> bool:
        """Whether anything of a sample comes from a member of that extension."""
        extra, _, ending = extension[1:].rpartition(".")
        is_image = f".{ending}" in IMAGE_EXTENSIONS
        return extension in self.captions or (is_image and (not extra or extra in self.extras))


@dataclass(frozen=True)
class StreamSample:
    """One sample of a shard, its image still encoded.

    Attributes:
        number: of the sample in its shard, from 0; bad ones count.
        name: what messages call it.
        bad: why it cannot be used; "" if it can.
        lost: how many images that is, at least 1.
        size_px: upright width and height.
        others: extensions of its members besides the image.
        extras: its extra images by name, still encoded.
        beside: (name, reason) of images that fell into its key and are not used.
    """

    number: int
    name: str
    bad: str = ""
    lost: int = 1
    image: bytes = b""
    size_px: tuple[int, int] = (0, 0)
    caption: str = ""
    others: frozenset[str] = frozenset()
    extras: Mapping[str, bytes] = field(default_factory=dict)
    beside: tuple[tuple[str, str], ...] = ()


_Group = Group[bytes | None]  # None: of a member that is too large


def shard_samples(address: str, subset: StreamSubset, patience: Patience) -> Iterator[StreamSample]:
    """All samples of a shard, bad ones among them; which members are one, `library.data.index.shard_members` tells.

    The caption is the member with the caption extension, else the JSON member's "caption", else the class words.

    Raises:
        ShardError: it cannot be read, or not any further.
        TornTarError: it ends or is damaged within the sample that would come next.
    """
    shard, number = shown_address(address), 0
    with closing(_Forward(ShardStream(address, patience))) as forward:
        for group in _whole(_groups(forward, subset)):
            name = printable(f"{shard}:{group.key}")
            try:
                sample = _sample(number, name, group, subset)
            except SampleError as error:
                sample = StreamSample(number, name, str(error), len(group.lost()))
            yield sample
            number += 1


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


def _groups(read_at: _Forward, subset: StreamSubset) -> Iterator[_Group]:
    """The members of a tar that follow one another with one key; images without a key as groups that are bad."""
    group: _Group | None = None
    part, found = 0, False
    try:
        for member in walk(read_at, None):
            found = True
            name = MemberName.of(member.name)
            if name is None:
                if not member.odd and looks_like_image(read_at(min(member.size, BEGINNING_BYTES), member.offset)):
                    yield _bad_group(member.name, NO_KEY)
                continue
            if group is None or (part, group.key) != (member.part, name.key):
                if group is not None:
                    yield group
                group, part = Group(name.key, name.short_key), member.part
            content = _content(read_at, member) if subset.uses(name.extension) and not member.odd else b""
            if not group.add(name.extension, content, member.odd):
                group.twice.append(name.extension)
    except TornTarError as error:
        if error.behind_end and group is not None:
            yield group
        raise
    if group is not None:
        yield group
    if not found:
        raise TornTarError("it holds no file")


def _content(read_at: _Forward, member: Member) -> bytes | None:
    if member.size > MAX_BYTES:
        return None
    content = read_at(member.size, member.offset)
    if len(content) < member.size:
        raise TornTarError(f"it ends at byte {member.offset + len(content)}, inside a member")
    return content


def _bad_group(name: str, reason: str) -> _Group:
    return Group(printable(name), "", reason=reason)


def _whole(groups: Iterator[_Group]) -> Iterator[_Group]:
    """The groups that are samples; one whose key came before in the shard is bad.

    KEY.0.txt beside KEY.jpg is one more text of that sample: a group whose key has further dots and that has no image
    is left out where the group of the short key has one.
    """
    waiting: list[_Group] = []
    seen: set[str] = set()
    short, has_image = "", False

    def judged(group: _Group) -> _Group:
        if group.key in seen and not group.reason:
            group = replace(group, reason=CAME_BEFORE)
        seen.add(group.key)
        return group

    for group in groups:
        if group.short_key != short:
            yield from map(judged, () if has_image else waiting)
            short, has_image, waiting = group.short_key, False, []
        if group.key != group.short_key and not group.images and not group.reason:
            waiting.append(group)
            continue
        has_image = has_image or (group.key == group.short_key and bool(group.images))
        yield judged(group)
    yield from map(judged, () if has_image else waiting)


def _sample(number: int, name: str, group: _Group, subset: StreamSubset) -> StreamSample:
    """The sample that a group of members is.

    Raises:
        SampleError: it cannot be used.
    """
    if problem := group.problem(subset.captions, subset.extras):
        raise SampleError(problem)
    members = group.members
    image = members[group.image]
    if image == b"":
        raise SampleError("an image file without content")
    if image is None:
        raise SampleError(f"an image file of more than {MAX_BYTES} bytes")
    size_px = upright_size(FileBytes.of(image))
    extras = {extra: _extra(members, extra) for extra in subset.extras}
    own, _ = group.unused_images(subset.extras)
    beside = tuple((f"{name}{extension}", OF_ITS_OWN) for extension in own)
    others = frozenset(members) - {group.image}
    caption = _caption(members, subset)
    return StreamSample(
        number, name, image=image, size_px=size_px, caption=caption, others=others, extras=extras, beside=beside
    )


def _extra(by_extension: Mapping[str, bytes | None], name: str) -> bytes:
    """The only member KEY.NAME.EXT."""
    found = [f".{name}{ending}" for ending in sorted(IMAGE_EXTENSIONS) if f".{name}{ending}" in by_extension]
    if len(found) != 1:
        raise SampleError(f"it has {len(found) or 'no'} extra image{'s' * (len(found) > 1)} '{name}'")
    content = by_extension[found[0]]
    if content is None:
        raise SampleError(f"an extra image '{name}' of more than {MAX_BYTES} bytes")
    return content


def _caption(by_extension: Mapping[str, bytes | None], subset: StreamSubset) -> str:
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
