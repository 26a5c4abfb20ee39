"""SDXL with a U-Net smaller than the tiny one that most tests take."""

from dataclasses import replace
from pathlib import Path

import torch

from library.models.files.modelspec import modelspec
from library.models.files.write import save_model
from library.models.unet import UNet, UNetConfig


def save_with_small_unet(sdxl, folder: Path, side_px: int, model_channels: int, channel_mult: tuple[int, int]) -> Path:
    """Write the tiny model as a diffusers folder, with a U-Net of two levels and a transformer on the second."""
    torch.manual_seed(4)
    config = UNetConfig(
        model_channels=model_channels,
        channel_mult=channel_mult,
        num_res_blocks=1,
        transformer_depth=(0, 1),
        transformer_depth_middle=1,
        context_dim=sdxl.unet.config.context_dim,
        adm_in_channels=sdxl.unet.config.adm_in_channels,
    )
    unet = UNet(config).eval()
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    metadata = modelspec(title=folder.name, resolution_wh_px=(side_px, side_px), prediction_type="epsilon")
    return save_model(replace(sdxl, unet=unet), folder, "diffusers_safetensors", None, metadata)
