"""Moving averages of the weights against diffusers' EMAModel."""

import pytest
import torch
from diffusers.training_utils import EMAModel
from torch import nn

from library.training.engine.ema import Averages


def parameters() -> dict[str, nn.Parameter]:
    torch.manual_seed(0)
    return {name: nn.Parameter(torch.randn(shape)) for name, shape in (("weight", (3, 4)), ("bias", (4,)))}


@pytest.mark.parametrize("decay", [0.3, 0.9999])
@pytest.mark.parametrize("device", [None, torch.device("cpu")])
def test_the_averages_are_those_of_diffusers(decay, device):
    named = parameters()
    own, theirs = Averages(named, decay, device), EMAModel(list(named.values()), decay=decay)
    for step in range(20):
        with torch.no_grad():
            for parameter in named.values():
                parameter += torch.randn(parameter.shape)
        own.update()
        theirs.step(list(named.values()))
        for mine, other in zip(own.averages.values(), theirs.shadow_params, strict=True):
            torch.testing.assert_close(mine, other, msg=lambda m, s=step: f"step {s}: {m}")


def test_an_exchange_puts_averages_in_place_and_a_second_one_is_as_before():
    named = parameters()
    averages = Averages(named, 0.5)
    with torch.no_grad():
        named["weight"] += 1
    averages.update()
    weights = {name: one.detach().clone() for name, one in named.items()}
    kept = {name: one.clone() for name, one in averages.averages.items()}
    averages.exchange()
    assert all(torch.equal(named[name], kept[name]) for name in named)
    averages.exchange()
    assert all(torch.equal(named[name], weights[name]) for name in named)
    assert all(torch.equal(averages.averages[name], kept[name]) for name in named)
