"""What a file or folder is by its content: a model of which family, a LoRA, something else."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from library.errors import InputError
from library.models.family import Family
from library.models.files.weight_files import read_json
from library.options.model_paths import check_pipeline_folder

_LORA, _UNET = "a LoRA (or another network module)", "a U-Net alone"

# The name of a family, what messages call a model of it, and the scripts that train one.
_FAMILIES = {
    "sdxl": ("an SDXL base model", "sdxl_pretrain.py and sdxl_train.py"),
    "sd2": ("a Stable Diffusion 2 model", "fine_tune.py"),
    "sd1": ("a Stable Diffusion 1 model", "fine_tune.py"),
}

# In this order: the first whose mark is in some name of the file.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_LORA, ("lora_unet_", "lora_te", ".lora_down.", ".lora_A.", ".hada_w1_a")),
    ("a ControlNet", ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    ("a Stable Diffusion 3 or Flux model", ("joint_blocks.", "double_blocks.")),
    (_FAMILIES["sdxl"][0], ("conditioner.embedders.1.",)),
    ("the SDXL refiner", ("conditioner.embedders.0.model.",)),
    (_FAMILIES["sd2"][0], ("cond_stage_model.model.",)),
    (_FAMILIES["sd1"][0], ("cond_stage_model.transformer.",)),
    (_UNET, ("diffusion_model.", "down_blocks.0.attentions.", "time_embedding.linear_1.", "input_blocks.0.0.")),
    ("a VAE alone", ("first_stage_model.", "post_quant_conv.", "decoder.conv_in.")),
    ("a CLIP text encoder alone", ("text_model.", "resblocks.")),
    ("a textual inversion", ("emb_params", "string_to_param", "clip_l", "clip_g")),
)

# Which family a U-Net is of, by the width of the text that it attends to.
_TEXT_WIDTHS = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_TEXT_KEYS = ("attn2.to_k.weight", "attn2_to_k.lora_down.weight", "attn2.to_k.lora_A.weight")


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A few words for messages, "a model of unknown kind" if no mark is known."""
    kind = _kind(tensors)
    family = _family_by_width(tensors) if kind in (_LORA, _UNET) else None
    return f"{kind}, for {family}" if family else kind


def family_of_tensors(names: Mapping[str, Any], families: Sequence[Family], origin: str) -> Family:
    """Which of the families a single file's tensors are a model of.

    Args:
        names: the tensors by name; where they are at hand a LoRA's family can be told, too.

    Raises:
        InputError: none of them; it says what the file is, and what takes it.
    """
    kind = _kind(names)
    found = next((name for name, (words, _) in _FAMILIES.items() if words == kind), None)
    shown = describe(names) if found is None else kind
    return _chosen(found, shown, families, origin)


def family_of_folder(folder: Path, families: Sequence[Family]) -> Family:
    """Which of the families a diffusers folder's model is of.

    Raises:
        InputError: none of them, or no complete one.
    """
    check_pipeline_folder(folder)
    index = folder / "model_index.json"
    pipeline = str(read_json(index).get("_class_name", "unknown")) if index.is_file() else "unknown"
    config = read_json(folder / "unet" / "config.json")
    found = _family_of_config(config)
    if config.get("cross_attention_dim") == 1280 and not (folder / "text_encoder").exists():
        raise InputError(f"{folder}: it is the SDXL refiner (its pipeline is {pipeline}). {_wanted(families)}")
    shown = f"{_FAMILIES[found][0]} (its pipeline is {pipeline})"
    family = _chosen(found, shown, families, str(folder))
    for spec in family.encoders:
        if not (folder / spec.folder / "config.json").is_file():
            raise InputError(
                f"{folder}: no complete {family.title} model: it has no {spec.folder}/config.json (its pipeline is "
                f"{pipeline}). {_wanted(families)}"
            )
    return family


def _family_of_config(config: Mapping[str, Any]) -> str:
    """By the U-Net's configuration: SDXL's alone has vector conditions, SD 1.x alone convolutions as projections."""
    if config.get("addition_embed_type") is not None:
        return "sdxl"
    published = {768: "sd1", 1024: "sd2"}
    width = config.get("cross_attention_dim")
    if isinstance(width, int) and width in published:
        return published[width]
    return "sd2" if config.get("use_linear_projection") else "sd1"


def _chosen(found: str | None, shown: str, families: Sequence[Family], origin: str) -> Family:
    for family in families:
        if family.name == found:
            return family
    if found is None:
        titles = " or ".join(family.title for family in families)
        raise InputError(f"{origin}: no {titles} model. It seems to be {shown}. {_wanted(families)}")
    raise InputError(
        f"{origin}: it is {shown}; this script does not train such a model, {_FAMILIES[found][1]} does. "
        f"{_wanted(families)}"
    )


def _wanted(families: Sequence[Family]) -> str:
    return f"Give {' or '.join(f'an {family.title} base model' for family in families)}."


def _kind(names: Mapping[str, Any]) -> str:
    for kind, marks in _MARKS:
        if any(mark in name for name in names for mark in marks):
            return kind
    return "a model of unknown kind"


def _family_by_width(tensors: Mapping[str, Tensor]) -> str | None:
    widths = (t.shape[1] for name, t in tensors.items() if name.endswith(_TEXT_KEYS) and t.dim() >= 2)
    return _TEXT_WIDTHS.get(next(widths, 0))
