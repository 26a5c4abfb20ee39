"""Tokenizers that are on this machine, for an error that says which one is missing: single files have none.

Looked through are the folders around the model and the cache of the hub. They are offered and not taken: which
tokenizer a model was trained with, nothing in its file says.
"""

import json
from collections.abc import Iterator
from pathlib import Path

from library.models.family import EncoderSpec

_FILES = ("tokenizer.json", "vocab.json")
_LOOKED_AT = 200  # folders; there may be thousands beside a model


def tokenizers_here(spec: EncoderSpec, model: Path | None) -> list[Path]:
    """Folders with a tokenizer that may be the text encoder's, those next to the model first.

    Args:
        model: the single file.
    """
    found = []
    for folder in (*_around(model), *_cached()):
        for place in (folder / spec.tokenizer_folder, folder / "tokenizer", folder):
            if place not in found and _is_clip_tokenizer(place):
                found.append(place)
                break
    return found


def _around(model: Path | None) -> Iterator[Path]:
    """The folder that the model is in, those in it, and the one above."""
    if model is None:
        return
    yield model.parent
    try:
        beside = sorted(model.parent.iterdir())[:_LOOKED_AT]
        yield from (entry for entry in beside if entry.is_dir())
    except OSError:
        return
    yield model.parent.parent


def _cached() -> Iterator[Path]:
    """The newest copy of each model's repository in the hub's cache."""
    from huggingface_hub import constants

    try:
        for repository in sorted(Path(constants.HF_HUB_CACHE).glob("models--*"))[:_LOOKED_AT]:
            copies = sorted((repository / "snapshots").iterdir(), key=lambda one: one.stat().st_mtime)
            yield from copies[-1:]
    except OSError:
        return


def _is_clip_tokenizer(folder: Path) -> bool:
    """Whether the files there are of a tokenizer of CLIP's, as far as they say."""
    if not any((folder / name).is_file() for name in _FILES):
        return False
    try:
        config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return (folder / "merges.txt").is_file()
    return isinstance(config, dict) and str(config.get("tokenizer_class", "CLIP")).startswith("CLIP")
