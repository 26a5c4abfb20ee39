"""From noise to latents: a sampler's steps with a denoiser.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Callable
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor


def sample_latents(
    denoise: Callable[[Tensor, Tensor], Tensor],
    sampler: Any,
    shape_CHW: tuple[int, int, int],
    random: np.random.Generator,
    device: torch.device,
) -> Tensor:
    """The latents (1, C, H, W) of one picture.

    All noise comes from the CPU, so that a seed means the same picture on every device.

    Args:
        denoise: from latents (1, C, H, W) and a timestep to the prediction.
        sampler: a scheduler of diffusers whose timesteps are set.
        random: draws the seed of the sampler's own noise, then the noise at the start.
    """
    torch_generator = torch.Generator().manual_seed(int(random.integers(2**63)))
    noise_CHW = random.standard_normal(shape_CHW, dtype=np.float32)
    latents_BCHW = torch.from_numpy(noise_CHW)[None].to(device) * sampler.init_noise_sigma
    extra = {"generator": torch_generator} if "generator" in signature(sampler.step).parameters else {}
    for t in sampler.timesteps:
        predicted_BCHW = denoise(sampler.scale_model_input(latents_BCHW, t), t)
        latents_BCHW = sampler.step(predicted_BCHW, t, latents_BCHW, **extra).prev_sample
    return latents_BCHW
