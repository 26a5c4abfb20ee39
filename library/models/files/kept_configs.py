"""What the tensors of a single file do not tell about a model's networks, and how it is known all the same.

Attention heads, activations, norm groups and special token ids leave no trace in shapes. A published model has its
family's; of others a single file written here says them in its metadata, and any other file is refused: taking the
usual values would give a model that computes something else, without a word.
"""

import json
from collections.abc import Mapping
from typing import Any

from library.errors import InputError
from library.models.family import EncoderSpec, Family
from library.models.files.infer_configs import HEAD_CHANNELS, VAE_NORM_GROUPS
from library.models.model import Model

UNET_KEY = "sd_training.unet"
VAE_KEY = "sd_training.vae"
ENCODERS_KEY = "sd_training.text_encoders"
PIPELINE_KEY = "sd_training.pipeline"  # not needed to read a file: what a diffusers folder made of it would lack
PIPELINE_SETTINGS = ("force_zeros_for_empty_prompt",)  # of model_index.json; others are about parts that are not kept

# Fields of UNetConfig, AutoencoderKL's and CLIPTextConfig's configuration, with the type of each.
_UNET_FIELDS: dict[str, tuple[type, ...]] = {
    "num_heads": (int, type(None)),
    "num_head_channels": (int,),
    "upcast_attention": (bool,),
}
_VAE_FIELDS: dict[str, tuple[type, ...]] = {
    "norm_num_groups": (int,),
    "force_upcast": (bool,),
    # By what latents are shifted and divided besides the scaling factor; no published VAE of Stable Diffusion has them.
    "shift_factor": (float, int, type(None)),
    "latents_mean": (list, type(None)),
    "latents_std": (list, type(None)),
}
_ENCODER_FIELDS: dict[str, tuple[type, ...]] = {
    "num_attention_heads": (int,),
    "hidden_act": (str,),
    "layer_norm_eps": (float,),
    "bos_token_id": (int, type(None)),
    "eos_token_id": (int, type(None)),
    "pad_token_id": (int, type(None)),
}
_COUNTS = ("num_heads", "num_head_channels", "norm_num_groups", "num_attention_heads")
_VAE_CHANNELS = (128, 256, 512, 512)  # of every published VAE of Stable Diffusion
_VAE_UNSHIFTED: dict[str, Any] = dict.fromkeys(("shift_factor", "latents_mean", "latents_std"))
_VAE_USUAL = {
    "norm_num_groups": VAE_NORM_GROUPS,
    "force_upcast": True,  # diffusers' default
    **_VAE_UNSHIFTED,
}


def metadata_of(model: Model) -> dict[str, str]:
    """The metadata without which a single file of the model would not be read, or not as what it is."""
    entries: dict[str, Any] = {}
    config, published = model.unet.config, model.family.unet
    fields = {name: getattr(config, name) for name in _UNET_FIELDS}
    if fields != {name: getattr(published, name) for name in _UNET_FIELDS} or not _is_published_unet(
        vars(config), model.family
    ):
        entries[UNET_KEY] = fields
    vae = {name: getattr(model.vae.config, name, None) for name in _VAE_FIELDS}
    vae |= {name: list(value) for name, value in vae.items() if isinstance(value, tuple)}
    if vae != _VAE_USUAL or tuple(model.vae.config.block_out_channels) != _VAE_CHANNELS:
        entries[VAE_KEY] = {name: value for name, value in vae.items() if value is not None}
    encoders = [
        {name: getattr(encoder.config, name) for name in _ENCODER_FIELDS}
        if _differs(encoder.config, spec) or encoder.config.hidden_size != spec.width
        else {}
        for spec, encoder in zip(model.family.encoders, model.text_encoders, strict=True)
    ]
    if any(encoders):
        entries[ENCODERS_KEY] = encoders
    usual = {"sample_size": model.default_sample_size, **model.family.pipeline_settings}
    pipeline = {"sample_size": model.sample_size or model.default_sample_size, **model.pipeline_settings}
    pipeline = {name: value for name, value in pipeline.items() if value != usual.get(name)}
    if pipeline:
        entries[PIPELINE_KEY] = pipeline
    return {key: json.dumps(value, sort_keys=True) for key, value in entries.items()}


def pipeline_fields(found: Mapping[str, Any]) -> dict[str, Any]:
    """`Model.sample_size` and `Model.pipeline_settings` as far as configurations or metadata have them.

    Args:
        found: a U-Net's config.json and model_index.json together, or our metadata; what makes no sense is passed over.
    """
    size = found.get("sample_size")
    sides = size if isinstance(size, list) and len(size) == 2 else [size]
    fits = all(type(side) is int and 0 < side < 1 << 16 for side in sides)
    settings = {name: found[name] for name in PIPELINE_SETTINGS if isinstance(found.get(name), bool)}
    return {"sample_size": size if fits else None, "pipeline_settings": settings}


