"""Tensors out of weight files: safetensors, pickles that run no code, shards with an index."""

import json
import re
import zipfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor

from library import device
from library.errors import InputError
from library.file_kind import weight_form

Value = TypeVar("Value")

# The names that diffusers (first) and transformers (the others) give to the weights of one component.
_STEMS = ("diffusion_pytorch_model", "model", "pytorch_model")
_VARIANTS = ("", "fp16", "bf16")  # full precision wins; a variant is taken where nothing else is there
_SHARD = re.compile(r"-\d{5}-of-\d{5}")
# Tensors of one pickle may share memory (tied weights); more bytes than this many files of its size is no model.
_SHARED_AT_MOST = 4


def read_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """All tensors of one file by name, on the CPU and backed by the file where it can be mapped, and its metadata.

    The file's content tells whether it is read as safetensors or as a pickle of torch, by torch's reader for weights:
    nothing in the file is executed. Names are as the networks had them before torch.compile and wrappers.

    Raises:
        InputError: no such file, damaged, cut off, a pickle that would run code, no tensors in it, or no file of
            weights at all.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    read = _read_safetensors if weight_form(path) == "safetensors" else _read_pickle
    tensors, metadata = read(path)
    if not tensors:
        raise InputError(f"{path}: holds no tensors. Give a model's weights (.safetensors, .ckpt, .pt, .bin).")
    return plain_names(tensors, str(path)), metadata


def plain_names(tensors: Mapping[str, Value], origin: str) -> dict[str, Value]:
    """Tensors by their names without what wrappers put into them: torch.compile `_orig_mod.`, DDP `module.` before all.

    Raises:
        InputError: two names become one.
    """
    wrapped = bool(tensors) and all(name.startswith("module.") for name in tensors)
    plain: dict[str, Value] = {}
    for name, tensor in tensors.items():
        short = (name.removeprefix("module.") if wrapped else name).replace("_orig_mod.", "")
        if short in plain:
            raise InputError(f"{origin}: it has {short} twice, with and without _orig_mod. in its name.")
        plain[short] = tensor
    return plain


def read_names(path: Path) -> Mapping[str, object]:
    """The names of one file's tensors, of a safetensors file without reading any of them.

    Raises:
        InputError: as `read_weights`.
    """
    if not path.is_file():
        raise InputError(f"{path}: no such file.")
    if weight_form(path) != "safetensors":
        return read_weights(path)[0]
    from safetensors import safe_open

    _check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return plain_names(dict.fromkeys(file.keys()), str(path))
    except Exception as error:  # as in _read_safetensors
        raise InputError(
            f"{path}: damaged or cut off ({_reason(error)}; {path.stat().st_size} bytes). Copy or download it again."
        ) from error


def read_component(folder: Path) -> dict[str, Tensor]:
    """The tensors of one component's folder (`unet`, `vae`, ...), whichever way its weights are stored.

    Raises:
        InputError: there are no weights, a shard is missing, or a file cannot be read.
    """
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    chosen = choose_weights(names)
    if chosen is None:
        raise InputError(
            f"{folder}: no weights there. Looked for {_STEMS[0]} or {_STEMS[1]} as .safetensors, .bin or shards with "
            "an index. Complete the folder (an interrupted download?) or give another model."
        )
    if not chosen.endswith(".json"):
        return read_weights(folder / chosen)[0]
    index = read_json(folder / chosen)
    tensors: dict[str, Tensor] = {}
    for name in _shards(index, folder / chosen):
        if not (folder / name).is_file():
            raise InputError(f"{folder / chosen}: the shard {name} that it lists is missing. Complete the folder.")
        tensors.update(read_weights(folder / name)[0])
    return tensors


def _shards(index: dict, path: Path) -> list[str]:
    """The files that an index lists, all of them beside it."""
    listed = index.get("weight_map")
    names = list(listed.values()) if isinstance(listed, dict) else []
    if not names or not all(isinstance(name, str) and name == Path(name).name for name in names):
        raise InputError(f"{path}: its weight_map is no list of files beside it. Copy or download it again.")
    return sorted(set(names))


def choose_weights(names: Collection[str]) -> str | None:
    """Which of a component's files to read: a weight file or a shards' index; None where there is none."""
    for variant in _VARIANTS:
        dotted = f".{variant}" if variant else ""
        for ending in ("safetensors", "bin"):
            for stem in _STEMS:
                for name in (
                    f"{stem}{dotted}.{ending}",
                    f"{stem}.{ending}.index{dotted}.json",
                    f"{stem}{dotted}.{ending}.index.json",
                ):
                    if name in names:
                        return name
    return None


def files_of(chosen: str, names: Collection[str]) -> list[str]:
    """What has to be there to read `chosen`: itself, and with an index its shards."""
    if not chosen.endswith(".json"):
        return [chosen]
    ending = "safetensors" if ".safetensors." in chosen else "bin"
    variant = next((variant for variant in _VARIANTS if variant and f".{variant}." in chosen), "")
    shards = [
        name
        for name in names
        if _SHARD.search(name)
        and name.endswith(ending)
        and next((other for other in _VARIANTS if other and f".{other}" in name), "") == variant
    ]
    return [chosen, *sorted(shards)]


def read_json(path: Path) -> dict:
    """A JSON object from a file.

    Raises:
        InputError: no such file, or not a JSON object.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError as error:
        raise InputError(f"{path}: no such file. The model folder is incomplete.") from error
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: cannot be read as JSON ({error}).") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: holds no JSON object.")
    return content


