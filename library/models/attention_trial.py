"""Tries torch's and Ascend's fused attention once on a device, against the formula, before a run depends on it.

Ascend documents its fused attention for the Atlas A2 products, and torch's SDPA goes there, too, in fp32 and with heads
of up to 512. Where it fails or is wrong on another device, the run goes by the formula and says so.
Legend: B batch, T tokens, N heads, D head size.
"""

import logging

import torch
from torch import Tensor

from library import device as devices
from library.models.attention import BACKENDS

logger = logging.getLogger(__name__)

_TOKENS, _HEADS = 48, 2
# Norm of the error over the norm of the result: a few roundings of the format.
_TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2, torch.float32: 1e-2}


def failure(backend: str, device: torch.device, dtype: torch.dtype, head_size: int, backward: bool) -> str | None:
    """What is wrong with a backend's attention on an Ascend NPU; None where nothing is, and on other devices.

    Args:
        backward: gradients are tried, too.
    """
    if not devices.is_npu(device) or devices.is_before_910b1(device):
        return None
    try:
        tried, formula = (_results(name, device, dtype, head_size, backward) for name in (backend, "math"))
    except RuntimeError as error:
        return str(error).splitlines()[0][:200]
    for got, want, what in zip(tried, formula, ("output", "query's gradient", "key's", "value's"), strict=False):
        apart = ((got.float() - want.float()).norm() / want.float().norm()).item()
        if not apart <= _TOLERANCES[dtype]:  # NaN, too
            return f"its {what} differs from the formula's by {apart:.2g} of its norm"
    return None


def usable(backend: str, device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """The backend to train with: the one that is asked for, or the formula, with a warning, where that one fails."""
    if BACKENDS[backend].refusal(*_inputs(device, dtype, head_size)) is not None:
        return backend  # it is not what runs; the run's first call says so
    wrong = failure(backend, device, dtype, head_size, backward=True)
    if wrong is None:
        return backend
    logger.warning(
        "attention backend %s was tried on %s and is not used: %s; the formula runs instead, which keeps the whole "
        "matrix of scores in memory",
        backend,
        devices.device_name(device),
        wrong,
    )
    return "math"


def _results(
    backend: str, device: torch.device, dtype: torch.dtype, head_size: int, backward: bool
) -> tuple[Tensor, ...]:
    """Output and gradients of one call; no random number is drawn."""
    inputs = _inputs(device, dtype, head_size)
    with torch.enable_grad(), devices.without_autocast(device.type):
        for part in inputs:
            part.requires_grad_(backward)
        out_BTND = BACKENDS[backend].run(*inputs)
        return (out_BTND, *(torch.autograd.grad(out_BTND, inputs, inputs[0].detach()) if backward else ()))


def _inputs(device: torch.device, dtype: torch.dtype, head_size: int) -> tuple[Tensor, ...]:
    """Query, key and value (B, T, N, D) between -1 and 1."""
    shape = (1, _TOKENS, _HEADS, head_size)
    count = _TOKENS * _HEADS * head_size
    values = torch.sin(torch.arange(3 * count, dtype=torch.float32) ** 1.5)
    return tuple(part.view(shape).to(device, dtype) for part in values.split(count))
