"""The names of one model's tensors: in a single file, in diffusers' and transformers' files, in our networks."""

import logging
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from library.errors import InputError
from library.models.family import EncoderSpec, Family
from library.models.files import kept_configs, kept_prediction, key_maps
from library.models.model import UNET, VAE, Model
from library.models.unet import UNetConfig

logger = logging.getLogger(__name__)

SCALING_FACTOR_KEY = "sd_training.vae_scaling_factor"  # metadata of our own

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
_TEXT_MODEL = "text_model."
_SHOWN = 5
_NEAR = 1e-2  # half precision is 5e-4 off

# What files of every program have besides the networks, and is read elsewhere or follows from the configuration: tables
# of the noise schedule, CLIP's positions and masks, marks of the prediction type, the loss of the VAE's training.
_IGNORED = re.compile(
    r"denoiser\.sigmas|(model_)?(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|lvlb_weights)"
    r"|.*\.position_ids|.*\.attn_mask|v_pred|ztsnr|scale_factor|first_stage_model\.loss\..*"
)
# What some programs put beside it, which no output of a model is made of: averaged copies (EMA), ComfyUI's own
# objects, CLIP's image tower, counters.
_SURPLUS = re.compile(
    r"(.*\.)?(model_ema|ema_model|unet_ema|ema)\..*|(model_sampling|latent_format|embedding_manager|scheduler)\..*"
    r"|.*\.(visual|vision_model)\..*|.*\.visual_projection(\.weight)*|global_step|step|epoch|iteration|.*\.logit_scale"
)


# The same in the files of one text encoder.
_ENCODER_SURPLUS = re.compile(r"(.*\.)?(vision_model|visual)\..*|visual_projection(\.weight)*|(.*\.)?logit_scale")
_PROJECTION = re.compile(r"(text_model\.)?text_projection(\.weight)*")


@dataclass
class Parts:
    """A single file's tensors by the names of our networks: Stability's, diffusers' for the VAE, transformers'.

    Attributes:
        carried: by their names in the file, what belongs to a text encoder and no output is made of.
    """

    unet: dict[str, Tensor]
    vae: dict[str, Tensor]
    text_encoders: list[dict[str, Tensor]]
    carried: dict[str, Tensor]


def split(tensors: Mapping[str, Tensor], family: Family, origin: str, kind: str, *, with_vae: bool = True) -> Parts:
    """Take a single file apart. What no part of a model has a use for is named in a warning.

    Raises:
        InputError: a part has no tensors at all, or there are tensors of no part.
    """
    prefixes = (UNET_PREFIX, VAE_PREFIX, *(spec.single_file_prefix for spec in family.encoders))
    found: dict[str, dict[str, Tensor]] = {prefix: {} for prefix in prefixes}
    unused = {_unused_pattern(spec): spec for spec in family.encoders}
    carried: dict[str, Tensor] = {}
    foreign, surplus, kept = [], [], []
    for name, tensor in tensors.items():
        prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), None)
        owner = next((spec for pattern, spec in unused.items() if re.fullmatch(pattern, name)), None)
        if owner is not None:
            carried[name] = tensor
            if owner.single_file_names == "transformers":  # published files of OpenCLIP's encoders have theirs
                kept.append(name)
        elif _IGNORED.fullmatch(name):
            continue
        elif _SURPLUS.fullmatch(name):
            surplus.append(name)
        elif prefix is None:
            foreign.append(name)
        else:
            found[prefix][name.removeprefix(prefix)] = tensor
    absent = [f"{prefix}*" for prefix in prefixes if not found[prefix] and (with_vae or prefix != VAE_PREFIX)]
    if absent or foreign:
        reasons = [f"nothing under {', '.join(absent)}"] if absent else []
        reasons += (
            [f"{len(foreign)} tensors of no part of {family.title} ({', '.join(foreign[:10])})"] if foreign else []
        )
        way_out = " A VAE can be given by --vae." if absent == [f"{VAE_PREFIX}*"] else ""
        raise InputError(
            f"{origin}: no complete {family.title} model: {'; '.join(reasons)}. It seems to be {kind}. "
            f"Give an {family.title} base model.{way_out}"
        )
    _warn_of(surplus, origin, "left out")
    _warn_of(kept, origin, "kept as they are")
    try:
        return Parts(
            unet=found[UNET_PREFIX],
            vae=key_maps.vae_to_diffusers(found[VAE_PREFIX]) if with_vae else {},
            text_encoders=[
                _encoder_from_file(spec, found[spec.single_file_prefix], origin) for spec in family.encoders
            ],
            carried=carried,
        )
    except (LookupError, ValueError, RuntimeError) as error:  # RuntimeError: a shape that cannot be taken apart
        raise InputError(
            f"{origin}: no {family.title} model: it has a tensor of an unknown name or shape ({error}). It seems to be "
            f"{kind}. Give an {family.title} base model."
        ) from error


