"""GELU in its erf form on every device, alone and as the feed-forward's gated unit (Hendrycks & Gimpel, 1606.08415).

On Ascend torch's own gelu computes the tanh form whatever is asked, up to 5e-4 off; published weights were trained with
the erf form. torch_npu's operators compute either.
Legend: B batch, L tokens, N channels of each half.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from library import device as devices

_ERF = 0  # npu_geglu's number for it; 1 is tanh


class Gelu(nn.Module):
    """GELU as a layer."""

    def forward(self, x: Tensor) -> Tensor:
        """x Φ(x), with Φ the standard normal distribution function."""
        return gelu(x)


def gelu(x: Tensor) -> Tensor:
    """x Φ(x), differentiable."""
    torch_npu = devices.torch_npu_of(x.device)
    return F.gelu(x) if torch_npu is None else torch_npu.npu_gelu(x, approximate="none")


def geglu(inner_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """value · gelu(gate), differentiable, and gelu(gate); value and gate are the halves of the channels.

    Shazeer 2020 (2002.05202), equation 6.
    """
    if _stands_for_fused(inner_BLN):
        half = (*inner_BLN.shape[:-1], inner_BLN.shape[-1] // 2)
        return inner_BLN.new_empty(half), inner_BLN.new_empty(half)
    torch_npu = devices.torch_npu_of(inner_BLN.device)
    if torch_npu is None or not devices.has_fused_geglu(inner_BLN.device):
        value, gate = inner_BLN.chunk(2, dim=-1)
        active = gelu(gate)
        return value * active, active
    return torch_npu.npu_geglu(inner_BLN, -1, _ERF)


def geglu_gradient(grad_BLN: Tensor, inner_BLN: Tensor, active_BLN: Tensor) -> Tensor:
    """The gradient to what `geglu` took, of the gradient to its first result, which is overwritten, and its second."""
    if _stands_for_fused(inner_BLN):
        return torch.empty_like(inner_BLN)
    torch_npu = devices.torch_npu_of(inner_BLN.device)
    if torch_npu is not None and devices.has_fused_geglu(inner_BLN.device):
        return torch_npu.npu_geglu_grad(grad_BLN, inner_BLN, active_BLN, -1, _ERF)
    value, gate = inner_BLN.chunk(2, dim=-1)
    grad_value = grad_BLN * active_BLN
    grad_active = grad_BLN.mul_(value)
    if torch_npu is None:
        grad_gate = torch.ops.aten.gelu_backward(grad_active, gate)
    else:
        grad_gate = torch_npu.npu_gelu_backward(grad_active, gate, approximate="none")
    return torch.cat([grad_value, grad_gate], dim=-1)


_assumed = False  # whether tensors without data stand for those of a device that has the gated unit as one operator


@contextmanager
def assume_fused_geglu(there: bool) -> Iterator[None]:
    """For tensors on the meta device: hold what a device holds that has the gated unit as one operator."""
    global _assumed
    before, _assumed = _assumed, there
    try:
        yield
    finally:
        _assumed = before


def _stands_for_fused(inner_BLN: Tensor) -> bool:
    """Without data and inside of an autograd function, which needs shapes alone."""
    return _assumed and inner_BLN.is_meta and not torch.is_grad_enabled()
