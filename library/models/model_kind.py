"""What a file's tensor names say it is: SDXL, an older Stable Diffusion, a LoRA, something else."""

from collections.abc import Collection

SDXL_BASE = "an SDXL base model"

# In this order: the first whose mark is in some name of the file.
_MARKS: tuple[tuple[str, tuple[str, ...]], ...] = (
    ("a LoRA (or another network module)", ("lora_unet_", "lora_te", ".lora_down.", ".lora_A.", ".hada_w1_a")),
    ("a ControlNet", ("control_model.", "input_hint_block.", "controlnet_cond_embedding.")),
    ("a Stable Diffusion 3 or Flux model", ("joint_blocks.", "double_blocks.")),
    (SDXL_BASE, ("conditioner.embedders.1.",)),
    ("the SDXL refiner", ("conditioner.embedders.0.model.",)),
    ("a Stable Diffusion 2 model", ("cond_stage_model.model.",)),
    ("a Stable Diffusion 1 model", ("cond_stage_model.transformer.",)),
    ("a U-Net alone", ("diffusion_model.", "down_blocks.0.attentions.", "time_embedding.linear_1.")),
    ("a VAE alone", ("first_stage_model.", "post_quant_conv.", "decoder.conv_in.")),
    ("a CLIP text encoder alone", ("text_model.", "resblocks.")),
    ("a textual inversion", ("emb_params", "string_to_param", "clip_l", "clip_g")),
)


def describe(names: Collection[str]) -> str:
    """A few words for messages, "a model of unknown kind" if no mark is known."""
    for kind, marks in _MARKS:
        if any(mark in name for name in names for mark in marks):
            return kind
    return "a model of unknown kind"
