"""What there is to index, found by names and file states alone: shards, and folders of images, at any depth."""

import os
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import NamedTuple

from library.data.index.class_folders import check_repeats, class_folders, misplaced, top_of, unused
from library.data.index.extras import (
    Extra,
    ExtraFile,
    FolderExtras,
    check_extras,
    file_of_metadata,
    files_by_stem,
    unused_extras,
)
from library.data.index.folder_walk import Folder, is_image, passed_over, stem_of, walk
from library.data.index.metadata import read_metadata
from library.data.index.rows import FACE_NUMBERS, IMAGE_EXTENSIONS, printable
from library.data.index.tar_headers import looks_like_tar, other_kind
from library.errors import InputError

# A large folder is several sources, each with a share of the files by a hash of their stems: they are scanned in
# parallel, and a new file costs a new scan of its share only.
_FILES_IN_SOURCE = 4096


@dataclass(frozen=True)
class Subset:
    """What a run takes from one place.

    Attributes:
        path: a folder, or a tar.
        caption_extension: with its dot, ".txt".
        metadata: a JSON with captions (library.data.index.metadata); then only the images that it names are used.
        repeats: how often an epoch shows its images, times the N of `N_class words`.
        class_words: caption of the images without one ("": none).
        class_folders: sub-directories named `N_class words` have their meaning.
        flag: what messages call the option that names it.
        extras: extra images that its samples must have.
        any_line: each line of a caption trains at times, not the first alone (--enable_wildcard).
        output_dir: where the run writes, which is passed over: sample pictures are no data.
    """

    path: Path
    caption_extension: str
    metadata: Path | None = None
    repeats: int = 1
    class_words: str = ""
    class_folders: bool = True
    flag: str = "--train_data_dir"
    extras: tuple[Extra, ...] = ()
    any_line: bool = False
    output_dir: Path | None = None

    def __str__(self) -> str:
        return f"{self.flag} {self.path}"


@dataclass(frozen=True)
class Source:
    """A shard, or images directly in a folder (all, or a share of them).

    Attributes:
        path: the tar or the folder.
        is_shard: which of the two.
        caption_extension: of its caption files.
        repeats: how often an epoch shows its images.
        class_words: caption of the images without one ("": none).
        subset: number of the subset that it belongs to.
        share: (which, of how many): of a large folder's files.
        extras: as its subset's.
    """

    path: Path
    is_shard: bool
    caption_extension: str
    repeats: int = 1
    class_words: str = ""
    subset: int = 0
    share: tuple[int, int] = (0, 1)
    extras: tuple[Extra, ...] = ()

    def name(self, key: str) -> str:
        """What messages call its image of that key; the shard itself without one."""
        if not key:
            return printable(str(self.path))
        return printable(f"{self.path}:{key}" if self.is_shard else str(self.path / key))


class FileState(NamedTuple):
    """A file by name, with what tells that it has changed."""

    name: str
    size: int
    mtime_ns: int


@dataclass(frozen=True)
class Listed:
    """A source with the state of its files: for a shard the tar and its parquet, for a folder all of its share.

    Attributes:
        captions: of images by name, where metadata gives them; None without metadata.
        extras: of a folder: the files of extra images.
    """

    source: Source
    files: tuple[FileState, ...]
    captions: dict[str, str] | None = None
    extras: FolderExtras = field(default_factory=dict)

    @cached_property
    def images(self) -> int:
        """How many images a folder's share has; 1 for a shard."""
        return 1 if self.source.is_shard else sum(map(is_image, (file.name for file in self.files)))


@dataclass
class Found:
    """The sources of a subset, shards by name and then folders by name, and sentences for the user."""

    listed: list[Listed] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)


