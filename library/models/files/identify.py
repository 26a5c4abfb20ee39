"""What a file's tensors say it is: SDXL, an older Stable Diffusion, a LoRA, something else."""

from collections.abc import Mapping

from torch import Tensor

SDXL_BASE = "an SDXL base model"
_LORA, _UNET = "a LoRA (or another network module)", "a U-Net alone"

# In this order: the first whose mark is in some name of the file.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_LORA, ("lora_unet_", "lora_te", ".lora_down.", ".lora_A.", ".hada_w1_a")),
    ("a ControlNet", ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    ("a Stable Diffusion 3 or Flux model", ("joint_blocks.", "double_blocks.")),
    (SDXL_BASE, ("conditioner.embedders.1.",)),
    ("the SDXL refiner", ("conditioner.embedders.0.model.",)),
    ("a Stable Diffusion 2 model", ("cond_stage_model.model.",)),
    ("a Stable Diffusion 1 model", ("cond_stage_model.transformer.",)),
    (_UNET, ("diffusion_model.", "down_blocks.0.attentions.", "time_embedding.linear_1.", "input_blocks.0.0.")),
    ("a VAE alone", ("first_stage_model.", "post_quant_conv.", "decoder.conv_in.")),
    ("a CLIP text encoder alone", ("text_model.", "resblocks.")),
    ("a textual inversion", ("emb_params", "string_to_param", "clip_l", "clip_g")),
)

# Which family a U-Net is of, by the width of the text that it attends to.
_FAMILIES = {768: "Stable Diffusion 1", 1024: "Stable Diffusion 2", 1280: "the SDXL refiner", 2048: "SDXL"}
_TEXT_KEYS = ("attn2.to_k.weight", "attn2_to_k.lora_down.weight", "attn2.to_k.lora_A.weight")


def describe(tensors: Mapping[str, Tensor]) -> str:
    """A few words for messages, "a model of unknown kind" if no mark is known."""
    for kind, marks in _MARKS:
        if any(mark in name for name in tensors for mark in marks):
            family = _family(tensors) if kind in (_LORA, _UNET) else None
            return f"{kind}, for {family}" if family else kind
    return "a model of unknown kind"


def _family(tensors: Mapping[str, Tensor]) -> str | None:
    widths = (t.shape[1] for name, t in tensors.items() if name.endswith(_TEXT_KEYS) and t.dim() >= 2)
    return _FAMILIES.get(next(widths, 0))
