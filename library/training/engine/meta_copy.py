"""Copies of modules on torch's meta device: shapes without data."""

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

Module = TypeVar("Module", bound=nn.Module)


def without_data(
    module: Module, dtype: torch.dtype | None = None, share: Callable[[Tensor], bool] = lambda tensor: False
) -> Module:
    """A copy of a module on the meta device, without its data.

    Args:
        dtype: of its floating-point tensors; None keeps each tensor's own.
        share: which parameters and buffers the copy has in common with the module, data and all.
    """

    def shape_of(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): tensor if share(tensor) else shape_of(tensor) for tensor in tensors})
