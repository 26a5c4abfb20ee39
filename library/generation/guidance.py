"""Classifier-free guidance around a denoiser whose conditions are fixed.

Legend: B batch, C channels, H W latent rows and columns, T text tokens, V vector conditions.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans, 2207.12598, equation 6) around a U-Net with its conditions fixed.

    Row 0 of the conditions is the prompt, row 1 the negative prompt; at scale 1 only row 0 is computed.
    """

    unet: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    context_2TC: Tensor
    vector_2V: Tensor | None  # None: the U-Net has no vector conditions
    scale: float

    def __call__(self, latents_BCHW: Tensor, t: Tensor) -> Tensor:
        """The guided prediction for one picture, (1, C, H, W) float32."""
        rows = 1 if self.scale == 1 else 2
        predicted = self.unet(
            latents_BCHW.repeat(rows, 1, 1, 1),
            t.reshape(1).expand(rows).to(latents_BCHW.device),
            self.context_2TC[:rows],
            None if self.vector_2V is None else self.vector_2V[:rows],
        ).float()
        if rows == 1:
            return predicted
        positive, negative = predicted.chunk(2)
        return negative + self.scale * (positive - negative)
