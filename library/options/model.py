"""Options of the model: where it comes from, how attention and the VAE are computed."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import REQUIRED, OptionGroup, PathTo, flag

TOKEN_LENGTHS = (75, 77, 150, 225, 512)


@dataclass(frozen=True, kw_only=True)
class ModelOptions(OptionGroup):
    """Which weights are loaded, how long a caption may be, and how attention and the VAE are computed."""

    title: ClassVar[str] = "model"

    pretrained_model_name_or_path: str = flag(
        REQUIRED,
        "Start from this model: a diffusers folder, a single file (.safetensors, .ckpt) or a hub name",
        path_to=PathTo.MODEL,
        same_on_ranks=False,  # machines may have it in different places; its weights are compared
    )
    vae: str | None = flag(
        None,
        "Use another VAE than the model's: a folder, a single file or a hub name (for fp16: "
        "madebyollin/sdxl-vae-fp16-fix)",
        path_to=PathTo.VAE,
        same_on_ranks=False,
    )
    max_token_length: int | None = flag(
        None,
        "Train so many tokens of a caption: 150, 225 and 512 mean chunks of 75 (2, 3 and 7); 75, 77 and "
        "unset mean one chunk",
        choices=TOKEN_LENGTHS,
    )
    weighted_captions: bool = flag(
        False,
        "Read brackets in captions and sample prompts as weights: (word:1.3) weighs 1.3, (word) 1.1, [word] 1/1.1",
    )
    enable_npu_flash_attention: bool = flag(
        False,
        "Compute the U-Net's attention by torch_npu.npu_fusion_attention; off the NPU there is a warning, "
        "and torch's SDPA computes it",
    )
    no_half_vae: bool = flag(
        False,
        "Keep the VAE in fp32 under mixed precision",
        idle_without=("mixed_precision=fp16", "mixed_precision=bf16"),
    )
