"""The random numbers of a training step: each is a function of (seed, step, batch index) only.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from library.keyed_random import Stream, generator


def normal(
    seed: int, stream: Stream, step: int, batch_indices: Iterable[int], shape_CHW: tuple[int, int, int]
) -> Tensor:
    """Standard normal numbers, (B, C, H, W) float32 on the CPU, drawn independently for each batch index."""
    draws = [
        generator(seed, stream, step, index).standard_normal(shape_CHW, dtype=np.float32) for index in batch_indices
    ]
    return torch.from_numpy(np.stack(draws))


def timesteps(seed: int, step: int, batch_indices: Iterable[int], count: int) -> Tensor:
    """Uniform timesteps in 0 .. count - 1, (B,) int64 on the CPU."""
    return torch.tensor([int(generator(seed, Stream.TIMESTEP, step, index).integers(count)) for index in batch_indices])
