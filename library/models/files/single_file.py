"""The names of one model's tensors: in a single file, in diffusers' and transformers' files, in our networks."""

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from library.errors import InputError
from library.models.family import EncoderSpec, Family
from library.models.files import key_maps
from library.models.files.infer_configs import VAE_SCALING_FACTOR
from library.models.model import Model
from library.models.unet import UNet, UNetConfig

# Our own metadata, for what neither keys nor ModelSpec tell.
SCALING_FACTOR_KEY = "sdxl_pretrain.vae_scaling_factor"
SCHEDULER_KEY = "sdxl_pretrain.scheduler"

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_TEXT_MODEL = "text_model."

# What files in the field carry besides the networks: numbers that follow from the configuration, CLIP's temperature,
# an averaged copy of the U-Net, and marks of the prediction type.
_IGNORED = re.compile(
    r"model_ema\..*|denoiser\.sigmas|(model_)?(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar)"
    r"|.*\.position_ids|.*logit_scale|v_pred|ztsnr|edm_.*|first_stage_model\.(loss|model_ema)\..*|.*\.attn_mask"
)


_Rename = Callable[[Mapping[str, Tensor]], dict[str, Tensor]]
_TO_TRANSFORMERS: dict[str, _Rename] = {
    "transformers": key_maps.clip_l_to_transformers,
    "open_clip": key_maps.open_clip_to_transformers,
}
_FROM_TRANSFORMERS: dict[str, _Rename] = {
    "transformers": key_maps.clip_l_from_transformers,
    "open_clip": key_maps.open_clip_from_transformers,
}


@dataclass
class Parts:
    """A single file's tensors by the names of our networks: Stability's, diffusers' for the VAE, transformers'."""

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoders: list[dict[str, Tensor]]


def split(tensors: Mapping[str, Tensor], family: Family, origin: str, kind: str, *, with_vae: bool = True) -> Parts:
    """Take a single file apart.

    Raises:
        InputError: a part has no tensors at all, or there are tensors of no part.
    """
    prefixes = (UNET_PREFIX, VAE_PREFIX, *(spec.single_file_prefix for spec in family.encoders))
    found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    foreign = []
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        if _IGNORED.fullmatch(name):
            continue
        if prefix is None:
            foreign.append(name)
        else:
            found[prefix][name.removeprefix(prefix)] = tensor
    absent = [f"{prefix}*" for prefix in prefixes if not found[prefix] and (with_vae or prefix != VAE_PREFIX)]
    if absent or foreign:
        reasons = [f"nothing under {', '.join(absent)}"] if absent else []
        reasons += [f"{len(foreign)} tensors of no part of SDXL ({', '.join(foreign[:10])})"] if foreign else []
        way_out = " A VAE can be given by --vae." if absent == [f"{VAE_PREFIX}*"] else ""
        raise InputError(
            f"{origin}: no complete SDXL model: {'; '.join(reasons)}. It seems to be {kind}. "
            f"Give an SDXL base model.{way_out}"
        )
    try:
        return Parts(
            unet=found[UNET_PREFIX],
            vae=key_maps.vae_to_diffusers(found[VAE_PREFIX]) if with_vae else {},
            text_encoders=[
                _TO_TRANSFORMERS[spec.single_file_names](found[spec.single_file_prefix]) for spec in family.encoders
            ],
        )
    except (LookupError, ValueError, RuntimeError) as error:  # RuntimeError: a shape that cannot be taken apart
        raise InputError(
            f"{origin}: no SDXL model: it has a tensor of an unknown name or shape ({error}). It seems to be {kind}. "
            "Give an SDXL base model."
        ) from error


def join(model: Model) -> dict[str, Tensor]:
    """All tensors of a model by the keys of Stability's single file; not converted, not copied where avoidable."""
    parts = (
        (UNET_PREFIX, model.unet.state_dict()),
        (VAE_PREFIX, key_maps.vae_from_diffusers(model.vae.state_dict())),
        *(
            (spec.single_file_prefix, _FROM_TRANSFORMERS[spec.single_file_names](encoder.state_dict()))
            for spec, encoder in zip(model.family.encoders, model.text_encoders, strict=True)
        ),
    )
    return {prefix + name: tensor for prefix, tensors in parts for name, tensor in tensors.items()}