def find_sources(subset: Subset, number: int = 0) -> Found:
    """Look for shards and images, at any depth; hidden folders are passed over.

    Sub-directories named `N_class words` directly in the folder make it a DreamBooth set: then only they are read for
    images, their own sub-directories included.

    Raises:
        InputError: no such folder, or nothing in it.
        OSError: a folder cannot be read.
    """
    data = subset.path
    plain = Source(
        data, True, subset.caption_extension, subset.repeats, subset.class_words, number, extras=subset.extras
    )
    if data.is_file():
        if not looks_like_tar(data):
            kind = f"it is {known}" if (known := other_kind(data)) else "there is no tar header at byte 0"
            raise InputError(f"{subset} is a file, but not a tar: {kind}. Name a folder of shards or images, or a tar.")
        found = Found([_shard(plain, {path.name: path for path in (data, data.with_suffix(".parquet"))})])
    elif data.is_dir():
        found = _find_in_folder(subset, plain)
    else:
        raise InputError(f"{subset}: there is no such folder.")
    if subset.metadata is not None:
        _without_shards(found, subset.metadata)
    if not found.listed:
        raise InputError(
            f"{subset}: 0 images found. Looked there, at any depth, for shards (*.tar) and images "
            f"({image_extensions()}). {' '.join(found.warnings)}".rstrip()
        )
    check_extras(subset.extras, str(subset), data, all(entry.source.is_shard for entry in found.listed))
    return found


def _find_in_folder(subset: Subset, plain: Source) -> Found:
    data, found = subset.path, Found()
    apart = [extra.folder.resolve() for extra in subset.extras if extra.folder is not None]
    apart = [other for other in apart if other != data.resolve() and other.is_relative_to(data.resolve())]
    output_dir = subset.output_dir if subset.output_dir is not None and subset.output_dir.is_dir() else None
    folders = [
        folder
        for folder in walk(data, output_dir)
        if not any(folder.path.resolve().is_relative_to(other) for other in apart)
    ]
    found.warnings += passed_over(folders, data, subset.metadata)
    if subset.metadata is not None:
        folders = _with_metadata(folders, subset, subset.metadata, found.warnings)
    classes = class_folders(folders, data) if subset.class_folders else {}
    shown = {path: named for path, named in classes.items() if named[0] > 0}
    images: list[Listed] = []
    used: list[Folder] = []
    left_out: dict[Path, int] = {}
    for folder in folders:
        top = top_of(folder.path, data)
        repeats, class_words = classes.get(top, (1, plain.class_words))
        source = replace(plain, path=folder.path, repeats=repeats * plain.repeats, class_words=class_words)
        if repeats:
            shards = _shards(folder, source)
            if shards or folder.images:
                check_repeats(top, repeats)
            found.listed += shards
        if repeats and (not shown or top in shown):
            images += _folder(folder, replace(source, is_shard=False), data)
            used.append(folder)
        elif folder.images:
            left_out[top] = left_out.get(top, 0) + folder.images
    found.listed += images
    for extra in subset.extras:
        if extra.folder is not None:
            files = [
                file for entry in images for of_image in entry.extras.get(extra.name, {}).values() for file in of_image
            ]
            found.warnings += unused_extras(extra.folder, {file.path for file in files})
    found.warnings += [unused(count, path, data) for path, count in left_out.items()]
    if subset.class_folders:
        found.warnings += misplaced(used, shown, data, subset.flag)
    return found


def _with_metadata(folders: list[Folder], subset: Subset, file: Path, warnings: list[str]) -> list[Folder]:
    """The folders with what the metadata has of their images, and without the images that it does not name."""
    data = subset.path
    metadata = read_metadata(file, {extra.name: extra.folder is None for extra in subset.extras})
    inside = {folder.path: _inside(folder.path, data) for folder in folders}
    images = [inside[folder.path] + entry.name for folder in folders for entry in folder.files if is_image(entry.name)]
    named = metadata.of_images(images, data)
    captioned = []
    for folder in folders:
        entries = {
            entry.name: named[path] for entry in folder.files if (path := inside[folder.path] + entry.name) in named
        }
        files = tuple(entry for entry in folder.files if entry.name in entries or not is_image(entry.name))
        captions = {name: entry.caption for name, entry in entries.items()}
        extra_paths = {name: entry.extras for name, entry in entries.items()}
        captioned.append(replace(folder, files=files, captions=captions, extra_paths=extra_paths))
    if unnamed := len(images) - len(named):
        warnings.append(f"{unnamed} images in {data} are not used, because {file} does not name them.")
    warnings += metadata.warnings
    return captioned


