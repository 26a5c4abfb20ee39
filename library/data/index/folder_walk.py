"""The folders of a data set with their files, and what lies there and is no part of it, counted by reason."""

import errno
import os
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from operator import attrgetter
from pathlib import Path

from library.data.index.rows import COMMON_CAPTION_EXTENSIONS, IMAGE_EXTENSIONS, NAMED, first_few, printable

_OTHER_PICTURES = frozenset(
    {
        *(".heic", ".heif", ".hif", ".jxl", ".jxr", ".jp2", ".j2k", ".psd", ".svg", ".tga", ".exr", ".hdr", ".ico"),
        *(".dds", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".raf", ".orf", ".rw2"),
        *(".mp4", ".mov", ".webm", ".mkv", ".avi", ".m4v"),
    }
)
_ARCHIVE = re.compile(
    r"\.(tar|tar\.(gz|bz2|xz|zst|lz4|br)|tgz|tbz2?|txz|tzst|zip|7z|rar)$", re.IGNORECASE
)  # but for .tar in small letters, which is a shard
_UNFINISHED = (".part", ".partial", ".crdownload", ".download", ".incomplete", ".aria2", ".!qb")
_CAPTION_LISTS = frozenset({"metadata.jsonl", "metadata.csv", "captions.json", "captions.jsonl", "captions.csv"})
# As previews are named here and in sd-scripts: NAME_TIME_STEP_PROMPT_SEED.png.
_PREVIEW = re.compile(r"_\d{8}(\d{6})?_e?\d{6}_\d{2}(_\d+)?\.png$")


@dataclass(frozen=True)
class Folder:
    """A folder and the files directly in it.

    Attributes:
        files: by name.
        dead_links: names of links that lead nowhere.
        no_files: names of pipes, sockets and devices.
        captions: of its images, where metadata gives them; None without metadata.
        extra_paths: of the metadata, by image and extra.
    """

    path: Path
    files: tuple[os.DirEntry[str], ...]
    dead_links: tuple[str, ...] = ()
    no_files: tuple[str, ...] = ()
    captions: dict[str, str] | None = None
    extra_paths: dict[str, dict[str, str]] = field(default_factory=dict)

    @cached_property
    def images(self) -> int:
        """How many of the files are images."""
        return sum(is_image(entry.name) for entry in self.files)


def extension_of(name: str) -> str:
    """In small letters, with its dot; "" where there is none."""
    start = name.rfind(".")
    return name[start:].lower() if start > 0 else ""


def is_file(entry: os.DirEntry[str]) -> bool:
    """Whether it is a file, or a link that leads to one."""
    return _is(entry.is_file)


def stem_of(name: str) -> str:
    """The name without its extension, as PurePath has it, in a fraction of its time: a start asks for all names."""
    start = name.rfind(".")
    return name[:start] if 0 < start < len(name) - 1 else name


def is_image(name: str) -> bool:
    """By its extension."""
    return extension_of(name) in IMAGE_EXTENSIONS


def walk(root: Path, never: Path | None = None) -> Iterator[Folder]:
    """The folder and those in it, by name, without hidden entries; one that links lead to twice comes once.

    Args:
        never: a folder that does not come.
    """
    seen: set[tuple[int, int]] = set()
    if never is not None:
        stat = never.stat()
        seen.add((stat.st_dev, stat.st_ino))
    waiting = [root]
    while waiting:
        path = waiting.pop()
        stat = path.stat()
        if (stat.st_dev, stat.st_ino) in seen:
            continue
        seen.add((stat.st_dev, stat.st_ino))
        with os.scandir(path) as entries:
            shown = sorted((entry for entry in entries if entry.name[0] != "."), key=attrgetter("name"))
        folders = [entry for entry in shown if _is(entry.is_dir)]
        waiting += [Path(entry.path) for entry in reversed(folders)]
        files = tuple(entry for entry in shown if is_file(entry))
        dead: tuple[str, ...] = ()
        no_files: tuple[str, ...] = ()
        if len(files) + len(folders) < len(shown):
            others = [entry for entry in shown if not (_is(entry.is_dir) or is_file(entry))]
            dead = tuple(entry.name for entry in others if entry.is_symlink() and not Path(entry.path).exists())
            no_files = tuple(entry.name for entry in others if entry.name not in dead)
        yield Folder(path, files, dead, no_files)


