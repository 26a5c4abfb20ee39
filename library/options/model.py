"""Options of the model: where it comes from, how its parts are used."""

from argparse import ArgumentParser
from dataclasses import dataclass


@dataclass(frozen=True)
class ModelOptions:
    """Which weights and tokenizers are loaded, and how attention and the VAE are computed."""

    pretrained_model_name_or_path: str
    vae: str | None
    tokenizer1_path: str | None
    tokenizer2_path: str | None
    max_token_length: int | None
    weighted_captions: bool
    v_parameterization: bool
    zero_terminal_snr: bool
    enable_npu_flash_attention: bool
    no_half_vae: bool


def add_arguments(parser: ArgumentParser) -> None:
    """Add this group's flags to a parser."""
    group = parser.add_argument_group("model")
    group.add_argument(
        "--pretrained_model_name_or_path",
        required=True,
        help="the model to start from: a diffusers folder, a single file (.safetensors, .ckpt) or a hub name",
    )
    group.add_argument(
        "--vae", help="another VAE: folder, single file or hub name (fp16: madebyollin/sdxl-vae-fp16-fix)"
    )
    group.add_argument("--tokenizer1_path", help="name or folder of CLIP-L's tokenizer (default: the model's own)")
    group.add_argument(
        "--tokenizer2_path", help="name or folder of OpenCLIP bigG's tokenizer (default: the model's own)"
    )
    group.add_argument(
        "--max_token_length",
        type=int,
        choices=[77, 150, 225, 512],
        help="longest caption in tokens: 150, 225 and 512 mean chunks of 75 (2, 3 and 7); 77 and unset mean one chunk",
    )
    group.add_argument(
        "--weighted_captions",
        action="store_true",
        help="(word:1.3) in a caption weighs 1.3, (word) 1.1, [word] 1/1.1; in sample prompts, too",
    )
    group.add_argument(
        "--v_parameterization",
        action="store_true",
        help="train v-prediction; without it the model's own scheduler settings decide (epsilon for a single file)",
    )
    group.add_argument(
        "--zero_terminal_snr",
        action="store_true",
        help="rescale the betas so that the last timestep is pure noise (needs v-prediction)",
    )
    group.add_argument(
        "--enable_npu_flash_attention",
        action="store_true",
        help="torch_npu.npu_fusion_attention in the U-Net; off the NPU a warning and torch's SDPA",
    )
    group.add_argument("--no_half_vae", action="store_true", help="keep the VAE in fp32 under mixed precision")