def _inside(folder: Path, data: Path) -> str:
    """What stands before the names of a folder's files in their paths inside the data's."""
    path = folder.relative_to(data).as_posix()
    return "" if path == "." else f"{path}/"


def _without_shards(found: Found, metadata: Path) -> None:
    """Leave shards out: metadata is about folders."""
    shards = [entry for entry in found.listed if entry.source.is_shard]
    if shards:
        found.listed = [entry for entry in found.listed if not entry.source.is_shard]
        found.warnings.append(
            f"{len(shards)} shards are not used: {metadata} is for images in folders; shards have their own captions."
        )


def image_extensions() -> str:
    """All of them, for messages."""
    return " ".join(sorted(IMAGE_EXTENSIONS))


def _shards(folder: Folder, source: Source) -> list[Listed]:
    """The tars directly in a folder."""
    tars = [entry for entry in folder.files if entry.name.endswith(".tar")]
    files = {entry.name: entry for entry in folder.files} if tars else {}
    shards = []
    for tar in tars:
        sidecar = files.get(f"{tar.name[:-4]}.parquet")
        members = {tar.name: tar} | ({sidecar.name: sidecar} if sidecar else {})
        shards.append(_shard(replace(source, path=folder.path / tar.name), members))
    return shards


def _shard(source: Source, files: dict[str, Path] | dict[str, os.DirEntry[str]]) -> Listed:
    """A shard with the state of its files; a sidecar that is missing has none."""
    states = []
    for name, file in files.items():
        try:
            stat = file.stat()
        except FileNotFoundError:
            continue
        states.append(FileState(name, stat.st_size, stat.st_mtime_ns))
    return Listed(source, tuple(states))


def _folder(folder: Folder, source: Source, data: Path) -> list[Listed]:
    """The images directly in a folder of the data's, as one source or several."""
    images = folder.images
    if not images:
        return []
    shares = 1 << (-(-images // _FILES_IN_SOURCE) - 1).bit_length()
    files: list[list[FileState]] = [[] for _ in range(shares)]
    for entry in folder.files:
        if entry.name.endswith(".npz"):  # cached latents, which change nothing in the table
            continue
        stem = stem_of(entry.name)
        stat = entry.stat()
        face = FACE_NUMBERS.search(stem)  # its caption file may have the stem without it, and must be in the same share
        named = stem if face is None else stem[: face.start()]
        share = zlib.crc32(named.encode("utf-8", "surrogateescape")) % shares
        files[share].append(FileState(entry.name, stat.st_size, stat.st_mtime_ns))
    listed = []
    by_stem = {
        extra.name: files_by_stem(extra.folder, folder.path.relative_to(data))
        for extra in source.extras
        if extra.folder is not None
    }
    for number, part in enumerate(files):
        captions = None
        if folder.captions is not None:
            captions = {file.name: folder.captions[file.name] for file in part if file.name in folder.captions}
        if part:
            extras = _extras(folder, source, data, by_stem, part) if source.extras else {}
            listed.append(Listed(replace(source, share=(number, shares)), tuple(part), captions, extras))
    return listed


def _extras(
    folder: Folder,
    source: Source,
    data: Path,
    by_stem: dict[str, dict[str, list[ExtraFile]]],
    files: Sequence[FileState],
) -> FolderExtras:
    """The files of the extra images of those of a folder's files that are images."""
    found: dict[str, dict[str, list[ExtraFile]]] = {}
    images = [file.name for file in files if is_image(file.name)]
    for extra in source.extras:
        own = found[extra.name] = {}
        for image in images:
            if extra.folder is not None:
                own[image] = by_stem[extra.name].get(stem_of(image), [])
            elif (path := folder.extra_paths.get(image, {}).get(extra.name)) is not None:
                own[image] = file_of_metadata(data, path)
    return found
