"""The random numbers of a training step: each a function of (seed, step, place in the global batch) alone.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from library.keyed_random import Stream, generator


def normal(seed: int, stream: Stream, step: int, places: Iterable[int], shape_CHW: tuple[int, int, int]) -> Tensor:
    """Standard normal numbers, (B, C, H, W) float32 on the CPU, one independent draw a place."""
    draws = [generator(seed, stream, step, place).standard_normal(shape_CHW, dtype=np.float32) for place in places]
    return torch.from_numpy(np.stack(draws))


def timesteps(seed: int, step: int, places: Iterable[int], count: int) -> Tensor:
    """Uniform timesteps in 0 .. count - 1, (B,) int64 on the CPU."""
    return torch.tensor([int(generator(seed, Stream.TIMESTEP, step, place).integers(count)) for place in places])
