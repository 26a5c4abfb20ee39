"""A model to a single file in Stability's keys or to a diffusers folder, complete or not at all."""

import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.atomic_write import write_file, write_folder
from library.disk_space import check_space
from library.errors import InputError
from library.models.files import key_maps, single_file
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.files.modelspec import (
    HASH_KEY,
    HASH_PLACEHOLDER,
    IMPLEMENTATION_DIFFUSERS,
    IMPLEMENTATION_STABILITY,
)
from library.models.files.own_checkpoint import MARK, MARK_VALUE
from library.models.model import UNET, VAE, Model
from library.options.saving import SAVE_FORMS
from library.tensor_file import tensor_file


def save_model(
    model: Model,
    path_without_suffix: str | Path,
    save_as: str | None = None,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write the model; what stands there under the same name is replaced once the new one is complete.

    Args:
        path_without_suffix: the file gets .safetensors or .ckpt added, a folder is named so.
        save_as: "safetensors" (also None), "ckpt", "diffusers" (weights as .bin) or "diffusers_safetensors".
        dtype: of all floating-point tensors in the file; fp32 when None.
        metadata: entries for safetensors' headers, see `modelspec.modelspec`; architecture, prediction type,
            implementation, hash and what the form does not keep otherwise are added.

    Returns:
        The file or folder written.

    Raises:
        InputError: an unknown form, or the file system refuses.
        TrainingError: there is no room for it.
    """
    form = save_as or "safetensors"
    dtype = dtype or torch.float32
    base = Path(path_without_suffix)
    check_space(base.parent, f"the checkpoint {base.name}", saved_bytes(model, dtype))
    entries = {**(metadata or {}), **single_file.remembered(model), MARK: MARK_VALUE}
    if form in ("safetensors", "ckpt"):
        target = base.with_name(f"{base.name}.{form}")
        entries["modelspec.implementation"] = IMPLEMENTATION_STABILITY
        tensors = single_file.join(model)
        if form == "safetensors":
            write_file(target, lambda path: _write_safetensors(tensors, path, dtype, entries))
        else:
            content = {"state_dict": _converted(tensors, dtype), "metadata": entries}
            write_file(target, lambda path: _write_pickle(content, path))
        return target
    if form in ("diffusers", "diffusers_safetensors"):
        entries["modelspec.implementation"] = IMPLEMENTATION_DIFFUSERS
        write_folder(base, lambda path: _write_pipeline(model, path, dtype, entries, form == "diffusers_safetensors"))
        return base
    raise InputError(f"--save_model_as {form}: unknown form; it is one of {', '.join(SAVE_FORMS)}.")


def saved_bytes(model: Model, dtype: torch.dtype | None = None) -> int:
    """How much the model's tensors take in a checkpoint of a precision, fp32 when None."""
    modules = (model.unet, model.vae, *model.text_encoders)
    numbers = sum(one.numel() for module in modules for one in (*module.parameters(), *module.buffers()))
    numbers += sum(tensor.numel() for tensor in model.carried.values())
    return numbers * (dtype or torch.float32).itemsize


def _converted(tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """Contiguous tensors on the CPU, floating-point ones in dtype."""
    return {
        name: tensor.detach().to("cpu", dtype if tensor.is_floating_point() else tensor.dtype).contiguous()
        for name, tensor in tensors.items()
    }


def _write_safetensors(
    tensors: Mapping[str, Tensor], path: Path, dtype: torch.dtype, metadata: Mapping[str, str]
) -> None:
    """One tensor at a time, so that a model on a device, or in another precision, is not in memory once more."""
    start_of_file, content = tensor_file(tensors, {**metadata, HASH_KEY: HASH_PLACEHOLDER}, dtype)
    digest = hashlib.sha256()
    with path.open("wb") as file:
        file.write(start_of_file)
        for piece in content:
            digest.update(piece)
            file.write(piece)
        file.seek(start_of_file.index(HASH_PLACEHOLDER.encode()))
        file.write(f"0x{digest.hexdigest()}".encode())


def _write_pickle(content: Mapping[str, Any], path: Path) -> None:
    try:
        torch.save(content, path)
    except RuntimeError as error:  # torch's writer raises this when the disk is full
        raise OSError(str(error)) from error


def _write_pipeline(
    model: Model, folder: Path, dtype: torch.dtype, metadata: Mapping[str, str], as_safetensors: bool
) -> None:
    """Everything that the `from_pretrained` of diffusers' pipeline reads, into an empty folder."""
    version = importlib.metadata.version("diffusers")
    scheduler = {"_diffusers_version": version, **model.scheduler_config}
    components: dict[str, tuple[Any, dict[str, Tensor]]] = {
        UNET: (model.unet, key_maps.rename(model.weights(UNET), key_maps.unet_to_diffusers(model.unet.config))),
        VAE: (model.vae, model.weights(VAE)),
        **{
            spec.folder: (encoder, single_file.encoder_to_disk(model.weights(spec.folder)))
            for spec, encoder in zip(model.family.encoders, model.text_encoders, strict=True)
        },
    }
    for name, (network, tensors) in components.items():
        target = folder / name
        target.mkdir()
        _write_config(name, network, target, dtype, version, model.sample_size or model.default_sample_size)
        of_transformers = name.startswith("text_encoder")
        if as_safetensors:
            file = "model.safetensors" if of_transformers else "diffusion_pytorch_model.safetensors"
            _write_safetensors(tensors, target / file, dtype, metadata)
        else:
            file = "pytorch_model.bin" if of_transformers else "diffusion_pytorch_model.bin"
            _write_pickle(_converted(tensors, dtype), target / file)
    for spec, tokenizer in zip(model.family.encoders, model.tokenizers, strict=True):
        _write_tokenizer(tokenizer, folder / spec.tokenizer_folder)
    (folder / "scheduler").mkdir()
    _write_json(scheduler, folder / "scheduler" / "scheduler_config.json")
    _write_json(_model_index(model, scheduler["_class_name"], version), folder / "model_index.json")


def _write_config(
    name: str, network: Any, folder: Path, dtype: torch.dtype, version: str, sample_size: int | list[int]
) -> None:
    if name == UNET:
        fields = unet_config_to_diffusers(network.config, sample_size)
        config = {"_diffusers_version": version, **fields}
        _write_json(config, folder / "config.json")
    elif name == VAE:
        network.save_config(folder)
    else:
        config = {**network.config.to_diff_dict(), "architectures": [type(network).__name__]}
        config.pop("torch_dtype", None)
        _write_json({**config, "dtype": str(dtype).removeprefix("torch.")}, folder / "config.json")


def _write_tokenizer(tokenizer: Any, folder: Path) -> None:
    """tokenizer.json, and vocab.json with merges.txt for readers that do not know it."""
    folder.mkdir()
    tokenizer.save_pretrained(folder)
    model = getattr(getattr(tokenizer, "backend_tokenizer", None), "model", None)
    if model is not None:
        model.save(str(folder))


def _model_index(model: Model, scheduler_class: str, version: str) -> dict[str, Any]:
    """What diffusers reads first: the pipeline's class, and the class of each part."""
    encoders = {}
    for spec, encoder in zip(model.family.encoders, model.text_encoders, strict=True):
        encoders[spec.folder] = ["transformers", type(encoder).__name__]
        encoders[spec.tokenizer_folder] = ["transformers", "CLIPTokenizer"]
    return {
        "_class_name": model.family.pipeline,
        "_diffusers_version": version,
        **model.family.pipeline_settings,
        **model.pipeline_settings,
        "scheduler": ["diffusers", scheduler_class],
        **encoders,
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }


def _write_json(content: Mapping[str, Any], path: Path) -> None:
    path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")
