"""Dropout masks as a pure function of (seed, step, batch index, module), never of a generator's history.

torch's dropout draws from a generator's history, so a block that gradient checkpointing computes again would drop other
values, and so would another number of ranks or a resumed run. Here a mask is made of integers that are hashed on the
device: the same on every device, whenever and wherever it is made. `library.keyed_random` keys each sample once a step;
the names of modules and the positions of values are hashed into that by the finaliser of MurmurHash3 (Appleby 2011).
Legend: B samples.
"""

import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import cache

import numpy as np
import torch
from torch import Tensor

from library.keyed_random import Stream, generator

_BITS = 31  # of a hash that decide: torch has signed integers only
_MULTIPLIERS = (0x85EBCA6B, 0xC2B2AE35)  # MurmurHash3's


@dataclass
class Draws:
    """What keys the masks of one micro-batch.

    Attributes:
        keys_B2: two 32-bit integers a sample.
        step_keys: two 32-bit integers, the same for all samples of the step.
    """

    keys_B2: Tensor
    step_keys: tuple[int, int]
    _copies: dict[torch.device, Tensor] = field(default_factory=dict)

    def keys_on(self, device: torch.device) -> Tensor:
        """keys_B2 on that device, copied there once."""
        if device not in self._copies:
            self._copies[device] = self.keys_B2.to(device)
        return self._copies[device]


_current: Draws | None = None


@contextmanager
def draws(seed: int, step: int, indices_B: Sequence[int]) -> Iterator[None]:
    """Within this, masks are those of a step for the samples of these batch indices.

    The training step sets it around forward and backward of each micro-batch. The U-Net's checkpointed blocks are
    computed again with the draws of their forward, wherever backward runs.
    """
    keys = [generator(seed, Stream.DROPOUT, step, index).integers(2**32, size=2) for index in indices_B]
    one, other = generator(seed, Stream.DROPOUT, step, 0, 1).integers(2**32, size=2)  # the last 1: not of a sample
    keys_B2 = torch.from_numpy(np.array(keys, np.uint32).reshape(-1, 2).view(np.int32))
    with _set(Draws(keys_B2, (int(one), int(other)))):
        yield


def checkpoint_contexts() -> tuple[AbstractContextManager, AbstractContextManager]:
    """For `torch.utils.checkpoint`'s `context_fn`: what is computed again draws as it did in forward."""
    return nullcontext(), nullcontext() if _current is None else _set(_current)


def keep_mask(module: str, probability: float, rows: int, shape: Sequence[int], device: torch.device) -> Tensor:
    """(rows, *shape), True for what is kept: each value is dropped with that probability, for itself.

    Args:
        module: the module's name, as in `named_modules()`; different names have independent masks.
        rows: length of the first dimension, the number of samples times a number of rows a sample (a caption's chunks).
        shape: of one row; its dimensions may be 1 where whole channels or ranks are dropped.

    Raises:
        RuntimeError: no `draws` are set, or the rows are not a multiple of their samples.
    """
    return _make_mask(module, probability, rows, shape, device)


def is_kept(module: str, probability: float) -> bool:
    """Whether a module takes part in this step, for all samples of the global batch alike.

    It is dropped with that probability. The answer is Python's, so that a dropped module need not be computed.

    Raises:
        RuntimeError: no `draws` are set.
    """
    return _decide(module, probability)


def keep_out_of_graphs() -> None:
    """Before anything is compiled: masks are made between compiled graphs, which would else be made anew every step."""
    global _make_mask, _decide
    _make_mask, _decide = torch.compiler.disable(_mask), torch.compiler.disable(_decision)


def _mask(module: str, probability: float, rows: int, shape: Sequence[int], device: torch.device) -> Tensor:
    current = _now()
    samples = len(current.keys_B2)
    if samples == 0 or rows % samples:
        raise RuntimeError(f"{module}: {rows} rows for dropout, of {samples} samples that the training step named")
    first, second = _module_keys(module)
    keys_B2 = current.keys_on(device)
    index = torch.arange(rows // samples * math.prod(shape), dtype=torch.int32, device=device)
    hashed = _mixed(index ^ _mixed(keys_B2[:, :1] ^ _signed(first)))
    hashed = _mixed(hashed ^ _mixed(keys_B2[:, 1:] ^ _signed(second)))
    return ((hashed & (2**_BITS - 1)) > _last_dropped(probability)).view(rows, *shape)


def _decision(module: str, probability: float) -> bool:
    (first, second), (one, other) = _module_keys(module), _now().step_keys
    hashed = _mixed_int(_mixed_int(one ^ first) ^ _mixed_int(other ^ second))
    return (hashed & (2**_BITS - 1)) > _last_dropped(probability)


_make_mask: Callable[[str, float, int, Sequence[int], torch.device], Tensor] = _mask
_decide: Callable[[str, float], bool] = _decision


@contextmanager
def _set(chosen: Draws) -> Iterator[None]:
    # One variable for all threads: on a GPU, backward computes blocks again in a thread of autograd's.
    global _current
    before, _current = _current, chosen
    try:
        yield
    finally:
        _current = before


def _now() -> Draws:
    if _current is None:
        raise RuntimeError("dropout needs to know the step and its samples: set library.models.keyed_dropout.draws")
    return _current


@cache
def _module_keys(module: str) -> tuple[int, int]:
    digest = hashlib.blake2b(module.encode(), digest_size=8).digest()
    return int.from_bytes(digest[:4], "little"), int.from_bytes(digest[4:], "little")


def _mixed(x: Tensor) -> Tensor:
    """32-bit integers hashed; a right shift of signed integers brings copies of the sign, which are masked out."""
    for shift, multiplier in zip((16, 13), _MULTIPLIERS, strict=True):
        x = (x ^ ((x >> shift) & (2 ** (32 - shift) - 1))) * _signed(multiplier)
    return x ^ ((x >> 16) & 0xFFFF)


def _mixed_int(x: int) -> int:
    """The same of one integer."""
    for shift, multiplier in zip((16, 13), _MULTIPLIERS, strict=True):
        x = (x ^ (x >> shift)) * multiplier & 0xFFFFFFFF
    return x ^ (x >> 16)


def _signed(x: int) -> int:
    """The signed 32-bit integer of the same bits."""
    return x - 2**32 if x >= 2**31 else x


def _last_dropped(probability: float) -> int:
    """Hashes up to this one are dropped; -1, below all of them, for probability 0."""
    return round(probability * 2**_BITS) - 1
