"""A model out of a diffusers folder, a single file in Stability's keys, or a hub name."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError
from library.hub import local_path
from library.imports import import_pruned
from library.models.family import EncoderSpec, Family
from library.models.files import hub, infer_configs, kept_configs, single_file
from library.models.files.build import build
from library.models.files.diffusers_config import unet_config_from_diffusers
from library.models.files.fit import check_parts
from library.models.files.identify import describe, family_of_folder, family_of_tensors
from library.models.files.kept_prediction import scheduler_of
from library.models.files.noise_process import check_scheduler
from library.models.files.tokenizers_here import tokenizers_here
from library.models.files.weight_files import read_component, read_json, read_names, read_weights
from library.models.model import Model
from library.models.text_encoders import use_erf_gelu
from library.models.unet import UNet, UNetConfig
from library.options.model_paths import MODEL_FLAG, VAE_FLAG, check_tokenizer_folder

# Where the classes are that are taken from diffusers and transformers.
_VAE = "diffusers.models.autoencoders.autoencoder_kl"
_ENCODERS = "transformers.models.clip.modeling_clip"
_TOKENIZERS = "transformers.models.clip.tokenization_clip"
_OFFERED = 4


def load_model(
    source: str,
    families: Family | Sequence[Family],
    *,
    vae: str | None = None,
    tokenizers: Sequence[str | None] = (),
    dtype: torch.dtype = torch.float32,
) -> Model:
    """Read all parts of a model to the CPU, in evaluation mode; the VAE is frozen.

    Args:
        source: a diffusers folder, a single file (.safetensors, .ckpt), or a hub name.
        families: those that the caller trains; which of them the model is of is told by its content.
        vae: another VAE in place of the model's: folder, single file or hub name.
        tokenizers: for each text encoder a folder or hub name; None or left out: that of a diffusers folder, or the
            one that the family was trained with.
        dtype: of all networks.

    Raises:
        InputError: something is not there, not readable, or no model of the families.
    """
    wanted = [families] if isinstance(families, Family) else families
    path = locate(source, MODEL_FLAG, hub.pipeline_files)
    import_pruned(_VAE, _ENCODERS, _TOKENIZERS)
    read = _from_folder if path.is_dir() else _from_single_file
    model = read(path, wanted, dtype, vae, tokenizers)
    check_parts(model, source, vae)
    for place, (tokenizer, encoder) in enumerate(zip(model.tokenizers, model.text_encoders, strict=True)):
        if len(tokenizer) > encoder.config.vocab_size:
            raise InputError(
                f"{_tokenizer_flag(model.family, place)}: this tokenizer has {len(tokenizer)} tokens, the text encoder "
                f"in {source} only {encoder.config.vocab_size}. Give the tokenizer that belongs to the model."
            )
    model.vae.requires_grad_(False)
    return model


def load_tokenizers(
    source: str, families: Family | Sequence[Family], tokenizers: Sequence[str | None] = ()
) -> tuple[Any, ...]:
    """The tokenizers as `load_model` gives them, without anything else of the model.

    Raises:
        InputError: they cannot be found or read.
    """
    import_pruned(_TOKENIZERS)
    wanted = [families] if isinstance(families, Family) else families
    if len(wanted) == 1 and len(tokenizers) == len(wanted[0].encoders) and None not in tokenizers:
        return _tokenizers(wanted[0], tokenizers, None)
    path = locate(source, MODEL_FLAG, hub.pipeline_tokenizer_files)
    if len(wanted) == 1:  # nothing else of the model need be there
        family = wanted[0]
    elif path.is_dir():
        family = family_of_folder(path, wanted)
    else:
        family = family_of_tensors(read_names(path), wanted, str(path))
    return _tokenizers(family, tokenizers, path)


def _tokenizers(family: Family, given: Sequence[str | None], model: Path | None) -> tuple[Any, ...]:
    """A tokenizer for each text encoder.

    Args:
        given: for each a folder or hub name, None or left out where none was given.
        model: a diffusers folder, which has its own, or a single file; None where nothing of it is needed.

    Raises:
        InputError: one cannot be found or read, or more are given than the family has text encoders.
    """
    encoders = family.encoders
    if any(given[len(encoders) :]):
        raise InputError(
            f"{len(given)} tokenizers are given, and an {family.title} model has {len(encoders)} text encoder"
            f"{'s' if len(encoders) > 1 else ''}; leave out the others"
        )
    given = [*given[: len(encoders)], *[None] * (len(encoders) - len(given))]
    return tuple(
        _tokenizer(spec, _tokenizer_flag(family, place), source, model)
        for place, (spec, source) in enumerate(zip(family.encoders, given, strict=True))
    )


def _tokenizer_flag(family: Family, place: int) -> str:
    return f"--tokenizer{place + 1}_path" if len(family.encoders) > 1 else "--tokenizer_path"


def locate(source: str, flag: str, choose: Callable[[Iterable[str]], list[str]], takes: str = hub.MODEL) -> Path:
    """A path as it is, or a hub name's folder in the cache.

    Args:
        takes: what the flag takes, for messages.

    Raises:
        InputError: neither, or a path whose beginning alone is here.
    """
    return local_path(source, flag) or hub.snapshot(source, flag, choose, takes)


def load_vae(source: str, family: Family, dtype: torch.dtype) -> Any:
    """A VAE (AutoencoderKL) alone: a folder (its own or a pipeline's), a single file in either naming, or a hub name.

    A single file that does not say by what latents are multiplied has the family's factor.

    Raises:
        InputError: it cannot be found, read, or is no VAE.
    """
    path = locate(source, VAE_FLAG, hub.vae_files)
    import_pruned(_VAE)
    if path.is_dir():
        return _vae_from_folder(path / "vae" if (path / "vae" / "config.json").is_file() else path, family, dtype)
    tensors, metadata = read_weights(path)
    file = _File(path, family, metadata, describe(tensors), dtype)
    return _vae_from_tensors(file.infer(lambda: single_file.vae_tensors(tensors), "VAE"), file)


def _from_folder(
    folder: Path, families: Sequence[Family], dtype: torch.dtype, vae: str | None, tokenizers: Sequence[str | None]
) -> Model:
    family = family_of_folder(folder, families)
    scheduler_file = folder / "scheduler" / "scheduler_config.json"
    there = scheduler_file.is_file()
    scheduler = read_json(scheduler_file) if there else dict(family.scheduler)
    check_scheduler(scheduler, str(scheduler_file))
    return Model(
        family,
        unet=_unet_from_folder(folder / "unet", family, dtype),
        vae=load_vae(vae, family, dtype) if vae else _vae_from_folder(folder / "vae", family, dtype),
        text_encoders=tuple(
            _encoder_from_folder(folder / spec.folder, family, spec, dtype) for spec in family.encoders
        ),
        tokenizers=_tokenizers(family, tokenizers, folder),
        scheduler_config=scheduler,
        prediction_source=str(scheduler_file) if "prediction_type" in scheduler and there else "",
        **kept_configs.pipeline_fields(_pipeline_configs(folder, family)),
    )


def _pipeline_configs(folder: Path, family: Family) -> dict[str, Any]:
    """The U-Net's config.json and, where it is of the family's pipeline, model_index.json together."""
    index = read_json(folder / "model_index.json") if (folder / "model_index.json").is_file() else {}
    return {**(index if index.get("_class_name") == family.pipeline else {}), **read_json(folder / "unet/config.json")}


def _unet_from_folder(folder: Path, family: Family, dtype: torch.dtype) -> UNet:
    config = unet_config_from_diffusers(read_json(folder / "config.json"), str(folder / "config.json"))
    tensors = single_file.unet_from_diffusers(config, read_component(folder))
    return build(lambda: UNet(config), tensors, dtype, str(folder), f"an {family.title} model", family.title)


def _vae_from_folder(folder: Path, family: Family, dtype: torch.dtype) -> Any:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    config = read_json(folder / "config.json")
    if config.get("_class_name", "AutoencoderKL") != "AutoencoderKL":
        raise InputError(f"{folder}: holds {config['_class_name']}, not AutoencoderKL. Give an {family.title} VAE.")
    tensors = read_component(folder)
    names = single_file.vae_tensors(tensors)
    network: Any = AutoencoderKL
    return build(lambda: network.from_config(config), names, dtype, str(folder), describe(tensors), family.title)


def _encoder_from_folder(folder: Path, family: Family, spec: EncoderSpec, dtype: torch.dtype) -> Any:
    tensors = single_file.encoder_from_disk(spec, read_component(folder), str(folder))
    config = read_json(folder / "config.json")
    if isinstance(config.get("text_config"), dict):  # all of CLIP, of which the text encoder is a part
        config = config["text_config"]
    kind = config.get("model_type", "clip_text_model")
    if kind != "clip_text_model":
        raise InputError(
            f"{folder / 'config.json'}: its model_type is {str(kind)[:80]!r}, not a CLIP text encoder. Give an "
            f"{family.title} base model."
        )
    return _build_encoder(config, spec, tensors, dtype, str(folder), "a text encoder", family.title)


def _build_encoder(
    config: dict[str, Any],
    spec: EncoderSpec,
    tensors: dict[str, Tensor],
    dtype: torch.dtype,
    origin: str,
    kind: str,
    wanted: str,
) -> Any:
    """CLIPTextModel or CLIPTextModelWithProjection."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    network = CLIPTextModelWithProjection if spec.projection else CLIPTextModel
    encoder = build(lambda: network(CLIPTextConfig.from_dict(config)), tensors, dtype, origin, kind, wanted)
    use_erf_gelu(encoder)
    return encoder


@dataclass(frozen=True)
class _File:
    """A single file that is being read: where it is, what it says of itself, and how its networks are built.

    Attributes:
        kind: what it seems to hold, for messages.
    """

    path: Path
    family: Family
    metadata: Mapping[str, str]
    kind: str
    dtype: torch.dtype

    def infer(self, compute: Callable[[], Any], part: str) -> Any:
        """What is computed from a part's tensors; a name that is looked for and not found is the file's fault."""
        title = self.family.title
        try:
            return compute()
        except InputError:
            raise
        except (KeyError, StopIteration, IndexError) as error:
            raise InputError(
                f"{self.path}: no complete {title} model: its {part} lacks {error}. It seems to be {self.kind}. "
                f"Give an {title} base model."
            ) from error
        except (ValueError, TypeError, ArithmeticError) as error:
            raise InputError(
                f"{self.path}: no {title} model: the shapes in its {part} fit none ({error}). It seems to be "
                f"{self.kind}. Give an {title} base model."
            ) from error

    def build(self, construct: Callable[[], Any], tensors: Mapping[str, Tensor]) -> Any:
        """A network with these tensors."""
        return build(construct, tensors, self.dtype, str(self.path), self.kind, self.family.title)


def _from_single_file(
    path: Path, families: Sequence[Family], dtype: torch.dtype, vae: str | None, tokenizers: Sequence[str | None]
) -> Model:
    tensors, metadata = read_weights(path)
    family = family_of_tensors(tensors, families, str(path))
    scheduler, prediction_source = scheduler_of(tensors, metadata, family, str(path))
    file = _File(path, family, metadata, describe(tensors), dtype)
    factor = single_file.scaling_factor(metadata, family, str(path))
    single_file.check_scale_factor(tensors, factor, str(path))
    parts = single_file.split(tensors, family, str(path), file.kind, with_vae=vae is None)
    return Model(
        family,
        unet=_unet_from_tensors(parts.unet, file),
        vae=load_vae(vae, family, dtype) if vae else _vae_from_tensors(parts.vae, file),
        text_encoders=tuple(_encoder_from_tensors(part, place, file) for place, part in enumerate(parts.text_encoders)),
        tokenizers=_tokenizers(family, tokenizers, path),
        scheduler_config=scheduler,
        prediction_source=prediction_source,
        carried={name: tensor.clone() for name, tensor in parts.carried.items()},
        **kept_configs.pipeline_fields(kept_configs.pipeline_metadata(metadata, str(path))),
    )


def _unet_from_tensors(tensors: Mapping[str, Tensor], file: _File) -> UNet:
    def config() -> UNetConfig:
        sizes = infer_configs.unet_sizes(tensors)
        return UNetConfig(**sizes, **kept_configs.unet_fields(sizes, file.metadata, file.family, str(file.path)))

    found = file.infer(config, "U-Net")
    return file.build(lambda: UNet(found), tensors)


def _vae_from_tensors(tensors: Mapping[str, Tensor], file: _File) -> Any:
    """A VAE from diffusers' names."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    factor = single_file.scaling_factor(file.metadata, file.family, str(file.path))

    def config() -> dict[str, Any]:
        sizes = infer_configs.vae_config(tensors, factor, file.family.default_px["epsilon"])
        return {**sizes, **kept_configs.vae_fields(sizes["block_out_channels"], file.metadata, str(file.path))}

    found = file.infer(config, "VAE")
    network: Any = AutoencoderKL
    return file.build(lambda: network(**found), tensors)


def _encoder_from_tensors(tensors: dict[str, Tensor], place: int, file: _File) -> Any:
    spec, origin = file.family.encoders[place], str(file.path)

    def config() -> dict[str, Any]:
        sizes = infer_configs.clip_config(tensors, hidden_act=spec.hidden_act)
        return {**sizes, **kept_configs.encoder_fields(sizes["hidden_size"], spec, place, file.metadata, origin)}

    found = file.infer(config, f"text encoder {place + 1}")
    return _build_encoder(found, spec, tensors, file.dtype, origin, file.kind, file.family.title)


def _tokenizer(spec: EncoderSpec, flag: str, source: str | None, model: Path | None) -> Any:
    """A text encoder's tokenizer: as asked for, else the model's own, else the one that the family was trained with."""
    from transformers import CLIPTokenizer

    own = model / spec.tokenizer_folder if model is not None and model.is_dir() else None
    if source is not None:
        path = locate(source, flag, hub.tokenizer_files, hub.TOKENIZER)
    else:
        path = own or _usual_tokenizer(spec, flag, model)
    inside = path / spec.tokenizer_folder
    if inside.is_dir():  # a whole pipeline was given
        path = inside
    try:
        check_tokenizer_folder(path)
    except InputError as error:
        raise InputError(f"{flag} {error}") from error
    try:
        tokenizer = CLIPTokenizer.from_pretrained(str(path), local_files_only=True)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise InputError(f"{flag} {path}: the tokenizer cannot be read ({error}).") from error
    if spec.pad_id is not None and path != own and tokenizer.pad_token_id == tokenizer.eos_token_id:
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(spec.pad_id)
    return tokenizer


def _usual_tokenizer(spec: EncoderSpec, flag: str, model: Path | None) -> Path:
    """The folder of the tokenizer that the family was trained with: one of its name here, or out of the hub's cache.

    Raises:
        InputError: there is none, and it cannot be fetched; tokenizers that are on this machine are offered.
    """
    here = Path(spec.tokenizer)
    if here.exists():
        return here
    try:
        return hub.snapshot(spec.tokenizer, flag, hub.tokenizer_files, hub.TOKENIZER)
    except InputError as error:
        offers = ", ".join(f"{flag}={path}" for path in tokenizers_here(spec, model)[:_OFFERED])
        said = f" On this machine are: {offers}." if offers else ""
        raise InputError(
            f"{model or spec.tokenizer}: a single file has no tokenizer of its own. {error}{said}"
        ) from error
