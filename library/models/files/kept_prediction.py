"""What a single file says about the prediction type and the noise schedule, which no tensor of its networks shows.

In this order: ModelSpec's metadata, ComfyUI's, our own, the field's marks (tensors named `v_pred` and `ztsnr`, which
hold nothing), and for SD 2.x a rule of ComfyUI's about one tensor. Published files of SD 2.x say nothing themselves.
"""

import json
import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError
from library.models.family import Family
from library.models.files.noise_process import check_schedule, check_scheduler, check_tensors
from library.models.model import Model

logger = logging.getLogger(__name__)

SCHEDULER_KEY = "sd_training.scheduler"
MODELSPEC_KEY = "modelspec.prediction_type"
COMFYUI_KEY = "modelspec.predict_key"  # not in the specification
V_MARK, ZERO_SNR_MARK = "v_pred", "ztsnr"
_WORDS = {"epsilon": "epsilon", "eps": "epsilon", "v": "v_prediction", "v_prediction": "v_prediction"}
_MODELSPEC_WORDS = {"v_prediction": "v"}
# ComfyUI's supported_models.py, class SD20: in 768-v models this tensor's standard deviation is larger.
_SD2_TENSOR = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
_SD2_SPREAD, _SD2_CHANNELS = 0.09, 320


def metadata_of(model: Model) -> dict[str, str]:
    """The metadata of a single file for the prediction type, and for a scheduler that is not the family's."""
    usual = model.family.scheduler
    changed = {
        name: value
        for name, value in model.scheduler_config.items()
        if name != "_diffusers_version" and (name not in usual or usual[name] != value)
    }
    entries = {SCHEDULER_KEY: json.dumps(changed, sort_keys=True)} if changed else {}
    kind = model.prediction_type
    return {**entries, MODELSPEC_KEY: _MODELSPEC_WORDS.get(kind, kind)}


def marks(scheduler_config: Mapping[str, Any]) -> dict[str, Tensor]:
    """The field's marks: tensors without numbers whose names say what readers need to know."""
    found = {
        V_MARK: scheduler_config.get("prediction_type") == "v_prediction",
        ZERO_SNR_MARK: bool(scheduler_config.get("rescale_betas_zero_snr", False)),
    }
    return {name: torch.zeros(0) for name, there in found.items() if there}


def scheduler_of(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], family: Family, origin: str
) -> tuple[dict[str, Any], str]:
    """The scheduler's configuration, and where its prediction type is from ("" where the file does not tell it).

    Two places that contradict each other are a warning; the first in the order above wins.

    Raises:
        InputError: the file says that it is a model of another noise process, or predicts something else.
    """
    check_tensors(tensors, origin)
    ours = _ours(metadata)
    check_scheduler(ours, f"{origin}: {SCHEDULER_KEY} in its metadata")
    config = {**family.scheduler}
    if ZERO_SNR_MARK in tensors:
        config |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    config |= ours
    said = {
        **{f"{key} in its metadata": _word(metadata, key, origin) for key in (MODELSPEC_KEY, COMFYUI_KEY)},
        f"{SCHEDULER_KEY} in its metadata": ours.get("prediction_type"),
        f"the mark {V_MARK}": "v_prediction" if V_MARK in tensors else None,
    }
    said = {source: kind for source, kind in said.items() if kind is not None}
    check_schedule(tensors, config, origin)
    if not said:
        by_spread = _by_spread(tensors, family)
        kind = by_spread or family.scheduler["prediction_type"]
        return {**config, "prediction_type": kind}, f"the spread of {_SD2_TENSOR}" if by_spread else ""
    (source, kind), *rest = said.items()
    others = [f"{other} says {other_kind}" for other, other_kind in rest if other_kind != kind]
    if others:
        logger.warning("%s: %s says %s, %s; %s is taken", origin, source, kind, ", ".join(others), kind)
    return {**config, "prediction_type": kind}, source


def _word(metadata: Mapping[str, str], key: str, origin: str) -> str | None:
    """The prediction type that one of the metadata's keys says, in diffusers' words; None where it is not there."""
    said = metadata.get(key)
    if said is None:
        return None
    if said.lower() not in _WORDS:
        raise InputError(
            f"{origin}: {key} in its metadata is {said[:80]!r}; trained here are models that predict the noise "
            "(epsilon) or the velocity (v). Give such a model, or correct the metadata if they are wrong."
        )
    return _WORDS[said.lower()]


def _ours(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What our own metadata says of the scheduler; {} where it is missing or makes no sense."""
    try:
        ours = json.loads(metadata.get(SCHEDULER_KEY, "{}"))
    except (ValueError, RecursionError):
        ours = None
    return ours if isinstance(ours, dict) else {}


def _by_spread(tensors: Mapping[str, Tensor], family: Family) -> str | None:
    """For a U-Net of SD 2.x's published size that takes latents alone: ComfyUI's rule."""
    tensor, first = tensors.get(_SD2_TENSOR), tensors.get("model.diffusion_model.input_blocks.0.0.weight")
    if family.name != "sd2" or tensor is None or first is None or tuple(first.shape[:2]) != (_SD2_CHANNELS, 4):
        return None
    return "v_prediction" if tensor.float().std(correction=0) > _SD2_SPREAD else "epsilon"
