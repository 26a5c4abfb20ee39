"""Shelves beside images: .npz that sd-scripts reads and writes, of an image's latents or its caption's encoding."""

import json
import os
import zipfile
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from library.data.cache.block_files import write_shared
from library.data.cache.entries import DamagedEntryError, Entry, Found, Made
from library.keyed_random import Stream, generator

_TEXT_ENDING = "_te_outputs.npz"  # sd-scripts' ending, for two text encoders
_TEXT_ENDING_OF_ONE = "_sd_te_outputs.npz"  # ours: sd-scripts keeps no outputs of SD 1.x and 2.x
# The states of the first text encoder; where there is a second one, its states; its pooled text. SDXL's, of which
# sd-scripts keeps such files alone.
_TEXT_KEYS = ("hidden_state1", "hidden_state2", "pool2")
# The keys of .npz files that are this project's own: of what they were made, and the moments of latents.
_FACTS, _MOMENT = "made_of", "moment"
_FLOATS = (np.float16, np.float32, np.float64)  # that torch takes from numpy
_SETTINGS_DIGITS = 8  # of the settings' digest, in names of files


class Beside(Protocol):
    """The .npz of one image: where it is, and how an entry lies in it."""

    @property
    def settings(self) -> str:
        """What its entry must have been made with."""

    @property
    def path(self) -> Path:
        """Where other programs look for it."""

    @property
    def older(self) -> Sequence[Path]:
        """Where other programs kept it once; only read."""

    def arrays(self, entry: Entry) -> dict[str, np.ndarray]:
        """What is written, by key."""

    def entry(self, file: Any) -> Entry:
        """What a file says that this project or another program wrote; `made` is of "" in the latter.

        Raises:
            KeyError: it holds nothing that can be used here.
        """


class NpzShelf:
    """Beside every image a file of its own.

    It has the name that other programs look for, unless a file of that name is of another program or of other settings:
    that one stays, and the name of this one has a digest of its settings in it.
    """

    def __init__(self, beside: Callable[[int], Beside]) -> None:
        """
        Args:
            beside: from a place to its file.
        """
        self._beside = beside

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf."""
        found = Found()
        found.take(places, lambda place: self.read(place).made)
        return found

    def read(self, place: int) -> Entry:
        """As Shelf; where there is none of the settings that are wanted, one of others."""
        beside, of_others = self._beside(place), []
        for path in (_own_path(beside), beside.path, *beside.older):
            entry = _load(path, beside)
            if entry is not None and entry.made.settings == beside.settings:
                return entry
            of_others += [] if entry is None else [entry]
        if not of_others:
            raise KeyError(place)
        return of_others[0]

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        for place, entry in entries.items():
            beside = self._beside(place)
            arrays = beside.arrays(entry)

            def save(path: Path, arrays: dict[str, np.ndarray] = arrays) -> None:
                with path.open("wb") as file:  # given a path, numpy would add an ending of its own
                    np.savez(file, **arrays)  # type: ignore[arg-type]

            target = _target(beside)
            write_shared(target, save)
            if target != beside.path and not beside.path.exists():
                _rename_unless_there(target, beside.path)


def _own_path(beside: Beside) -> Path:
    """A name that no other settings have; it does not end as sd-scripts' names do, which it takes apart."""
    return beside.path.with_name(f"{beside.path.stem}.{beside.settings[:_SETTINGS_DIGITS]}.npz")


