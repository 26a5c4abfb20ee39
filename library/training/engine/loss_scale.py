"""Loss scaling in fp16 beside the scaler itself: its state in training states, and processes that agree on an overflow.

Which scaler a device has is `library.device.grad_scaler`'s.
"""

from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class ScalerState:
    """A scaler's state as a named object of training states, which any device's scaler can take up."""

    def __init__(self, scaler: Any) -> None:
        self._scaler = scaler

    def state_dict(self) -> dict[str, Any]:
        """What torch's scalers keep; torch_npu's `dynamic` is no state, for here every scaler adapts its scale."""
        return {key: value for key, value in self._scaler.state_dict().items() if key != "dynamic"}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Put it back, whichever device wrote it."""
        own = {"dynamic": True} if hasattr(self._scaler, "_dynamic") else {}
        self._scaler.load_state_dict({**state, **own})


def agree_on_overflow(scaler: Any) -> None:
    """Make a GradScaler skip a step on all processes if the gradients of one overflow.

    Each process looks at the gradients that it owns alone; what it may hold of the others' are not the true sums.
    torch_npu's scaler lowers its scale by a flag of its own (`_has_overflow`), which is set with the rest.
    """
    if scaler is None or getattr(scaler._unscale_grads_, "agreed", False):
        return
    unscale_own = scaler._unscale_grads_

    def unscale(optimizer: Any, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool) -> dict[torch.device, Tensor]:
        found = unscale_own(getattr(optimizer, "optim", optimizer), inv_scale, found_inf, allow_fp16)
        found.setdefault(found_inf.device, found_inf)  # a process that owns no gradient takes part, too
        for overflow in found.values():
            dist.all_reduce(overflow, op=dist.ReduceOp.MAX)
        if hasattr(scaler, "_has_overflow"):
            scaler._has_overflow = any(bool(overflow) for overflow in found.values())
        return found

    unscale.agreed = True  # type: ignore[attr-defined]
    scaler._unscale_grads_ = unscale
