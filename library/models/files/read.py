"""A model out of a diffusers folder, a single file in Stability's keys, or a hub name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError
from library.hub import is_hub_name
from library.imports import import_pruned
from library.models.family import EncoderSpec, Family
from library.models.files import hub, infer_configs, single_file
from library.models.files import identify as model_kind
from library.models.files.build import build
from library.models.files.diffusers_config import unet_config_from_diffusers
from library.models.files.weight_files import read_component, read_json, read_weights
from library.models.model import Model
from library.models.unet import UNet, UNetConfig

MODEL_FLAG = "--pretrained_model_name_or_path"
# Where the classes are that are taken from diffusers and transformers.
_VAE = "diffusers.models.autoencoders.autoencoder_kl"
_ENCODERS = "transformers.models.clip.modeling_clip"
_TOKENIZERS = "transformers.models.clip.tokenization_clip"


def load_model(
    source: str,
    family: Family,
    *,
    vae: str | None = None,
    tokenizers: Sequence[str | None] = (),
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Read all parts of a model to the CPU, in evaluation mode; the VAE is frozen.

    Args:
        source: a diffusers folder, a single file (.safetensors, .ckpt), or a hub name.
        vae: another VAE in place of the model's: folder, single file or hub name.
        tokenizers: for each text encoder a folder or hub name; None or left out: that of a diffusers folder, or the
            one that the family was trained with.
        dtype: of all networks.

    Raises:
        InputError: something is not there, not readable, or no model of the family.
    """
    path = locate(source, MODEL_FLAG, hub.pipeline_files)
    import_pruned(_VAE, _ENCODERS, _TOKENIZERS)
    given = [*tokenizers, *[None] * (len(family.encoders) - len(tokenizers))]
    model = (
        _from_folder(path, family, dtype, vae, given)
        if path.is_dir()
        else _from_single_file(path, family, dtype, vae, given)
    )
    for place, (tokenizer, encoder) in enumerate(zip(model.tokenizers, model.text_encoders, strict=True)):
        if len(tokenizer) > encoder.config.vocab_size:
            raise InputError(
                f"{_tokenizer_flag(place)}: this tokenizer has {len(tokenizer)} tokens, the text encoder in {source} "
                f"only {encoder.config.vocab_size}. Give the tokenizer that belongs to the model."
            )
    model.vae.requires_grad_(False)
    return model


def load_tokenizers(source: str, family: Family, tokenizers: Sequence[str | None] = ()) -> tuple[Any, ...]:
    """The tokenizers as `load_model` gives them, without anything else of the model.

    Raises:
        InputError: they cannot be found or read.
    """
    import_pruned(_TOKENIZERS)
    given = [*tokenizers, *[None] * (len(family.encoders) - len(tokenizers))]
    own: Path | None = None
    if None in given:
        path = locate(source, MODEL_FLAG, hub.pipeline_tokenizer_files)
        own = path if path.is_dir() else None
    return _tokenizers(family, given, own)


def _tokenizers(family: Family, given: Sequence[str | None], folder: Path | None) -> tuple[Any, ...]:
    """A tokenizer for each text encoder.

    Args:
        folder: a diffusers folder that has its own.
    """
    return tuple(
        _tokenizer(spec, _tokenizer_flag(place), source, folder and folder / spec.tokenizer_folder)
        for place, (spec, source) in enumerate(zip(family.encoders, given, strict=True))
    )


def _tokenizer_flag(place: int) -> str:
    return f"--tokenizer{place + 1}_path"


def locate(source: str, flag: str, choose: Callable[[Iterable[str]], list[str]]) -> Path:
    """A path as it is, or a hub name's folder in the cache.

    Raises:
        InputError: neither.
    """
    path = Path(source).expanduser()
    if path.exists():
        return path
    if is_hub_name(source):
        return hub.snapshot(source, flag, choose)
    raise InputError(f"{flag} {source}: no such file or folder, and not spelt as a hub name (owner/name).")


def load_vae(source: str, dtype: torch.dtype) -> Any:
    """A VAE (AutoencoderKL) alone: a folder (its own or a pipeline's), a single file in either naming, or a hub name.

    Raises:
        InputError: it cannot be found, read, or is no VAE.
    """
    path = locate(source, "--vae", hub.vae_files)
    import_pruned(_VAE)
    if path.is_dir():
        return _vae_from_folder(path / "vae" if (path / "vae" / "config.json").is_file() else path, dtype)
    tensors, metadata = read_weights(path)
    kind = model_kind.describe(tensors)
    renamed = _inferred(lambda: single_file.vae_tensors(tensors), str(path), "VAE", kind)
    return _vae_from_tensors(renamed, metadata, dtype, str(path), kind)


def _from_folder(
    folder: Path, family: Family, dtype: torch.dtype, vae: str | None, tokenizers: Sequence[str | None]
) -> Model:
    _check_pipeline(folder)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    return Model(
        family,
        unet=_unet_from_folder(folder / "unet", dtype),
        vae=load_vae(vae, dtype) if vae else _vae_from_folder(folder / "vae", dtype),
        text_encoders=tuple(_encoder_from_folder(folder / spec.folder, spec, dtype) for spec in family.encoders),
        tokenizers=_tokenizers(family, tokenizers, folder),
        scheduler_config=read_json(scheduler_file) if scheduler_file.is_file() else dict(family.scheduler),
    )


