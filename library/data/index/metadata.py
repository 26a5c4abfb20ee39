"""What a metadata JSON (--in_json) says of images: one object, image key → {"caption": …, "tags": …}.

Beside them an entry may have the paths of extra images under their names (library.data.index.extras).
"""

import json
import os
import posixpath
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from library.data.caption_text import caption_lines
from library.data.index.rows import first_few, printable
from library.errors import InputError
from library.user_text import read_user_text


@dataclass(frozen=True)
class Entry:
    """What is said of one image.

    Attributes:
        caption: its lines; "" where the file says nothing.
        extras: paths of extra images by their names, in the data's folder or absolute.
    """

    caption: str
    extras: dict[str, str]


@dataclass
class Metadata:
    """Entries by key.

    Attributes:
        warnings: sentences for the user.
    """

    path: Path
    entries: dict[str, Entry]
    warnings: list[str] = field(default_factory=list)

    def of_images(self, images: Iterable[str], data: Path) -> dict[str, Entry]:
        """The entries of those images that the file names, by the images' paths inside the data's folder.

        A key is the path inside the data's folder, or the whole path, each with or without extension. A name or stem
        alone is also that of an image deeper in the folder, where it can only be that one's. Keys that name no image or
        several are said in `warnings`.

        Args:
            images: paths inside the data's folder, with slashes.
        """
        keys = {_normal(key): key for key in reversed(self.entries)}  # of two alike the first
        keys |= {key: key for key in self.entries}
        roots = [
            "",
            *(f"{root}/" for root in (data.as_posix(), os.path.relpath(data), Path.cwd() / data, data.resolve())),
        ]
        found: dict[str, str] = {}
        others: dict[str, list[str]] = {}  # images that are not named by a path, by name and by stem
        for image in images:
            stem = posixpath.splitext(image)[0]
            key = next((keys[path] for root in roots for path in (root + image, root + stem) if path in keys), None)
            if key is not None:
                found[image] = key
            else:
                for name in {posixpath.basename(image), posixpath.basename(stem)}:
                    others.setdefault(name, []).append(image)
        used, of_several = set(found.values()), {}
        for name, alike in others.items():
            if name not in keys or keys[name] in used:
                continue
            if len({posixpath.dirname(image) for image in alike}) > 1:
                of_several[keys[name]] = f"{printable(keys[name])} ({printable(', '.join(alike[:2]))} …)"
                continue
            used.add(keys[name])
            found |= {image: keys[name] for image in alike if image not in found}
        unused = [printable(key) for key in self.entries if key not in used and key not in of_several]
        if unused:
            self.warnings.append(f"{len(unused)} keys of {self.path} name no image in {data}: {first_few(unused)}.")
        if of_several:
            self.warnings.append(
                f"{len(of_several)} keys of {self.path} could be several images in {data}, and are not used: "
                f"{first_few(list(of_several.values()))}. Give their paths inside that folder."
            )
        return {image: self.entries[key] for image, key in found.items()}


def read_metadata(path: Path, extras: Mapping[str, bool] | None = None) -> Metadata:
    """Read such a file; fields besides caption, tags and extra images are for other tools.

    Args:
        extras: names of the extra images that are wanted, and whether the file is where their paths are.

    Raises:
        InputError: it cannot be read, is not of this form, or names extra images that come from a folder; the first
            few wrong entries are named.
    """
    if path.suffix.lower() == ".jsonl":
        raise InputError(
            f"metadata {path}: is a list of JSON lines. It must be one object in a .json file, "
            '{"IMAGE": {"caption": "…", "tags": "…"}, …}.'
        )
    twice: list[str] = []

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        table = dict(pairs)
        if len(table) < len(pairs):
            seen: set[str] = set()
            twice.extend(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
        return table

    text = read_user_text(path, "metadata")
    try:
        content = json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise InputError(f"metadata {path}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f'metadata {path}: must be one object, {{"IMAGE": {{"caption": "…", "tags": "…"}}, …}}.')
    entries, wrong = {}, []
    for key, entry in content.items():
        try:
            entries[key] = Entry(_caption(entry), _extras(entry, extras or {}))
        except ValueError as error:
            wrong.append(f"{printable(key)}: {error}")
    if wrong:
        raise InputError(f"metadata {path}: {first_few(wrong)}.")
    found = Metadata(path, entries)
    if twice:
        named = first_few(list(map(printable, twice)))
        found.warnings.append(f"{len(twice)} keys stand twice in {path}, and the last of each counts: {named}.")
    return found


def _normal(key: str) -> str:
    """A path without `./` and the like, and with slashes where Windows has backslashes."""
    return posixpath.normpath(key if "/" in key else key.replace("\\", "/"))


def _caption(entry: object) -> str:
    """Caption and tags: each line of the caption with the tags behind it; "" where there is neither."""
    if not isinstance(entry, dict):
        raise ValueError(f'must be an object with "caption" and "tags", got {entry!r:.60}')
    caption, tags = (caption_lines(_text(name, entry.get(name))) for name in ("caption", "tags"))
    if not (caption and tags):
        return caption or tags
    all_tags = ", ".join(tags.split("\n"))
    return "\n".join(f"{line}, {all_tags}" for line in caption.split("\n"))


def _text(name: str, value: object) -> str:
    """A text; of a list of captions each a line, of tags all with commas; "" where tables write null or NaN."""
    if value is None or value != value:
        return ""
    if isinstance(value, list) and all(isinstance(one, str) for one in value):
        return ("\n" if name == "caption" else ", ").join(value)
    if not isinstance(value, str):
        raise ValueError(f'"{name}" must be a text, got {value!r:.60}')
    return value


def _extras(entry: object, extras: Mapping[str, bool]) -> dict[str, str]:
    assert isinstance(entry, dict)
    found = {}
    for name, here in extras.items():
        value = entry.get(name)
        if value is None or value != value:
            continue
        if not isinstance(value, str) or not value.strip():
            raise ValueError(f'"{name}" must be the path of an image, got {value!r:.60}')
        if not here:
            raise ValueError(
                f'"{name}" and a folder (conditioning_data_dir) are two places of one image: give one of them'
            )
        found[name] = value
    return found
