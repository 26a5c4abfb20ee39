"""What a metadata JSON (--in_json) says of images: one object, image key → {"caption": …, "tags": …}.

Beside them an entry may have the paths of extra images under their names (library.data.index.extras).
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from library.errors import InputError
from library.user_text import read_user_text


@dataclass(frozen=True)
class Entry:
    """What is said of one image.

    Attributes:
        caption: "" where the file says nothing.
        extras: paths of extra images by their names, in the data's folder or absolute.
    """

    caption: str
    extras: dict[str, str]


@dataclass
class Metadata:
    """Entries by key, and which keys have been asked for."""

    entries: dict[str, Entry]
    used: set[str] = field(default_factory=set)

    def find(self, image: Path, data: Path) -> Entry | None:
        """The entry of an image; None if the file does not name the image.

        A key is the path inside the data's folder, or the whole path, each with or without extension; or, when the file
        has none of these, the image's name or stem alone.
        """
        inside = image.relative_to(data)
        for path in (inside, image, PurePath(image.name)):
            for key in (path.as_posix(), path.with_suffix("").as_posix()):
                if key in self.entries:
                    self.used.add(key)
                    return self.entries[key]
        return None

    @property
    def unused(self) -> list[str]:
        """Keys that no image had."""
        return [key for key in self.entries if key not in self.used]


def read_metadata(path: Path, extras: Mapping[str, bool] | None = None) -> Metadata:
    """Read such a file. Caption and tags are joined with ", "; other fields are for other tools.

    Args:
        extras: names of the extra images that are wanted, and whether the file is where their paths are.

    Raises:
        InputError: it cannot be read, is not of this form, or names extra images that come from a folder.
    """
    text = read_user_text(path, "metadata")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"metadata {path}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f'metadata {path}: must be one object, {{"IMAGE": {{"caption": "…", "tags": "…"}}, …}}.')
    return Metadata(
        {
            key: Entry(_caption(path, key, entry), _extras(path, key, entry, extras or {}))
            for key, entry in content.items()
        }
    )


def _extras(path: Path, key: str, entry: dict[str, object], extras: Mapping[str, bool]) -> dict[str, str]:
    found = {}
    for name, here in extras.items():
        value = entry.get(name)
        if value is None:
            continue
        if not isinstance(value, str):
            raise InputError(f'metadata {path}: {key}: "{name}" must be the path of an image, got {value!r:.60}.')
        if not here:
            raise InputError(
                f'metadata {path}: {key}: "{name}" and a folder (conditioning_data_dir) are two places of one image: '
                "give one of them."
            )
        found[name] = value
    return found


def _caption(path: Path, key: str, entry: object) -> str:
    if not isinstance(entry, dict):
        raise InputError(f'metadata {path}: {key}: must be an object with "caption" and "tags", got {entry!r:.60}.')
    parts = []
    for name in ("caption", "tags"):
        text = entry.get(name)
        if text is not None and not isinstance(text, str):
            raise InputError(f'metadata {path}: {key}: "{name}" must be a text, got {text!r:.60}.')
        parts.append((text or "").strip())
    return ", ".join(part for part in parts if part)
