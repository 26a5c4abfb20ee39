"""Random numbers as a pure function of (seed, purpose, counters), never of a generator's history.

A counter-based generator (Philox 4x64, Salmon et al., "Parallel Random Numbers: As Easy as 1, 2, 3", SC 2011) is keyed
by seed and purpose and started at a counter made of up to three integers (usually step and batch index).
So any rank, any worker and any resumed run draws the same numbers for the same sample, whatever was drawn before.
"""

from enum import IntEnum

import numpy as np

_WORD = 1 << 64


class Stream(IntEnum):
    """The purpose of a random number. The values are part of the reproducibility contract: never renumber them."""

    NOISE = 1
    TIMESTEP = 2
    VAE = 3
    CAPTION = 4
    CROP = 5
    ORDER = 6
    REPLACEMENT = 7
    PREVIEW = 8
    AUGMENTATION = 9
    MODEL_INIT = 10
    SOURCES = 11
    VALIDATION = 12
    VALIDATION_ORDER = 13
    VALIDATION_NOISE = 14
    VALIDATION_VAE = 15
    ROUNDING = 16
    DROPOUT = 17


def generator(seed: int, stream: Stream, *counters: int) -> np.random.Generator:
    """A NumPy generator for a seed, a purpose and counters.

    Args:
        seed: 0 <= seed < 2**64.
        counters: up to three non-negative integers, for example (step, batch index).
    """
    if len(counters) > 3:
        raise ValueError(f"at most three counters, got {len(counters)}")
    if not 0 <= seed < _WORD:
        raise ValueError(f"seed must lie in 0 .. 2**64 - 1, got {seed}")
    key = seed + (int(stream) << 64)
    # The lowest 64-bit word is left at 0: the generator itself counts there while it draws.
    counter = sum(int(value) << (64 * (index + 1)) for index, value in enumerate(counters))
    return np.random.Generator(np.random.Philox(key=key, counter=counter))