def _unused_pattern(spec: EncoderSpec) -> str:
    """A pattern for the full names of what a text encoder has and no output is made of."""
    holder = spec.single_file_prefix.rsplit(".", 2)[0]
    return rf"{re.escape(holder)}\.(transformer\.|model\.)?(text_model\.)?({spec.single_file_unused})"


def _warn_of(names: list[str], origin: str, what: str) -> None:
    if names:
        more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
        shown = ", ".join(names[:_SHOWN]) + more
        logger.warning("%s: %d tensors that no output is made of are %s: %s", origin, len(names), what, shown)


def join(model: Model) -> dict[str, Tensor]:
    """All tensors of a model by the keys of Stability's single file; not converted, not copied where avoidable.

    With them go what the file that was read carried, and the field's marks of the prediction type.
    """
    parts = (
        (UNET_PREFIX, model.weights(UNET)),
        (VAE_PREFIX, key_maps.vae_from_diffusers(model.weights(VAE))),
        *(
            (spec.single_file_prefix, _encoder_to_file(spec, model.weights(spec.folder)))
            for spec in model.family.encoders
        ),
    )
    tensors = {prefix + name: tensor for prefix, part in parts for name, tensor in part.items()}
    return {**tensors, **model.carried, **kept_prediction.marks(model.scheduler_config)}


def remembered(model: Model) -> dict[str, str]:
    """Metadata for what a single file's keys do not tell: the architecture, and what its family has otherwise."""
    entries = {"modelspec.architecture": model.architecture, **kept_configs.metadata_of(model)}
    if model.vae.config.scaling_factor != model.family.vae_scaling_factor:
        entries[SCALING_FACTOR_KEY] = repr(float(model.vae.config.scaling_factor))
    return {**entries, **kept_prediction.metadata_of(model)}


def check_scale_factor(tensors: Mapping[str, Tensor], factor: float, origin: str) -> None:
    """Raise InputError where a file has CompVis' tensor `scale_factor`, and it is another factor than latents get here.

    Their training code has it where the factor was measured on the first batch (scale_by_std).
    """
    told = tensors.get("scale_factor")
    if told is None or told.numel() != 1 or not told.is_floating_point():
        return
    value = float(told)
    if 0 < value < math.inf and abs(value - factor) > _NEAR * factor:
        raise InputError(
            f"{origin}: its tensor scale_factor says that latents are multiplied by {value:g}, and here they would be "
            f"by {factor:g}: it was trained on latents of its own. Give it as a diffusers folder, whose "
            f"vae/config.json has {value:g} as scaling_factor."
        )


def scaling_factor(metadata: Mapping[str, str], family: Family, origin: str) -> float:
    """By what the VAE's latents are multiplied: as our own metadata says, else the family's.

    Raises:
        InputError: the metadata has something that is no positive number.
    """
    text = metadata.get(SCALING_FACTOR_KEY, repr(family.vae_scaling_factor))
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


def encoder_to_disk(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A text encoder's tensors as files have them: all but the projection under `text_model.`, of either encoder.

    Args:
        tensors: by the names that they have in memory.
    """
    return {
        name if name.startswith((_TEXT_MODEL, "text_projection")) else _TEXT_MODEL + name: tensor
        for name, tensor in tensors.items()
    }


def encoder_from_disk(spec: EncoderSpec, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """What a text encoder's files have, as CLIPTextModel or the one with projection names it in memory.

    transformers 5 has no `text_model.` in CLIPTextModel any more; CLIPTextModelWithProjection still has it. What
    belongs to the rest of CLIP alone (its image tower, a projection that the family does not use) is left out.

    Args:
        origin: the file or folder, for the warning that names what is left out.
    """
    surplus = [name for name in tensors if _ENCODER_SURPLUS.fullmatch(name)]
    if not spec.projection:
        surplus += [name for name in tensors if _PROJECTION.fullmatch(name)]
    _warn_of(surplus, origin, "left out")
    plain = key_maps.clip_l_to_transformers({name: one for name, one in tensors.items() if name not in surplus})
    if not spec.projection:
        return plain
    return {name if name.startswith("text_projection") else _TEXT_MODEL + name: t for name, t in plain.items()}


def _encoder_from_file(spec: EncoderSpec, tensors: Mapping[str, Tensor], origin: str) -> dict[str, Tensor]:
    """What a single file has after a text encoder's prefix, by the names that it has in memory."""
    if spec.single_file_names == "open_clip":
        tensors = key_maps.open_clip_to_transformers(tensors)
    return encoder_from_disk(spec, tensors, origin)


def _encoder_to_file(spec: EncoderSpec, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `_encoder_from_file`."""
    tensors = encoder_to_disk(tensors)
    return key_maps.open_clip_from_transformers(tensors) if spec.single_file_names == "open_clip" else tensors