def _check_pipeline(folder: Path) -> None:
    """Say early what a folder is when it is no SDXL pipeline."""
    if not (folder / "unet" / "config.json").is_file():
        singles = sorted(entry.name for entry in folder.iterdir() if entry.suffix in (".safetensors", ".ckpt"))
        hint = f" There are single files in it; give one of them: {', '.join(singles[:3])}." if singles else ""
        raise InputError(f"{folder}: no diffusers model: it has no unet/config.json.{hint}")
    if not (folder / "text_encoder_2" / "config.json").is_file():
        index = folder / "model_index.json"
        kind = read_json(index).get("_class_name", "unknown") if index.is_file() else "unknown"
        raise InputError(
            f"{folder}: no SDXL model: it has no text_encoder_2/config.json (its pipeline is {kind}). "
            "Give an SDXL base model."
        )


def _unet_from_folder(folder: Path, dtype: torch.dtype) -> UNet:
    config = unet_config_from_diffusers(read_json(folder / "config.json"), str(folder / "config.json"))
    return _build_unet(config, single_file.unet_from_diffusers(config, read_component(folder)), dtype, str(folder))


def _build_unet(config: UNetConfig, tensors: Mapping[str, Tensor], dtype: torch.dtype, origin: str) -> UNet:
    return build(lambda: UNet(config), tensors, dtype, origin, model_kind.SDXL_BASE)


def _vae_from_folder(folder: Path, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise InputError(f"{folder}: holds {config['_class_name']}, not AutoencoderKL. Give SDXL's VAE.")
    tensors = read_component(folder)
    names = single_file.vae_tensors(tensors)
    network: Any = AutoencoderKL
    return build(lambda: network.from_config(config), names, dtype, str(folder), model_kind.describe(tensors))


def _vae_from_tensors(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype, origin: str, kind: str
) -> Any:
    """A VAE from diffusers' names."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    factor = single_file.scaling_factor(metadata, origin)
    config = _inferred(lambda: infer_configs.vae_config(tensors, factor), origin, "VAE", kind)
    network: Any = AutoencoderKL
    return build(lambda: network(**config), tensors, dtype, origin, kind)


def _encoder_from_folder(folder: Path, spec: EncoderSpec, dtype: torch.dtype) -> Any:
    tensors = single_file.encoder_from_disk(spec, read_component(folder))
    return _build_encoder(read_json(folder / "config.json"), spec, tensors, dtype, str(folder), "a text encoder")


def _build_encoder(
    config: dict[str, Any], spec: EncoderSpec, tensors: dict[str, Tensor], dtype: torch.dtype, origin: str, kind: str
) -> Any:
    """CLIPTextModel or CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection if spec.projection else CLIPTextModel
    return build(lambda: network(CLIPTextConfig.from_dict(config)), tensors, dtype, origin, kind)


def _from_single_file(
    path: Path, family: Family, dtype: torch.dtype, vae: str | None, tokenizers: Sequence[str | None]
) -> Model:
    tensors, metadata = read_weights(path)
    origin, kind = str(path), model_kind.describe(tensors)
    parts = single_file.split(tensors, family, origin, kind, with_vae=vae is None)
    unet_config = _inferred(lambda: infer_configs.unet_config(parts.unet), origin, "U-Net", kind)
    encoders = []
    for place, (spec, part) in enumerate(zip(family.encoders, parts.text_encoders, strict=True)):
        config = _inferred(
            partial(infer_configs.clip_config, part, hidden_act=spec.hidden_act),
            origin,
            f"text encoder {place + 1}",
            kind,
        )
        encoders.append(_build_encoder(config, spec, part, dtype, origin, kind))
    return Model(
        family,
        unet=_build_unet(unet_config, parts.unet, dtype, origin),
        vae=load_vae(vae, dtype) if vae else _vae_from_tensors(parts.vae, metadata, dtype, origin, kind),
        text_encoders=tuple(encoders),
        tokenizers=_tokenizers(family, tokenizers, None),
        scheduler_config=single_file.scheduler_config(tensors, metadata, family),
    )


def _inferred(infer: Callable[[], Any], origin: str, part: str, kind: str) -> Any:
    """A configuration from shapes; a name that it looks for and does not find is the file's fault."""
    try:
        return infer()
    except (KeyError, StopIteration, IndexError) as error:
        raise InputError(
            f"{origin}: no complete SDXL model: its {part} lacks {error}. It seems to be {kind}. "
            "Give an SDXL base model."
        ) from error
    except (ValueError, TypeError, ArithmeticError) as error:
        raise InputError(
            f"{origin}: no SDXL model: the shapes in its {part} fit none ({error}). It seems to be {kind}. "
            "Give an SDXL base model."
        ) from error


def _tokenizer(spec: EncoderSpec, flag: str, source: str | None, own: Path | None) -> Any:
    """A text encoder's tokenizer: as asked for, else the model's own, else the one that the family was trained with."""
    from transformers import CLIPTokenizer

    if source is None and own is not None:
        path = own
    else:
        path = locate(source or spec.tokenizer, flag, hub.tokenizer_files)
    inside = path / spec.tokenizer_folder
    if inside.is_dir():  # a whole pipeline was given
        path = inside
    if not any((path / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise InputError(f"{flag} {path}: no tokenizer there (tokenizer.json, or vocab.json and merges.txt).")
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag} {path}: the tokenizer cannot be read ({error}).") from error
    if spec.pad_id is not None and path != own and tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spec.pad_id)
    return tokenizer
