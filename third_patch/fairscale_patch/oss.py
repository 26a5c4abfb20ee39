"""fairscale's OSS (ZeRO stage 1): gradients stay in their flat buckets, and buffers follow the parameters' device."""

import weakref
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from third_patch.registry import Patch

_wrappers: "weakref.WeakKeyDictionary[Any, Any]" = weakref.WeakKeyDictionary()


def bind(optimizer: Any, wrapper: nn.Module) -> None:
    """Register the ShardedDataParallel of an OSS, so that `zero_grad` keeps the gradients in its buckets."""
    _wrappers[optimizer] = weakref.ref(wrapper)


def _zero_grad(original: Callable[..., Any]) -> Callable[..., Any]:
    def zero_grad(self: Any, set_to_none: bool = True) -> None:
        """Clear the gradients: gradients in a flat bucket become zero in place, the others None if `set_to_none`."""
        wrapper = _wrappers.get(self)
        module = wrapper() if wrapper is not None else None
        if module is not None:
            module.zero_grad(set_to_none=set_to_none)
        else:
            original(self, set_to_none=False)

    return zero_grad


def _refresh_trainable(original: Callable[..., Any]) -> Callable[..., Any]:
    def refresh_trainable(self: Any) -> None:
        """Make partition and buffers anew for the current parameters, on the parameters' current device."""
        known = getattr(self, "_default_device", None)
        now = self.param_groups[0]["params"][0].device
        if hasattr(self, "optim") and known is not None and known != now:
            self._clear_cache()
            _move_state(self.optim, now)
        original(self)

    return refresh_trainable


def _move_state(optimizer: torch.optim.Optimizer, device: torch.device) -> None:
    for state in optimizer.state.values():
        for name, value in state.items():
            if isinstance(value, torch.Tensor) and value.dim():  # a step counter may stay on the CPU
                state[name] = value.to(device)


PATCHES = (
    Patch(
        target="fairscale.optim.oss:OSS.zero_grad",
        why="torch sets gradients to None by default; they would leave ShardedDataParallel's flat buckets, and each "
        "process would go on with its own gradients",
        versions="==0.4.13",
        signature="(self, set_to_none=True)",
        replace=_zero_grad,
        remove_when="fairscale's OSS zeroes in place (the project is archived: when oss is given up for zero1 or fsdp)",
    ),
    Patch(
        target="fairscale.optim.oss:OSS.refresh_trainable",
        why="its caches name the device on which OSS was made; a module that is moved afterwards, to an NPU say, would "
        "be pulled back by its flat buffers",
        versions="==0.4.13",
        signature="(self)",
        replace=_refresh_trainable,
        remove_when="as above",
    ),
)