def pipeline_metadata(metadata: Mapping[str, str], origin: str) -> dict[str, Any]:
    """What a single file's metadata has for `pipeline_fields`; {} where it has nothing.

    Raises:
        InputError: it makes no sense.
    """
    return _read(metadata, PIPELINE_KEY, origin) or {}


def unet_fields(sizes: Mapping[str, Any], metadata: Mapping[str, str], family: Family, origin: str) -> dict[str, Any]:
    """The fields of `UNetConfig` that are no sizes.

    Args:
        sizes: the others, from shapes.

    Raises:
        InputError: the file does not tell them, or its metadata makes no sense.
    """
    kept = _read(metadata, UNET_KEY, origin)
    if kept is not None:
        return _checked(kept, _UNET_FIELDS, UNET_KEY, origin)
    if not _is_published_unet(sizes, family):
        widths = [sizes["model_channels"] * factor for factor in sizes["channel_mult"]]
        raise _uncertain(
            origin, "how many attention heads its U-Net has", UNET_KEY, f"{widths} channels", f"{family.title} U-Net"
        )
    return {name: getattr(family.unet, name) for name in _UNET_FIELDS}


def encoder_fields(
    width: int, spec: EncoderSpec, place: int, metadata: Mapping[str, str], origin: str
) -> dict[str, Any]:
    """The fields of a text encoder's CLIPTextConfig that shapes do not tell; {} for those of the family's.

    Args:
        width: channels of its states.
        place: its number in the family, from 0.

    Raises:
        InputError: as `unet_fields`.
    """
    listed = _read(metadata, ENCODERS_KEY, origin, list)
    kept = listed[place] if listed is not None and place < len(listed) else None
    if kept:
        return _checked(kept, _ENCODER_FIELDS, ENCODERS_KEY, origin)
    if width != spec.width:
        raise _uncertain(
            origin,
            f"how many attention heads its text encoder {place + 1} has",
            ENCODERS_KEY,
            f"{width} channels",
            "text encoder of its family",
        )
    return {}


def vae_fields(channels: tuple[int, ...], metadata: Mapping[str, str], origin: str) -> dict[str, Any]:
    """The fields of AutoencoderKL's configuration that shapes do not tell.

    Args:
        channels: of each level.

    Raises:
        InputError: as `unet_fields`.
    """
    kept = _read(metadata, VAE_KEY, origin)
    if kept is not None:
        there = {**_VAE_UNSHIFTED, **kept} if isinstance(kept, dict) else kept
        return _checked(there, _VAE_FIELDS, VAE_KEY, origin)
    if channels != _VAE_CHANNELS:
        raise _uncertain(origin, "how many norm groups its VAE has", VAE_KEY, f"{list(channels)} channels", "VAE")
    return dict(_VAE_USUAL)


def _is_published_unet(sizes: Mapping[str, Any], family: Family) -> bool:
    """Whether heads follow from the family: they depend on the widths, and not on the number of layers."""
    published = family.unet
    return (sizes["model_channels"], sizes["channel_mult"], sizes["context_dim"], sizes["adm_in_channels"]) == (
        published.model_channels,
        published.channel_mult,
        published.context_dim,
        published.adm_in_channels,
    )


def _differs(config: Any, spec: EncoderSpec) -> bool:
    """Whether a text encoder has anything else than what its shapes and its family say."""
    usual = {
        "num_attention_heads": config.hidden_size // HEAD_CHANNELS,
        "hidden_act": spec.hidden_act,
        "layer_norm_eps": 1e-5,
        "bos_token_id": 0,
        "eos_token_id": 2,
        "pad_token_id": 1,
    }
    return any(getattr(config, name) != value for name, value in usual.items())


def _uncertain(origin: str, what: str, key: str, size: str, network: str) -> InputError:
    return InputError(
        f"{origin}: refused: {what} cannot be told from its tensors, and a wrong guess would give another model "
        f"without a word. It has {size}, which no published {network} has, and no metadata about it ({key}, which "
        "files written here have). Give the model as a diffusers folder, whose config.json files say it."
    )


def _read(metadata: Mapping[str, str], key: str, origin: str, kind: type = dict) -> Any:
    """The metadata's JSON under that key, None where there is none."""
    if key not in metadata:
        return None
    try:
        content = json.loads(metadata[key])
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, kind):
        raise InputError(f"{origin}: {key} in its metadata is {metadata[key][:80]!r}, which makes no sense.")
    return content


def _checked(kept: Any, fields: Mapping[str, tuple[type, ...]], key: str, origin: str) -> dict[str, Any]:
    """All of the fields, of the right type."""
    for name, kinds in fields.items():
        value = kept.get(name, "missing") if isinstance(kept, dict) else "missing"
        in_range = name not in _COUNTS or value is None or (isinstance(value, int) and 0 < value < 1 << 20)
        if type(value) not in kinds or not in_range:
            raise InputError(f"{origin}: {key} in its metadata makes no sense: {name} is {repr(value)[:80]}.")
    return {name: kept[name] for name in fields}
