"""Captions from a metadata JSON (--in_json): one object, image key → {"caption": …, "tags": …}."""

import json
from dataclasses import dataclass, field
from pathlib import Path, PurePath

from library.errors import InputError
from library.user_text import read_user_text


@dataclass
class Metadata:
    """Captions by key, and which keys have been asked for.

    Attributes:
        captions: "" where the file says nothing.
    """

    captions: dict[str, str]
    used: set[str] = field(default_factory=set)

    def caption(self, image: Path, data: Path) -> str | None:
        """The caption of an image, "" for none; None if the file does not name the image.

        A key is the path inside the data's folder, or the whole path, each with or without extension; or, when the file
        has none of these, the image's name or stem alone.
        """
        inside = image.relative_to(data)
        for path in (inside, image, PurePath(image.name)):
            for key in (path.as_posix(), path.with_suffix("").as_posix()):
                if key in self.captions:
                    self.used.add(key)
                    return self.captions[key]
        return None

    @property
    def unused(self) -> list[str]:
        """Keys that no image had."""
        return [key for key in self.captions if key not in self.used]


def read_metadata(path: Path) -> Metadata:
    """Read such a file. Caption and tags are joined with ", "; other fields are for other tools.

    Raises:
        InputError: it cannot be read, or is not of this form.
    """
    text = read_user_text(path, "metadata")
    try:
        content = json.loads(text)
    except ValueError as error:
        raise InputError(f"metadata {path}: is not JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f'metadata {path}: must be one object, {{"IMAGE": {{"caption": "…", "tags": "…"}}, …}}.')
    return Metadata({key: _caption(path, key, entry) for key, entry in content.items()})


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