def remembered(model: Model) -> dict[str, str]:
    """Metadata for what a single file's keys do not tell: the prediction type, and what its family has otherwise."""
    entries = {}
    if model.vae.config.scaling_factor != model.family.vae_scaling_factor:
        entries[SCALING_FACTOR_KEY] = repr(float(model.vae.config.scaling_factor))
    usual = model.family.scheduler
    changed = {
        name: value
        for name, value in model.scheduler_config.items()
        if name != "_diffusers_version" and (name not in usual or usual[name] != value)
    }
    if changed:
        entries[SCHEDULER_KEY] = json.dumps(changed, sort_keys=True)
    entries["modelspec.prediction_type"] = "v" if model.prediction_type == "v_prediction" else model.prediction_type
    return entries


def scheduler_config(tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Family) -> dict[str, Any]:
    """The family's scheduler, as changed by our own metadata, ModelSpec's prediction type, or the field's marks."""
    config = dict(family.scheduler)
    if "v_pred" in tensors or metadata.get("modelspec.prediction_type") == "v":
        config["prediction_type"] = "v_prediction"
    if "ztsnr" in tensors:
        config["rescale_betas_zero_snr"] = True
        config["timestep_spacing"] = "trailing"
    try:
        ours = json.loads(metadata.get(SCHEDULER_KEY, "{}"))
    except (ValueError, RecursionError):
        ours = None
    return {**config, **ours} if isinstance(ours, dict) else config  # else the usual values are the better guess


def scaling_factor(metadata: Mapping[str, str], origin: str) -> float:
    """By what the VAE's latents are multiplied: as our own metadata says, else SDXL's.

    Raises:
        InputError: the metadata has something that is no positive number.
    """
    text = metadata.get(SCALING_FACTOR_KEY, repr(VAE_SCALING_FACTOR))
    try:
        factor = float(text)
    except ValueError:
        factor = math.nan
    if not 0 < factor < math.inf:
        raise InputError(f"{origin}: {SCALING_FACTOR_KEY} in its metadata is {text!r}, no positive number.")
    return factor


def vae_tensors(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A VAE's tensors by diffusers' present names, out of a VAE's file in either naming, or of a whole model's."""
    if any(name.startswith(VAE_PREFIX) for name in tensors):
        tensors = {name: tensor for name, tensor in tensors.items() if name.startswith(VAE_PREFIX)}
    plain = {
        name.removeprefix(VAE_PREFIX).removeprefix("vae."): tensor
        for name, tensor in tensors.items()
        if not _IGNORED.fullmatch(name) and not name.startswith(("loss.", "model_ema."))
    }
    if any(name.startswith("encoder.down.") for name in plain):
        return key_maps.vae_to_diffusers(plain)
    return key_maps.vae_from_older_diffusers(plain)


def unet_from_diffusers(config: UNetConfig, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The U-Net's tensors by Stability's keys; names that are none of diffusers' stay as they are."""
    to_stability = key_maps.inverse(key_maps.unet_to_diffusers(config))
    return {to_stability.get(name, name): tensor for name, tensor in tensors.items()}


def unet_to_diffusers(unet: UNet) -> dict[str, Tensor]:
    """The U-Net's tensors by diffusers' names."""
    return key_maps.rename(unet.state_dict(), key_maps.unet_to_diffusers(unet.config))


def encoder_to_disk(encoder: Any) -> dict[str, Tensor]:
    """A text encoder's tensors as files have them: all but the projection under `text_model.`, of either encoder."""
    return {
        name if name.startswith((_TEXT_MODEL, "text_projection")) else _TEXT_MODEL + name: tensor
        for name, tensor in encoder.state_dict().items()
    }


def encoder_from_disk(spec: EncoderSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What a text encoder's files have, as CLIPTextModel or the one with projection names it in memory.

    transformers 5 has no `text_model.` in CLIPTextModel any more; CLIPTextModelWithProjection still has it.
    """
    plain = key_maps.clip_l_to_transformers(tensors)
    if not spec.projection:
        return plain
    return {name if name.startswith("text_projection") else _TEXT_MODEL + name: t for name, t in plain.items()}
