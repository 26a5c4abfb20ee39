"""Which members of a tar make a sample, out of their names alone, and what is wrong with such a group.

A key ends at the first dot of a name, and what follows is the extension, as in webdataset (base_plus_ext): KEY.jpg,
KEY.txt, KEY.mask.png. It differs where what stands between the first and the last dot is no word ("at 10.27.05.jpg",
"v1.5-3.jpg"): there the key ends at the last dot, since such images would all fall into one key.
"""

import re
from dataclasses import dataclass, field
from typing import Generic, NamedTuple, TypeVar

from library.data.index.rows import IMAGE_EXTENSIONS, printable

_WORD = re.compile(r"[A-Za-z][\w-]*")
_BEGINNINGS = (b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"II*\0", b"MM\0*", b"\xff\x0a", b"\0\0\0\x0cJXL ")
BEGINNING_BYTES = 16  # of a file, which tell whether it is an image
CAME_BEFORE = "a sample of this key came before in the shard; the members of one must follow one another"
NO_KEY = "an image whose name has no key (it begins with a dot) or no extension"
OF_ITS_OWN = "its key ends at the first dot, and there is an image of that key; it has an own caption: rename it"

Content = TypeVar("Content")


class MemberName(NamedTuple):
    """A member's name, taken apart.

    Attributes:
        key: with the folder in the tar, so that a/1.jpg and b/1.jpg are two samples.
        extension: with its dot, in small letters; it may have two parts (".mask.png").
        short_key: up to the first dot, as webdataset has it; the same as `key` but for names with further dots.
    """

    key: str
    extension: str
    short_key: str

    @classmethod
    def of(cls, path: str) -> "MemberName | None":
        """Take a path in a tar apart; None for a name without key or extension ("README", ".hidden")."""
        folder, slash, name = path.removeprefix("./").rpartition("/")
        base, _, extension = name.partition(".")
        if not base or not extension:
            return None
        key = base
        if "." in extension:
            between, _, last = extension.rpartition(".")
            if last and not _WORD.fullmatch(between):
                key, extension = f"{base}.{between}", last
        front = folder + slash
        return cls(front + key, printable(f".{extension.lower()}"), front + base)


@dataclass
class Group(Generic[Content]):
    """The members of one key.

    Attributes:
        members: regular files by extension.
        odd: why others cannot be read, by extension: links, sparse files.
        twice: extensions of members that come again, once for each further time.
        reason: why it is no sample at all; "" if it may be one.
    """

    key: str
    short_key: str
    members: dict[str, Content] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)
    twice: list[str] = field(default_factory=list)
    reason: str = ""

    def add(self, extension: str, content: Content, odd: str) -> bool:
        """Take a member in; False where there is one of that extension."""
        if extension in self.members or extension in self.odd:
            return False
        if odd:
            self.odd[extension] = odd
        else:
            self.members[extension] = content
        return True

    @property
    def extensions(self) -> list[str]:
        """All, each as often as it came."""
        return [*self.members, *self.odd, *self.twice]

    @property
    def images(self) -> list[str]:
        """The extensions of its images."""
        return [extension for extension in self.extensions if extension in IMAGE_EXTENSIONS]

    @property
    def image(self) -> str:
        """The extension of the first image that is a regular file."""
        return next(extension for extension in self.members if extension in IMAGE_EXTENSIONS)

    @property
    def further_images(self) -> list[str]:
        """Extensions of images besides, such as ".mask.png"."""
        return [
            extension
            for extension in self.extensions
            if extension.count(".") > 1 and extension not in IMAGE_EXTENSIONS and _ending(extension) in IMAGE_EXTENSIONS
        ]

    def problem(self, captions: tuple[str, ...], extras: tuple[str, ...]) -> str:
        """Why the sample cannot be used, as far as names tell; "" if they tell nothing.

        Args:
            captions: extensions of members that a caption can come from.
            extras: names of the extra images that are wanted.
        """
        if self.reason:
            return self.reason
        if self.key.startswith("/") or (".." in self.key and ".." in self.key.split("/")):
            return "its name in the tar leads out of the folder that it would be unpacked to"
        if self.twice:
            return f"several members of one name in the tar ({_listed(self.twice)})"
        images = self.images
        if len(images) > 1:
            return f"{len(images)} images of one name in the tar"
        if images and not self.odd:
            return ""
        wanted = {*images, *captions, *(extension for extension in self.further_images if _extra(extension) in extras)}
        if not images:
            wanted |= set(self.odd)
        for extension in sorted(wanted & self.odd.keys()):
            return f"its {extension} is {printable(self.odd[extension])}, which is not followed; pack the file itself"
        if images:
            return ""
        ends = ": the key of a name ends at its first dot" if self.further_images else ""
        return f"no image, only {_listed(self.extensions)}{ends}"

    def lost(self) -> list[str]:
        """What messages call each image of a group that cannot be used; the key alone where there is one or none."""
        images = [*self.images, *([] if self.images else self.further_images)]
        return [self.key] if len(images) < 2 else [f"{self.key}{extension}" for extension in images]

    def unused_images(self, extras: tuple[str, ...]) -> tuple[list[str], list[str]]:
        """Of a sample that can be used the images that are not: those that have a caption of their own and so are
        samples that fell into its key, and extensions of all others.
        """
        own: list[str] = []
        others: list[str] = []
        for extension in self.further_images:
            if _extra(extension) in extras:
                continue
            stem = extension.removesuffix(_ending(extension))
            captioned = any(f"{stem}{ending}" in self.members for ending in (".txt", ".caption", ".json"))
            (own if captioned else others).append(extension)
        return own, others


def _ending(extension: str) -> str:
    """The last part of an extension: ".png" of ".mask.png"."""
    return f".{extension.rpartition('.')[2]}"


def _extra(extension: str) -> str:
    """The name of an extra image: "mask" of ".mask.png"."""
    return extension[1:].rpartition(".")[0]


def _listed(extensions: list[str], most: int = 8) -> str:
    shown = sorted(set(extensions))
    return " ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def looks_like_image(beginning: bytes) -> bool:
    """Whether a file's first bytes are those of an image, of the known kinds and of others."""
    in_container = beginning[8:12] == b"WEBP" or beginning[4:12] in (b"ftypavif", b"ftypheic", b"ftypmif1")
    is_bmp = beginning.startswith(b"BM") and beginning[6:10] == bytes(4)
    return in_container or is_bmp or beginning.startswith(_BEGINNINGS)
