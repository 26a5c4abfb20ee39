"""Pictures to scaled latents and back, through diffusers' AutoencoderKL.

Shape legend: B batch, H W rows and columns of the picture in pixels, h w of the latents, C channels.
The VAE's own dtype is used for its layers: SDXL's stock VAE overflows in fp16 (use madebyollin/sdxl-vae-fp16-fix, or
keep it in fp32 by --no_half_vae), so the dtype is the caller's choice. The latents are fp32.
"""

import logging
from typing import Any

import torch
from torch import Tensor

from library import device
from library.finite import is_finite
from library.models.attention_trial import failure

logger = logging.getLogger(__name__)


def downscale_factor(vae: Any) -> int:
    """Picture pixels per latent along a side: 8 for SDXL's VAE."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def choose_attention(vae: Any) -> None:
    """On an Ascend NPU, have the VAE attend by the formula, a picture at a time, where fused attention fails there.

    A VAE's attention has one head as wide as its last level, 512 for SDXL's, and often runs in fp32.
    """
    at = next(vae.parameters()).device
    wrong = failure("sdpa", at, vae.dtype, vae.config.block_out_channels[-1], backward=False)
    if wrong is None:
        return
    from diffusers.models.attention_processor import SlicedAttnProcessor

    vae.set_attn_processor(SlicedAttnProcessor(slice_size=1))
    logger.warning(
        "the VAE's attention was tried on %s and fails: %s; the formula runs instead, a picture at a time",
        device.device_name(at),
        wrong,
    )


def latent_shape(vae: Any, height_px: int, width_px: int) -> tuple[int, int, int]:
    """(channels, rows, columns) of one picture's latents, for the noise that `encode_images` takes."""
    factor = downscale_factor(vae)
    return vae.config.latent_channels, height_px // factor, width_px // factor


@torch.no_grad()
def encode_images(
    vae: Any, images_BHWC: Tensor, noise_BChw: Tensor | None = None, *, slice_size: int | None = None
) -> Tensor:
    """Pictures as the latents that the U-Net trains on: `encode_moments`, then `sample_latents`.

    Returns:
        fp32 latents_BChw, shifted and scaled by the VAE's config (scaling_factor 0.13025 for SDXL).
    """
    return sample_latents(vae, *encode_moments(vae, images_BHWC, slice_size=slice_size), noise_BChw)


@torch.no_grad()
def encode_moments(vae: Any, images_BHWC: Tensor, *, slice_size: int | None = None) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of the VAE's posterior (Kingma and Welling 2014), not yet scaled.

    A slice that is short is filled up: libraries choose their kernels by the number of pictures, and so the last bits
    of a picture's moments would depend on how many others there are.

    Args:
        vae: AutoencoderKL, of any dtype.
        images_BHWC: uint8, RGB, on the VAE's device; sides divisible by `downscale_factor`.
        slice_size: pictures that go through the VAE at once, all when None. Bounds memory.

    Returns:
        mean_BChw and std_BChw in the VAE's dtype.
    """
    means, stds = [], []
    size = slice_size or max(len(images_BHWC), 1)
    for part_BHWC in images_BHWC.split(size):
        pictures = len(part_BHWC)
        if pictures < size:
            part_BHWC = torch.cat([part_BHWC, part_BHWC[-1:].expand(size - pictures, -1, -1, -1)])
        # 127.5 and not 255 with 2: one rounding fewer in half precision.
        part_BCHW = (part_BHWC.permute(0, 3, 1, 2).to(torch.float32) / 127.5 - 1.0).to(vae.dtype)
        # The permuted pixels lie channels last, as convolutions like them; Ascend's want rows of a channel together.
        posterior = vae.encode(part_BCHW.contiguous() if device.is_npu(part_BCHW.device) else part_BCHW).latent_dist
        means.append(posterior.mean[:pictures])
        stds.append(posterior.std[:pictures])
    return torch.cat(means), torch.cat(stds)


def sample_latents(vae: Any, mean_BChw: Tensor, std_BChw: Tensor, noise_BChw: Tensor | None = None) -> Tensor:
    """fp32 latents_BChw as the U-Net trains on: a sample of the posterior, shifted and scaled by the VAE's config.

    Args:
        mean_BChw, std_BChw: from `encode_moments`.
        noise_BChw: standard normal noise: the latents are mean + std * noise, so they are a function of whatever the
            noise is a function of. None: the mean.
    """
    latents_BChw = mean_BChw.float()
    if noise_BChw is not None:
        latents_BChw = latents_BChw + std_BChw.float() * noise_BChw.float()
    # As the VAE leaves them, whoever they come from: the layout decides which kernels run in the U-Net.
    layout = torch.contiguous_format if device.is_npu(latents_BChw.device) else torch.channels_last
    return _normalise(vae, latents_BChw).contiguous(memory_format=layout)


@torch.no_grad()
def decode_latents(vae: Any, latents_BChw: Tensor, *, slice_size: int | None = None) -> Tensor:
    """The uint8 pictures images_BHWC of scaled latents, values outside the range clipped.

    Args:
        latents_BChw: as `encode_images` returns them, any float dtype, on the VAE's device.
        slice_size: latents that go through the VAE at once, all when None.
    """
    raw_BChw = _denormalise(vae, latents_BChw.float()).to(vae.dtype)
    parts = []
    for part_BChw in raw_BChw.split(slice_size or max(len(raw_BChw), 1)):
        picture_BCHW = vae.decode(part_BChw).sample.float()
        if not is_finite(picture_BCHW):
            logger.warning(
                "the VAE decodes latents to numbers that are NaN or infinite%s: such a picture is black in places",
                ": it overflows in fp16, use --no_half_vae or a --vae for fp16" if vae.dtype == torch.float16 else "",
            )
        parts.append(((picture_BCHW + 1.0) * 127.5).round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1))
    return torch.cat(parts).contiguous()


def _channel_statistics(vae: Any, like: Tensor) -> tuple[Tensor, Tensor] | None:
    """Mean and standard deviation per latent channel, for VAEs whose config has them; SDXL's has not."""
    mean, std = getattr(vae.config, "latents_mean", None), getattr(vae.config, "latents_std", None)
    if mean is None or std is None:
        return None
    return like.new_tensor(mean).view(1, -1, 1, 1), like.new_tensor(std).view(1, -1, 1, 1)


def _normalise(vae: Any, latents_BChw: Tensor) -> Tensor:
    statistics = _channel_statistics(vae, latents_BChw)
    if statistics is not None:
        return (latents_BChw - statistics[0]) * vae.config.scaling_factor / statistics[1]
    return (latents_BChw - (getattr(vae.config, "shift_factor", None) or 0.0)) * vae.config.scaling_factor


def _denormalise(vae: Any, latents_BChw: Tensor) -> Tensor:
    statistics = _channel_statistics(vae, latents_BChw)
    if statistics is not None:
        return latents_BChw * statistics[1] / vae.config.scaling_factor + statistics[0]
    return latents_BChw / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0.0)
