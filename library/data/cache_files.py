"""Shelves on disk: a safetensors file a block, or beside an image the .npz that sd-scripts reads and writes."""

import json
import os
import platform
import zipfile
import zlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from library.atomic_write import write_file
from library.data.cache import BLOCK, DamagedEntryError, Entry, Found, Made
from library.keyed_random import Stream, generator

_MAX_OPEN = 64  # blocks kept open by a process
_ENDING = "_sdxl.npz"
_FACTS = "sdxl_pretrain"  # the key of .npz files under which this project says what they were made of


class BlockShelf:
    """Files of a folder, each with the entries of one block, and their checksums in its header."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open: OrderedDict[int, _OpenBlock] = OrderedDict()

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf."""
        found, path = Found(), self._path(places[0])
        try:
            block = _OpenBlock(path)
        except FileNotFoundError:
            return found
        except DamagedEntryError:
            return Found(damaged=[str(path)])
        for place in places:
            try:
                found.made[place] = block.read(place, verify).made
            except KeyError:
                continue
            except DamagedEntryError as error:
                found.damaged.append(str(error))
        return found

    def read(self, place: int) -> Entry:
        """As Shelf."""
        number = place // BLOCK
        if number not in self._open:
            try:
                self._open[number] = _OpenBlock(self._path(place))
            except FileNotFoundError as error:
                raise KeyError(place) from error
            if len(self._open) > _MAX_OPEN:
                self._open.popitem(last=False)
        self._open.move_to_end(number)
        return self._open[number].read(place, True)

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        first = min(entries)
        start = first // BLOCK * BLOCK
        merged = dict(entries)
        for place in self.find(range(start, start + BLOCK), True).made:
            if place not in merged:
                merged[place] = _OpenBlock(self._path(place)).read(place, True)
        self._open.pop(first // BLOCK, None)
        tensors: dict[str, Tensor] = {}
        facts: dict[str, Any] = {}
        for place, entry in sorted(merged.items()):
            tensors |= {f"{place}.{number}": tensor.contiguous() for number, tensor in enumerate(entry.tensors)}
            facts[str(place)] = [entry.made.content, entry.made.settings, entry.size_ids, _checksum(entry.tensors)]
        _write(self._path(first), lambda path: save_file(tensors, path, {"entries": json.dumps(facts)}))

    def _path(self, place: int) -> Path:
        return self._folder / f"{place // BLOCK:06d}.safetensors"

    def __getstate__(self) -> dict[str, Any]:
        return {"_folder": self._folder, "_open": OrderedDict()}


class _OpenBlock:
    """A block's file with its header read.

    Raises:
        FileNotFoundError, DamagedEntryError
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
            self._facts = json.loads(self._file.metadata()["entries"])
        except FileNotFoundError:
            raise
        except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
            raise DamagedEntryError(f"{path} is damaged") from error

    def read(self, place: int, verify: bool) -> Entry:
        """The entry of a place; without `verify` it may have no tensors.

        Raises:
            KeyError, DamagedEntryError
        """
        content, settings, size_ids, checksum = self._facts[str(place)]
        made = Made(content, settings)
        if not verify:
            return Entry(made, tuple(size_ids), ())
        tensors: list[Tensor] = []
        try:
            while (name := f"{place}.{len(tensors)}") in self._file.keys():  # noqa: SIM118
                tensors.append(self._file.get_tensor(name))
        except SafetensorError as error:
            raise DamagedEntryError(f"{self._path} is damaged") from error
        if not tensors or _checksum(tensors) != checksum:
            raise DamagedEntryError(f"{self._path}: entry {place} is damaged")
        return Entry(made, tuple(size_ids), tuple(tensors))


@dataclass(frozen=True)
class Picture:
    """What a .npz beside an image goes by.

    Attributes:
        path: the image's file.
        size_wh_px: the image's.
        bucket_wh_px: that it is cropped to.
        mirrored: whether latents of the mirrored image are needed, too.
        latent_px: pixels a side that one latent stands for.
    """

    path: Path
    size_wh_px: tuple[int, int]
    bucket_wh_px: tuple[int, int]
    mirrored: bool = False
    latent_px: int = 8

    @property
    def candidates(self) -> list[Path]:
        """Where its .npz may be; the first is where it is written, the last as sd-scripts named them once."""
        width, height = self.size_wh_px
        stem = self.path.with_suffix("")
        return [stem.with_name(f"{stem.name}_{width:04d}x{height:04d}{_ENDING}"), stem.with_name(f"{stem.name}.npz")]


class NpzShelf:
    """Beside every image a file with one sample of its latents, as sd-scripts trains on, and with their moments.

    A file that another program made has latents alone: they are the mean, and the standard deviation is 0.
    """

    def __init__(self, picture: Callable[[int], Picture]) -> None:
        """
        Args:
            picture: from a place to what it goes by.
        """
        self._picture = picture

    def find(self, places: Sequence[int], verify: bool) -> Found:
        """As Shelf."""
        found = Found()
        for place in places:
            try:
                found.made[place] = self.read(place).made
            except KeyError:
                continue
            except DamagedEntryError as error:
                found.damaged.append(str(error))
        return found

    def read(self, place: int) -> Entry:
        """As Shelf."""
        picture = self._picture(place)
        path = next((path for path in picture.candidates if path.is_file()), None)
        if path is None:
            raise KeyError(place)
        try:
            with np.load(path, allow_pickle=False) as file:
                return _from_npz(file, picture)
        except KeyError:
            raise
        except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
            raise DamagedEntryError(f"{path} is damaged") from error

    def write(self, entries: Mapping[int, Entry]) -> None:
        """As Shelf."""
        for place, entry in entries.items():
            arrays = _to_npz(entry)

            def save(path: Path, arrays: dict[str, np.ndarray] = arrays) -> None:
                with path.open("wb") as file:  # given a path, numpy would add an ending of its own
                    np.savez(file, **arrays)  # type: ignore[arg-type]

            _write(self._picture(place).candidates[0], save)


def _to_npz(entry: Entry) -> dict[str, np.ndarray]:
    """One sample in sd-scripts' keys, whose noise is a function of what was encoded, and the moments in ours."""
    (height, width, top, left, bucket_h, bucket_w), _ = entry.variant(False)
    mean, std = (_array(tensor) for tensor in entry.tensors[:2])
    key = int(digest[:16], 16) if (digest := entry.made.content) else 0
    noise = generator(key, Stream.VAE).standard_normal(mean.shape, dtype=np.float32)
    arrays = {
        "latents": mean.astype(np.float32) + std.astype(np.float32) * noise,
        "original_size": np.array([width, height]),
        "crop_ltrb": np.array([left, top, left + bucket_w, top + bucket_h]),
        _FACTS: np.array(json.dumps([entry.made.content, entry.made.settings, entry.size_ids])),
        f"{_FACTS}_0": mean,
        f"{_FACTS}_1": std,
    }
    if len(entry.tensors) == 4:
        mean, std = (_array(tensor) for tensor in entry.tensors[2:])
        arrays["latents_flipped"] = mean.astype(np.float32) + std.astype(np.float32) * noise[..., ::-1]
        arrays |= {f"{_FACTS}_2": mean, f"{_FACTS}_3": std}
    return arrays


def _from_npz(file: Any, picture: Picture) -> Entry:
    """An entry of this project, or of another program's latents of the picture's size.

    Raises:
        KeyError: it holds no latents of that size, or none of the mirrored image where they are needed.
    """
    if _FACTS in file:
        content, settings, size_ids = json.loads(str(file[_FACTS]))
        tensors: list[Tensor] = []
        while (name := f"{_FACTS}_{len(tensors)}") in file:
            tensors.append(torch.from_numpy(file[name]))
        return Entry(Made(content, settings), tuple(size_ids), tuple(tensors))
    bucket_w, bucket_h = picture.bucket_wh_px
    rows, columns = bucket_h // picture.latent_px, bucket_w // picture.latent_px
    for suffix in (f"_{rows}x{columns}", ""):
        if f"latents{suffix}" in file and file[f"latents{suffix}"].shape[-2:] == (rows, columns):
            break
    else:
        raise KeyError("latents")
    width, height = (int(side) for side in file[f"original_size{suffix}"])
    left, top = (int(side) for side in file[f"crop_ltrb{suffix}"][:2])
    size_ids = (height, width, top, left, bucket_h, bucket_w)
    names = ("latents", "latents_flipped") if picture.mirrored else ("latents",)
    means = [torch.from_numpy(file[f"{name}{suffix}"]).float() for name in names]
    moments = tuple(part for mean in means for part in (mean, torch.zeros_like(mean)))
    # Their crop is at the centre: the same from either side, to a pixel.
    return Entry(Made("", ""), size_ids * len(names), moments)


def _array(tensor: Tensor) -> np.ndarray:
    """The same numbers in a dtype that numpy has."""
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()


def _checksum(tensors: Sequence[Tensor]) -> int:
    total = 0
    for tensor in tensors:
        total = zlib.crc32(tensor.contiguous().flatten().view(torch.uint8).numpy().data, total)
    return total


def _write(path: Path, write: Callable[[Path], object]) -> None:
    """Several processes, of several runs, may write one file at once: the last whole one stays."""
    write_file(path, write, writer=f"{platform.node()}.{os.getpid()}")
