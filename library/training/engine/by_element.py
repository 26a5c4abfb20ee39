"""Whether an optimizer updates each number by itself, found by trying."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.training.engine.group_entries import changed, entries, train_mode

_COUNT, _WIDTH, _STEPS = 24, 4, 12
Construct = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def updates_by_element(construct: Construct) -> bool:
    """Whether each number's update needs its own gradient and state alone, so that rows may lie on several processes.

    Args:
        construct: makes the optimizer over parameters.
    """
    try:
        (whole,), parts = _stepped(construct, [slice(None)]), _stepped(construct, [slice(0, 8), slice(8, None)])
        return _same(whole, parts)
    except Exception:  # whatever an optimizer of somebody raises, it does not update so
        return False


@dataclass(frozen=True)
class _Part:
    """Some numbers and their optimizer's states after some steps.

    Attributes:
        numbers: weights and states that have a number for each of them, flat.
        others: states that the numbers share: the same for all parts of a parameter.
    """

    numbers: dict[str, Tensor]
    others: list[Any]


def _same(whole: _Part, parts: Sequence[_Part]) -> bool:
    """Whether the parts are the whole, to rounding: kernels compute the numbers at a vector's end in another way."""
    if any(part.numbers.keys() != whole.numbers.keys() or part.others != whole.others for part in parts):
        return False
    return all(
        torch.allclose(torch.cat([part.numbers[name] for part in parts]), whole.numbers[name], rtol=1e-4, atol=1e-7)
        for name in whole.numbers
    )


def _stepped(construct: Construct, cuts: Sequence[slice]) -> list[_Part]:
    """Parts of a parameter, each of which had an optimizer of its own."""
    start = torch.randn(_COUNT, generator=torch.Generator().manual_seed(0)) / 10
    parameters = [nn.Parameter(start[cut].clone().view(-1, _WIDTH)) for cut in cuts]
    optimizers = [construct([parameter]) for parameter in parameters]
    made_with = [entries(optimizer.param_groups[0]) for optimizer in optimizers]
    for optimizer in optimizers:
        train_mode(optimizer)
    for step in range(_STEPS):
        scale = (1.0, 10.0, 0.1)[step % 3] * torch.linspace(0.1, 3.0, _COUNT)
        gradient = scale * torch.randn(_COUNT, generator=torch.Generator().manual_seed(step))
        for cut, parameter, optimizer in zip(cuts, parameters, optimizers, strict=True):
            parameter.grad = gradient[cut].clone().view(parameter.shape)
            optimizer.step()
    return [
        _part(parameter, optimizer, changed(made, optimizer.param_groups[0]))
        for parameter, optimizer, made in zip(parameters, optimizers, made_with, strict=True)
    ]


def _part(parameter: nn.Parameter, optimizer: torch.optim.Optimizer, group: Mapping[str, Any]) -> _Part:
    numbers = {"weight": parameter.detach().reshape(-1)}
    others: list[Any] = [sorted(group.items(), key=lambda item: item[0])]
    for name, value in optimizer.state[parameter].items():
        if isinstance(value, Tensor) and value.shape == parameter.shape:
            numbers[name] = value.reshape(-1).float()
        else:
            others.append((name, value.tolist() if isinstance(value, Tensor) else value))
    return _Part(numbers, others)
