"""Folders named `N_class words`: which of them have their meaning, and which only look as if they had."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

from library.data.index.folder_walk import Folder
from library.data.index.rows import NAMED, printable
from library.errors import InputError

_MOST_REPEATS = 100_000
_DREAMBOOTH = re.compile(r"(\d+)_(.+)")
_ALMOST = re.compile(r"(\d{1,3})[ _-]+(.*)")  # a year (2023-holiday) is no number of repeats
_OF_REGULARISATION = re.compile(r"(?i)reg|reg[-_ ]?images|regulari[sz]ation([-_ ]images)?|class[-_ ]images")


def class_of(name: str) -> tuple[int, str] | None:
    """(N, class words) of a name."""
    match = _DREAMBOOTH.fullmatch(name)
    return (int(match[1]), match[2].strip()) if match and match[2].strip() else None


def class_folders(folders: Sequence[Folder], data: Path) -> dict[Path, tuple[int, str]]:
    """(N, class words) of the folders directly in the data's that are named so."""
    return {
        folder.path: named
        for folder in folders
        if folder.path.parent == data and (named := class_of(folder.path.name)) is not None
    }


def check_repeats(path: Path, repeats: int) -> None:
    """Refuse a class folder whose number is hardly one of repeats, such as the date of 20240131_trip.

    Raises:
        InputError: the number is larger than 100,000.
    """
    if repeats > _MOST_REPEATS:
        raise InputError(
            f"{printable(str(path))}: the name of a folder 'N_class words' says that an epoch shows each of its images "
            f"N times, here {repeats:,} times; at most {_MOST_REPEATS:,} are possible. Rename the folder: to 1_WORDS, "
            "or to a name that does not begin with a number and '_'."
        )


def top_of(path: Path, data: Path) -> Path:
    """The folder directly in the data's that a folder is, or lies in; the data's own for itself."""
    inside = path.relative_to(data).parts
    return data / inside[0] if inside else data


def unused(count: int, path: Path, data: Path) -> str:
    """A sentence about images that class folders leave no room for."""
    if path == data:
        return f"{count} images directly in {data} are not used, because it has sub-directories named 'N_class words'."
    return f"{count} images in {printable(str(path))} are not used: its name is not 'N_class words' (N ≥ 1)."


def misplaced(folders: Sequence[Folder], used: Mapping[Path, tuple[int, str]], data: Path, flag: str) -> list[str]:
    """Sentences about folders whose names look as if they should say something and do not.

    Args:
        folders: those whose images train.
        used: the class folders that have their meaning.
        flag: that named the data.
    """
    with_images = [folder.path for folder in folders if folder.images]
    found = []
    if not used and (own := class_of(data.name)) is not None and with_images:
        found.append(
            f"{data} itself is named like a DreamBooth sub-directory. To have its images repeated and captioned by "
            f"its name ('{own[1]}'), give its parent folder as {flag}."
        )
    almost = dict.fromkeys(
        top for path in with_images if (top := top_of(path, data)) not in used and _almost(top.name) and top != data
    )
    if almost:
        named = "; ".join(f"{printable(top.name)} (name it {_meant(top.name)})" for top in list(almost)[:NAMED])
        found.append(
            f"{len(almost)} folders in {data} are almost named 'N_class words', and their images are shown once, "
            f"without class words: {named}{_more(len(almost))}."
        )
    deeper = dict.fromkeys(path for path in with_images if path.parent != data and path != data and class_of(path.name))
    if deeper:
        parents = list(dict.fromkeys(path.parent for path in deeper))
        named = "; ".join(printable(str(path)) for path in list(deeper)[:NAMED])
        found.append(
            f"{len(deeper)} folders named 'N_class words' are not directly in {data}, so that their names mean "
            f"nothing: {named}{_more(len(deeper))}. Give the folder that they are in as {flag}"
            f"{_regularisation_too(parents)}: {'; '.join(printable(str(path)) for path in parents[:NAMED])}."
        )
    regularising = dict.fromkeys(
        parent
        for path in with_images
        for parent in (path, *path.parents)
        if parent.is_relative_to(data) and parent != data and _OF_REGULARISATION.fullmatch(parent.name)
    )
    if regularising and flag != "--reg_data_dir":
        named = "; ".join(printable(str(path)) for path in list(regularising)[:NAMED])
        found.append(
            f"images in {named} train like the others. If they are regularisation images, move them out of the data "
            "and give their folder as --reg_data_dir."
        )
    return found


def _almost(name: str) -> bool:
    return class_of(name) is None and _ALMOST.fullmatch(name) is not None


def _meant(name: str) -> str:
    match = _ALMOST.fullmatch(name)
    assert match is not None
    return f"{match[1]}_{printable(match[2]) or 'WORDS'}"


def _regularisation_too(parents: Sequence[Path]) -> str:
    regularising = any(_OF_REGULARISATION.fullmatch(path.name) for path in parents)
    return " (regularisation images as --reg_data_dir)" if regularising else ""


def _more(count: int) -> str:
    return f"; and {count - NAMED} more" if count > NAMED else ""
