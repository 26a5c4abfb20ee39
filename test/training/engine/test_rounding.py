"""Stochastic rounding: right in the mean, to a neighbour, and the same bits wherever an element is."""

import math

import pytest
import torch

from library.training.engine.rounding import RoundingBits, places_from, rounding_key, stochastic

CPU = torch.device("cpu")
DRAWS = 2**14


def bits(count, seed=1, update=0, first=0, number=0):
    return RoundingBits(places_from(first, count, CPU), rounding_key(seed, update)).draw(number).clone()


def neighbours(value):
    """bf16's values below and above an fp32 value, by torch's rounding to the nearest and a step from there."""
    nearest = torch.tensor(value).bfloat16()
    step = (nearest.view(torch.int16) + (1 if (nearest.float() < value) == (value > 0) else -1)).view(torch.bfloat16)
    return sorted((float(nearest), float(step)))


@pytest.mark.parametrize("value", [1.001, -1.001, 0.3, -7.3e-5, 123.456, 1e-39, 3e38])
@pytest.mark.parametrize("number", [0, 1, 2, 3])
def test_the_mean_is_the_value_and_each_result_a_neighbour(value, number):
    values = torch.full((DRAWS,), value)
    rounded = stochastic(values, bits(DRAWS, number=number)).double()
    exact, (low, high) = float(values[0]), neighbours(value)
    assert set(rounded.tolist()) == {low, high}
    share = (exact - low) / (high - low)
    standard_error = (high - low) * math.sqrt(share * (1 - share) / DRAWS)
    assert abs(float(rounded.mean()) - exact) < 4 * standard_error


def test_what_bf16_has_stays():
    every = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(torch.bfloat16)
    rounded = stochastic(every.float(), bits(len(every)))
    numbers = ~every.isnan()
    assert torch.equal(rounded[numbers], every[numbers]) and bool(rounded[~numbers].isnan().all())
    assert int((~numbers).sum()) == 2 * 127


def test_every_nan_stays_one():
    payloads = torch.tensor([0x7F800001, 0x7FFFFFFF, -1, -0x7FFFFF], dtype=torch.int32).view(torch.float32)
    assert bool(stochastic(payloads, torch.full((4,), 0xFFFF, dtype=torch.int32)).isnan().all())


def test_bits_hang_on_seed_update_and_place_alone():
    whole = bits(1000, 5, 7)
    assert torch.equal(whole[300:700], bits(400, 5, 7, first=300))
    assert torch.equal(bits(20, first=2**32 - 10)[10:], bits(10))  # more elements than places: they come round
    for other in (bits(1000, 6, 7), bits(1000, 5, 8), bits(1000, 5, 7, number=1), bits(1000, 5, 7, first=1000)):
        assert float((whole == other).float().mean()) < 0.01


def test_bits_are_evenly_spread_and_do_not_go_together():
    """Chi-squared over 256 bins (expected 255, standard deviation 22.6), and correlations below 5 standard errors."""
    draws = [bits(2**18, 3, update, number=number) for update in (0, 1) for number in (0, 1, 2)]
    draws.append(bits(2**18, 3, 0, first=1))
    for draw in draws:
        for byte in (draw >> 8, draw & 255):
            counts = torch.bincount(byte, minlength=256).double()
            assert abs(float(((counts - 1024) ** 2 / 1024).sum()) - 255) < 5 * 22.6
    correlations = torch.corrcoef(torch.stack(draws).double()) - torch.eye(len(draws))
    assert float(correlations.abs().max()) < 5 / math.sqrt(2**18)
