"""Rounding fp32 to bf16 so that what is smaller than bf16's spacing is not lost: up or down at random, by how near.

bf16 is the upper half of fp32: with a random number of 16 bits added to the lower half, which is then cut off, a value
goes to its upper neighbour as often as it is near to it. So the rounded value's mean is the value (Croci et al. 2022,
"Stochastic rounding: implementation, error analysis and applications"); rounded to the nearest, a step that is smaller
than half the spacing (2^-9 of a weight, about) leaves the weight as it was, every time.

The random bits are a function of the key (seed and number of the update) and of the element's place among all that
trains: 32-bit integer arithmetic that gives the same on every device, however the elements are dealt out or put
together. The function is a bijection of place and key with good avalanche, C. Wellons' "lowbias32".
"""

import functools
from dataclasses import dataclass

import torch
from torch import Tensor

from library import device as devices
from library.errors import TrainingError
from library.keyed_random import Stream, generator

_LOW_HALF, _HIGH_HALF = 0xFFFF, -0x10000  # of 32 bits
_MULTIPLIERS = 0x7FEB352D, 0x846CA68B - 2**32  # lowbias32's, the second as a signed integer
_ODD = 0x9E3779B9 - 2**32  # 2^32 over the golden ratio: makes further words of one


@dataclass(frozen=True)
class RoundingKey:
    """What the random bits of one update hang on, besides the place."""

    first: int
    second: int


@functools.lru_cache(maxsize=4)
def rounding_key(seed: int, update: int) -> RoundingKey:
    """That of an update, counted from 0."""
    first, second = generator(seed, Stream.ROUNDING, update).integers(-(2**31), 2**31, size=2).tolist()
    return RoundingKey(first, second)


class RoundingBits:
    """16 random bits for each of some elements; several draws, of which each has bits of its own."""

    def __init__(self, places: Tensor, key: RoundingKey) -> None:
        """`places`: (N,) int32, each element's place among all that trains; they are overwritten."""
        words = places.bitwise_xor_(key.first)
        scratch = torch.empty_like(words)
        _xor_shifted(words, 16, scratch)
        words.mul_(_MULTIPLIERS[0]).bitwise_xor_(key.second)
        _xor_shifted(words, 15, scratch)
        words.mul_(_MULTIPLIERS[1])
        _xor_shifted(words, 16, scratch)
        self._words, self._scratch = words, scratch

    def draw(self, number: int) -> Tensor:
        """(N,) int32, 0 to 2^16 - 1, good until the next draw. Number 0 has a word's lower half, 1 its upper one.

        Those from 2 on have the upper half of the word times an odd number, which is another bijection of it.
        """
        if number == 0:
            return torch.bitwise_and(self._words, _LOW_HALF, out=self._scratch)
        factor = _signed(pow(_ODD, number - 1, 2**32))
        torch.mul(self._words, factor, out=self._scratch)
        return _shifted(self._scratch, 16, self._scratch).bitwise_and_(_LOW_HALF)


def stochastic(values: Tensor, bits: Tensor) -> Tensor:
    """fp32 values rounded to bf16, to the neighbour away from zero with the probability of being near to it.

    A value that bf16 has stays what it is, infinities and NaN too. One beyond bf16's largest may become infinite, as
    by rounding to the nearest.

    Args:
        bits: int32 of the values' shape, evenly spread over 0 to 2^16 - 1; they are overwritten.
    """
    cut = bits.add_(values.view(torch.int32)).bitwise_and_(_HIGH_HALF).view(torch.float32).bfloat16()
    return cut.masked_fill_(values != values, torch.nan)  # which the sum may have carried into something else


def places_from(first: int, count: int, device: torch.device) -> Tensor:
    """(count,) int32: that many places from `first` on, modulo 2^32."""
    return torch.arange(count, dtype=torch.int32, device=device).add_(_signed(first))


@functools.lru_cache(maxsize=1)
def check_integers(device: torch.device) -> None:
    """Make sure that a device's 32-bit integers wrap as the CPU's do, or the bits would not be random.

    Raises:
        TrainingError: they do not.
    """
    if devices.is_cpu(device):
        return
    key = RoundingKey(-123456789, 987654321)
    cpu = torch.device("cpu")
    for first in (0, 2**31 - 512):
        mine, theirs = (RoundingBits(places_from(first, 1024, one), key) for one in (device, cpu))
        for number in range(3):
            if not torch.equal(mine.draw(number).cpu(), theirs.draw(number)):
                raise TrainingError(
                    f"{devices.device_name(device)} does not compute with 32-bit integers as the CPU does, on which "
                    "stochastic rounding rests; train without --full_bf16"
                )


def _xor_shifted(words: Tensor, bits: int, scratch: Tensor) -> None:
    """words ^= words >> bits, the words taken without a sign."""
    words.bitwise_xor_(_shifted(words, bits, scratch).bitwise_and_(2 ** (32 - bits) - 1))


def _shifted(words: Tensor, bits: int, out: Tensor) -> Tensor:
    """words >> bits with the sign kept, in `out`."""
    return torch.bitwise_right_shift(words, _number(bits, words.device), out=out)


@functools.lru_cache(maxsize=16)
def _number(value: int, device: torch.device) -> Tensor:
    """A 32-bit integer on the device. From Python's, torch makes one of 64 bits, which Ascend's operator may refuse."""
    return torch.tensor(value, dtype=torch.int32, device=device)


def _signed(word: int) -> int:
    """The 32-bit integer with a sign that has the same bits."""
    return (word + 2**31) % 2**32 - 2**31