def _load(path: Path, beside: Beside) -> Entry | None:
    """What a file says; None where there is none, or it holds nothing that can be used here.

    Raises:
        DamagedEntryError
    """
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as file:
            return beside.entry(file)
    except KeyError:
        return None
    except (OSError, ValueError, TypeError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DamagedEntryError(f"{path} is damaged") from error


def _target(beside: Beside) -> Path:
    """Where an entry is written: over one of the same settings or a damaged one, else under its own name at first."""
    own = _own_path(beside)
    if own.is_file() or not beside.path.exists():
        return own
    try:
        there = _load(beside.path, beside)
    except DamagedEntryError:
        return beside.path
    return beside.path if there is not None and there.made.settings == beside.settings else own


def _rename_unless_there(path: Path, to: Path) -> None:
    """Rename a file unless another process has just made one of that name."""
    try:
        os.link(path, to)
    except FileExistsError:
        return
    except OSError:  # a file system without links
        path.replace(to)
    else:
        path.unlink()


@dataclass(frozen=True)
class Picture:
    """The .npz of an image's latents: one sample of them, as sd-scripts trains on, and their moments.

    A file that another program made has latents alone: they are the mean, and the standard deviation is 0.

    Attributes:
        image: the image's file.
        settings: what the entry must have been made with.
        size_wh_px: the image's.
        bucket_wh_px: that it is cropped to.
        ending: of the file's name after the image's size, by the model's family.
        mirrored: whether latents of the mirrored image are needed, too.
        latent_px: pixels a side that one latent stands for.
        channels: of the latents of the VAE that is trained with.
    """

    image: Path
    settings: str
    size_wh_px: tuple[int, int]
    bucket_wh_px: tuple[int, int]
    ending: str
    mirrored: bool = False
    latent_px: int = 8
    channels: int = 4

    @property
    def path(self) -> Path:
        """As Beside."""
        width, height = self.size_wh_px
        return self.image.with_name(f"{self.image.stem}_{width:04d}x{height:04d}{self.ending}")

    @property
    def older(self) -> list[Path]:
        """As Beside."""
        return [self.image.with_name(f"{self.image.stem}.npz")]

    def arrays(self, entry: Entry) -> dict[str, np.ndarray]:
        """One sample in sd-scripts' keys, whose noise is a function of what was encoded, and the moments in ours."""
        (height, width, top, left, bucket_h, bucket_w), _ = entry.variant(False)
        # sd-scripts takes the mirrored image's left margin as the bucket's width less the third number.
        mirrored_left = entry.variant(True)[0][3] if len(entry.tensors) == 4 else left
        mean, std = (_array(tensor) for tensor in entry.tensors[:2])
        key = int(digest[:16], 16) if (digest := entry.made.content) else 0
        noise = generator(key, Stream.VAE).standard_normal(mean.shape, dtype=np.float32)
        arrays = {
            "latents": mean.astype(np.float32) + std.astype(np.float32) * noise,
            "original_size": np.array([width, height]),
            "crop_ltrb": np.array([left, top, bucket_w - mirrored_left, bucket_h - top]),
            _FACTS: np.array(json.dumps([entry.made.content, entry.made.settings, entry.size_ids])),
            f"{_MOMENT}_0": mean,
            f"{_MOMENT}_1": std,
        }
        if len(entry.tensors) == 4:
            mean, std = (_array(tensor) for tensor in entry.tensors[2:])
            arrays["latents_flipped"] = mean.astype(np.float32) + std.astype(np.float32) * noise[..., ::-1]
            arrays |= {f"{_MOMENT}_2": mean, f"{_MOMENT}_3": std}
        return arrays

    def entry(self, file: Any) -> Entry:
        """An entry of this project, or another program's latents (C, h, w) of the bucket's size and the VAE's channels.

        Raises:
            KeyError: it holds no such latents, or none of the mirrored image where they are needed.
        """
        if _FACTS in file:
            content, settings, size_ids = json.loads(str(file[_FACTS]))
            tensors: list[Tensor] = []
            while (name := f"{_MOMENT}_{len(tensors)}") in file:
                tensors.append(torch.from_numpy(file[name]))
            return Entry(Made(content, settings), tuple(size_ids), tuple(tensors))
        bucket_w, bucket_h = self.bucket_wh_px
        shape_CHW = self.channels, bucket_h // self.latent_px, bucket_w // self.latent_px
        names = ("latents", "latents_flipped") if self.mirrored else ("latents",)
        for suffix in (f"_{shape_CHW[1]}x{shape_CHW[2]}", ""):
            found = [file[f"{name}{suffix}"] for name in names if f"{name}{suffix}" in file]
            # Latents of another kind of model can lie under the same name.
            if len(found) == len(names) and all(one.shape == shape_CHW and one.dtype in _FLOATS for one in found):
                break
        else:
            raise KeyError("latents")
        width, height = (int(side) for side in file[f"original_size{suffix}"])
        left, top, right = (int(side) for side in file[f"crop_ltrb{suffix}"][:3])
        size_ids = (height, width, top, left, bucket_h, bucket_w)
        if self.mirrored:
            size_ids += (height, width, top, max(bucket_w - right, 0), bucket_h, bucket_w)
        means = [torch.from_numpy(one).float() for one in found]
        moments = tuple(part for mean in means for part in (mean, torch.zeros_like(mean)))
        return Entry(Made("", ""), size_ids, moments)


@dataclass(frozen=True)
class TextLayout:
    """What text states (T, C) of one caption are and, where the family has it, pooled text (P,).

    Attributes:
        first_width: how many of the C channels are the first text encoder's.
    """

    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[torch.dtype, ...]
    first_width: int

    @property
    def parts(self) -> dict[str, tuple[int, ...]]:
        """The arrays of an .npz by key, with their shapes."""
        (tokens, channels), *pooled = self.shapes
        second = channels - self.first_width
        shapes = (
            (tokens, self.first_width),
            (tokens, second) if second else None,
            tuple(pooled[0]) if pooled else None,
        )
        return {key: shape for key, shape in zip(_TEXT_KEYS, shapes, strict=True) if shape is not None}


@dataclass(frozen=True)
class TextOutputs:
    """The .npz of what the text encoders make of an image's caption, each encoder's states by themselves.

    Attributes:
        image: the image's file.
        settings: what the entry must have been made with.
        layout: of what is trained with; outputs for another --max_token_length or of other encoders are not taken.
    """

    image: Path
    settings: str
    layout: TextLayout

    @property
    def path(self) -> Path:
        """As Beside."""
        ending = _TEXT_ENDING if _TEXT_KEYS[1] in self.layout.parts else _TEXT_ENDING_OF_ONE
        return self.image.with_name(f"{self.image.stem}{ending}")

    @property
    def older(self) -> list[Path]:
        """As Beside."""
        return []

    def arrays(self, entry: Entry) -> dict[str, np.ndarray]:
        """The numbers in sd-scripts' keys, and of what they were made in ours."""
        states_TC, *pooled = (_array(tensor) for tensor in entry.tensors)
        first = self.layout.first_width
        parts = dict(zip(_TEXT_KEYS, (states_TC[:, :first], states_TC[:, first:], *pooled), strict=False))
        facts = np.array(json.dumps([entry.made.content, entry.made.settings]))
        return {**{key: parts[key] for key in self.layout.parts}, _FACTS: facts}

    def entry(self, file: Any) -> Entry:
        """An entry of this project or of another program, in the dtypes that are trained with.

        Raises:
            KeyError: it holds no outputs of the layout's shapes.
        """
        shapes = self.layout.parts
        parts = {key: torch.from_numpy(file[key]) for key in shapes}
        if any(part.shape != shapes[key] or not part.is_floating_point() for key, part in parts.items()):
            raise KeyError(_TEXT_KEYS[0])
        if any(key in file for key in _TEXT_KEYS if key not in shapes):
            raise KeyError("outputs of another family's text encoders")
        made = Made(*json.loads(str(file[_FACTS]))) if _FACTS in file else Made("", "")
        states_TC = torch.cat([parts[key] for key in _TEXT_KEYS[:2] if key in parts], dim=-1)
        tensors = (states_TC, *(parts[key] for key in _TEXT_KEYS[2:] if key in parts))
        return Entry(made, (), tuple(one.to(dtype) for one, dtype in zip(tensors, self.layout.dtypes, strict=True)))


def _array(tensor: Tensor) -> np.ndarray:
    """The same numbers in a dtype that numpy has."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
