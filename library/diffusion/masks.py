"""Masks of images become weights of the loss, which is computed on latents.

Legend: B batch, H W rows and columns of the image or of its latents.
"""

from collections.abc import Sequence

from torch import Tensor, nn


def latent_weights(masks_BHW: Tensor, latent_hw: Sequence[int]) -> Tensor:
    """The mean of the mask over each latent pixel, (B, 1, H, W) float32 in 0 .. 1.

    The loss stays a mean over all latent pixels: an image that is mostly masked out contributes little.

    Args:
        masks_BHW: uint8; 255 gives the loss its full weight.
        latent_hw: rows and columns of the latents.
    """
    return nn.functional.interpolate(masks_BHW[:, None].float() / 255, size=list(latent_hw), mode="area")