def _is(ask: Callable[[], bool]) -> bool:
    """What a directory entry answers; False of a link that leads to itself."""
    try:
        return ask()
    except OSError as error:
        if error.errno == errno.ELOOP:
            return False
        raise


def passed_over(folders: Iterable[Folder], data: Path, metadata: Path | None = None) -> list[str]:
    """Sentences about what lies in the folders and is not used: how much of each kind, the first names, the way out.

    Args:
        metadata: a list of captions that is read.
    """
    found: dict[str, list[str]] = {}
    pictures: Counter[str] = Counter()
    tars = sum(entry.name.endswith(".tar") for folder in folders for entry in folder.files)
    for folder in folders:
        names = {entry.name for entry in folder.files}
        found.setdefault("links", []).extend(str(folder.path / name) for name in folder.dead_links)
        found.setdefault("no files", []).extend(str(folder.path / name) for name in folder.no_files)
        for entry in folder.files:
            name = entry.name
            kind = _kind(name, names)
            if kind is not None:
                found.setdefault(kind, []).append(str(folder.path / name))
                pictures.update([extension_of(name)] if kind == "pictures" else [])
    if metadata is not None and "lists" in found:
        found["lists"] = [path for path in found["lists"] if Path(path).resolve() != metadata.resolve()]
    kinds = ", ".join(f"{count} {extension}" for extension, count in pictures.most_common(NAMED))
    images = " ".join(sorted(IMAGE_EXTENSIONS))
    no_shard = (
        "tell of shards that are not there. Fetch their tars, or take them out"
        if tars
        else "are no images. Images in the columns of a parquet are not read: make shards or files of them"
    )
    sentences: Mapping[str, str] = {
        "links": "links in {data} lead nowhere. Fetch what they point to, or take them out",
        "no files": "entries of {data} are pipes, sockets or devices, and are not read. Put files in their places",
        "pictures": f"files in {{data}} are of kinds that are not read ({kinds}). Convert them to one of {images}, or "
        "take them out",
        "archives": "archives in {data} are not read. Shards are tars named *.tar, in small letters, and not "
        "compressed: unpack (gunzip) or rename them",
        "unfinished": "files in {data} are downloads that were not finished. Fetch them again, or take them out",
        "sidecars": f"parquet and stats files in {{data}} {no_shard}",
        "lists": "lists of captions in {data} are not read. Captions stand in a file beside each image, or in a "
        "metadata file (--in_json)",
        "previews": "images in {data} have the names of pictures that a training drew, and train like the others. Take "
        "them out if they do not belong to the data",
    }
    return [
        f"{len(found[kind])} {sentence.format(data=data)}: {first_few([printable(name) for name in found[kind]])}."
        for kind, sentence in sentences.items()
        if found.get(kind)
    ]


def _kind(name: str, names: set[str]) -> str | None:
    """Which kind of entry that is not used, or looks as if it should not be, a file is.

    Args:
        names: of all files of its folder.
    """
    extension = extension_of(name)
    if extension in IMAGE_EXTENSIONS:
        return "previews" if extension == ".png" and _PREVIEW.search(name) else None
    if extension in COMMON_CAPTION_EXTENSIONS:
        return None
    if extension in _OTHER_PICTURES:
        return "pictures"
    if extension in _UNFINISHED:
        return "unfinished"
    if not name.endswith(".tar") and _ARCHIVE.search(name):
        return "archives"
    if name.lower() in _CAPTION_LISTS:
        return "lists"
    for ending in (".parquet", "_stats.json"):
        if name.endswith(ending) and f"{name.removesuffix(ending)}.tar" not in names:
            return "sidecars"
    return None