def _check_readable(path: Path) -> None:
    """Raise InputError where the file system refuses: safetensors says then that there is no such file."""
    try:
        path.open("rb").close()
    except OSError as error:
        raise InputError(f"{path}: cannot be read ({error.strerror}).") from error


def _read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    from safetensors import safe_open

    _check_readable(path)
    try:
        with safe_open(path, framework="pt", device="cpu") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, dict(file.metadata() or {})  # noqa: SIM118
    except Exception as error:  # a header may lie in any way, and the reader has an exception for each
        raise InputError(
            f"{path}: damaged or cut off ({_reason(error)}; {path.stat().st_size} bytes). Copy or download it again."
        ) from error


def _read_pickle(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    try:
        mapped = _is_plain_archive(path)
        if path.suffix == ".safetensors":  # torch would go by the name; an open file has none, and is not mapped
            with path.open("rb") as file:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
        else:
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except InputError:
        raise
    except Exception as error:  # damaged pickles end in every kind of error
        forbidden = re.search(r"GLOBAL ([\w.]+)", str(error))
        if forbidden:
            raise InputError(
                f"{path}: refused. Reading this pickle would run {forbidden.group(1)}, and a weight file has no need "
                "to. Get the model as .safetensors from a source you trust."
            ) from None
        # torch's own words are left out: they advise to read the file without weights_only, which executes it.
        raise InputError(
            f"{path}: damaged, cut off, or no file of weights ({type(error).__name__} when reading it; "
            f"{path.stat().st_size} bytes). Copy or download it again, or get the model as .safetensors."
        ) from None
    metadata = loaded.get("metadata") if isinstance(loaded, dict) else None
    for _ in range(2):  # a checkpoint of Lightning in one of ours; not `while`: a pickle may hold itself
        if isinstance(loaded, dict) and "state_dict" in loaded:
            loaded = loaded["state_dict"]
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: holds a {type(loaded).__name__}, not tensors by name.")
    tensors = {str(name): value for name, value in loaded.items() if isinstance(value, Tensor)}
    _check_sizes(tensors, path)
    metadata = metadata if isinstance(metadata, dict) else {}
    return tensors, {str(key): value for key, value in metadata.items() if isinstance(value, str)}


def _is_plain_archive(path: Path) -> bool:
    """True for the zip archive that torch writes, False for its older form.

    Raises:
        InputError: a zip archive of another kind: packed, so that a small file could fill the memory, or lying.
    """
    if not zipfile.is_zipfile(path):
        return False
    with zipfile.ZipFile(path) as archive:
        entries = archive.infolist()
    size = path.stat().st_size
    packed = [entry.filename for entry in entries if entry.compress_type != zipfile.ZIP_STORED]
    if packed or sum(entry.file_size for entry in entries) > size:
        what = f"{packed[0]} is compressed" if packed else f"its parts are larger than its {size} bytes"
        raise InputError(f"{path}: refused: {what}, which torch never writes. Get the model as .safetensors.")
    return True


def _check_sizes(tensors: Mapping[str, Tensor], path: Path) -> None:
    """Refuse tensors that are not plain numbers in the file: a few bytes can stand for a tensor of any size."""
    size = path.stat().st_size
    total = 0
    for name, tensor in tensors.items():
        if tensor.layout != torch.strided or tensor.is_quantized or not device.is_cpu(tensor.device):
            raise InputError(
                f"{path}: {name} is no plain tensor ({tensor.layout}, {tensor.device}). Save the model as .safetensors."
            )
        total += tensor.numel() * tensor.element_size()
    if total > _SHARED_AT_MOST * size:
        raise InputError(
            f"{path}: damaged, or made to fill the memory: its tensors take {total} bytes, the file has {size}. "
            "Get the model as .safetensors from a source you trust."
        )


def _reason(error: Exception) -> str:
    """The first line of an error's text, or its kind."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
