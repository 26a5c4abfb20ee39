"""Extra images of a sample by name (a conditioning image, a mask): which are wanted, and where a source has them."""

import os
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePath

import numpy as np

from library.data.bad_samples import SampleError
from library.data.image_header import MAX_BYTES
from library.data.index.folder_walk import is_file, is_image, passed_over, walk
from library.data.index.rows import IMAGE_EXTENSIONS, NAMED, TextPool, printable
from library.data.index.tar_headers import Member
from library.errors import InputError

# Where an extra image of a row is: a range of the row's shard, or a file whose path stands in the table's text.
EXTRA = np.dtype(
    [
        ("offset", np.int64),  # of the first byte in the shard; 0 in a folder
        ("bytes", np.int64),
        ("path_offset", np.int64),  # in the table's text; of no meaning in a shard
        ("path_bytes", np.int32),
    ]
)
Place = tuple[int, int, int, int]  # in EXTRA's order


@dataclass(frozen=True)
class Extra:
    """An extra image that each sample of a subset must have.

    In a shard it is the member KEY.NAME.EXT beside KEY.EXT. Of an image in a folder it is the file of the image's stem
    in a second folder that is laid out like the first one, or the file that the metadata has under NAME.

    Attributes:
        name: in small letters, without dots.
        folder: the second folder; None: the metadata says.
    """

    name: str
    folder: Path | None = None

    def array(self) -> str:
        """The name of its array in a table."""
        return f"extra {self.name}"


@dataclass(frozen=True)
class ExtraFile:
    """A file of an extra image with what tells that it has changed.

    Attributes:
        path: in the second folder; of the metadata's in the data's folder, or absolute.
    """

    path: str
    size: int
    mtime_ns: int


# Of the images of a folder: by the extra's name and the image's, the files that can be meant.
FolderExtras = Mapping[str, Mapping[str, Sequence[ExtraFile]]]


def check_extras(extras: Iterable[Extra], what: str, data: Path, all_in_shards: bool) -> None:
    """Refuse folders that are not there, are the images' own, or have nothing to act on.

    Args:
        what: names the data, for messages.
        data: where it is.

    Raises:
        InputError
    """
    for extra in extras:
        if extra.folder is None:
            continue
        given = f"--conditioning_data_dir {extra.folder}"
        if not extra.folder.is_dir():
            raise InputError(f"{given}: there is no such folder.")
        if extra.folder.resolve() == data.resolve():
            raise InputError(
                f"{given} is the folder of the images themselves; name the one of their {extra.name} images."
            )
        if all_in_shards:
            raise InputError(
                f"{given} has nothing to act on: {what} are shards, which have such images as members "
                f"KEY.{extra.name}.png; leave it out."
            )


def files_by_stem(root: Path, inside: Path) -> dict[str, list[ExtraFile]]:
    """The images in one folder of a second folder, by stem; nothing where there is no such folder.

    Args:
        inside: the folder's path in `root`.
    """
    found: dict[str, list[ExtraFile]] = {}
    if not (root / inside).is_dir():
        return found
    with os.scandir(root / inside) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if is_image(entry.name) and entry.name[0] != "." and is_file(entry):
                stat = entry.stat()
                file = ExtraFile((inside / entry.name).as_posix(), stat.st_size, stat.st_mtime_ns)
                found.setdefault(PurePath(entry.name).stem, []).append(file)
    return found


def unused_extras(folder: Path, used: Collection[str]) -> list[str]:
    """Sentences about what lies in a second folder and is no image's.

    Args:
        used: paths in the folder of the files that belong to images.
    """
    if not folder.is_dir():
        return []
    folders = list(walk(folder))
    warnings = passed_over(folders, folder)
    others = [
        path
        for inside in folders
        for entry in inside.files
        if is_image(entry.name) and (path := (inside.path.relative_to(folder) / entry.name).as_posix()) not in used
    ]
    if others:
        more = f"; and {len(others) - NAMED} more" if len(others) > NAMED else ""
        warnings.append(
            f"{len(others)} images in {folder} have no image of their stem in the same sub-folder: "
            f"{'; '.join(map(printable, others[:NAMED]))}{more}."
        )
    return warnings


def file_of_metadata(data: Path, path: str) -> list[ExtraFile]:
    """The file that the metadata names; none where it is not there."""
    try:
        stat = (data / path).stat()
    except OSError:
        return []
    return [ExtraFile(path, stat.st_size, stat.st_mtime_ns)]


def places_in_shard(extras: Iterable[Extra], members: Mapping[str, Member]) -> list[Place]:
    """Where a sample's extra images are among the members of its key, which are given by extension.

    Raises:
        SampleError: one is missing, is there twice or is too large.
    """
    places = []
    for extra in extras:
        found = [
            member
            for extension, member in members.items()
            if extension.removeprefix(f".{extra.name}") in IMAGE_EXTENSIONS and extension not in IMAGE_EXTENSIONS
        ]
        _check(extra.name, [member.size for member in found])
        places.append((found[0].offset, found[0].size, 0, 0))
    return places


def places_in_folder(extras: Iterable[Extra], files: FolderExtras, image: str, pool: TextPool) -> list[Place]:
    """Where an image's extra images are; their paths go into the pool.

    Raises:
        SampleError: one is missing, is there twice or is too large.
    """
    places = []
    for extra in extras:
        found = files.get(extra.name, {}).get(image, ())
        _check(extra.name, [file.size for file in found])
        places.append((0, found[0].size, *pool.add(found[0].path)))
    return places


def extra_arrays(extras: Sequence[Extra], places: Sequence[Sequence[Place]]) -> dict[str, np.ndarray]:
    """A table's arrays, by their names, out of each row's places in the order of `extras`."""
    columns = zip(*places, strict=True) if places else ([] for _ in extras)
    return {extra.array(): np.array(list(column), EXTRA) for extra, column in zip(extras, columns, strict=True)}


def _check(name: str, sizes: Sequence[int]) -> None:
    if not sizes:
        raise SampleError(f"it has no extra image '{name}'")
    if len(sizes) > 1:
        raise SampleError(f"it has {len(sizes)} extra images '{name}'")
    if sizes[0] > MAX_BYTES:
        raise SampleError(f"an extra image '{name}' of {sizes[0]} bytes, {MAX_BYTES} are the most")
