"""Linear layers and 3×3 convolutions, forward and backward, by the faster of the kernels that the CPU has for them.

On the CPU in fp32 torch takes linear layers to MKL and convolutions to oneDNN. Where oneDNN's matrix product can be
had it is the faster one for a linear layer's output and its input's gradient; where a convolution has few pixels and
many weights, their gradient is sooner had by a matrix product over the unfolded pixels (docs/measurements/
train_step.md). Everywhere else torch's own choice stands.
Legend: M rows (tokens), K and N channels in and out of a linear layer; B batch, C and O channels in and out, H W rows
and columns.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library import device

KERNEL = 3  # rows and columns of the convolutions here, padded by one
FEW_PIXELS = 128
MANY_WEIGHTS = 2**21


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear` without a record for backward: x (…, K) -> (…, N)."""
    if _plain_on_cpu(x, weight_NK):
        return _onednn(x, weight_NK, bias_N)
    return F.linear(x, weight_NK, bias_N)


def linear_input_gradient(grad: Tensor, weight_NK: Tensor) -> Tensor:
    """The gradient (…, K) to a linear layer's input."""
    return linear(grad, weight_NK.t())


def linear_weight_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient (N, K) to a linear layer's weight."""
    grad_MN, x_MK = grad.flatten(0, -2), x.flatten(0, -2)
    return grad_MN.t() @ x_MK


def bias_gradient(grad: Tensor) -> Tensor:
    """The gradient (N,) to a linear layer's bias."""
    return grad.flatten(0, -2).sum(0)


class _Linear(torch.autograd.Function):
    """A linear layer; keeps its input and weight, as torch's."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight_NK)
        return linear(x, weight_NK, bias_N)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_NK = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        return (
            linear_input_gradient(grad, weight_NK) if for_x else None,
            linear_weight_gradient(grad, x) if for_weight else None,
            bias_gradient(grad) if for_bias else None,
        )


class Linear(nn.Linear):
    """torch's linear layer, on oneDNN where that is the faster: in fp32 on the CPU, without autocast."""

    def forward(self, x: Tensor) -> Tensor:
        if not _plain_on_cpu(x, self.weight) or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def convolution(x_BCHW: Tensor, weight_OCkk: Tensor, bias_O: Tensor | None) -> Tensor:
    """A 3×3 convolution, padded by one, without a record for backward."""
    return F.conv2d(x_BCHW, weight_OCkk, bias_O, padding=1)


def convolution_gradients(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to input, weight and bias of `convolution`, those that are wanted."""
    unfold = wanted[1] and _few_pixels_for_many_weights(x_BCHW, weight_OCkk)
    rest = (wanted[0], wanted[1] and not unfold, wanted[2])
    for_x, for_weight, for_bias = torch.ops.aten.convolution_backward(
        grad_BOHW, x_BCHW, weight_OCkk, [len(weight_OCkk)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1, rest
    )
    if unfold:
        pixels = F.unfold(x_BCHW, KERNEL, padding=1).transpose(0, 1).flatten(1)  # (C·9, B·H·W)
        for_weight = (grad_BOHW.transpose(0, 1).flatten(1) @ pixels.t()).view_as(weight_OCkk)
    return for_x, for_weight, for_bias


def _few_pixels_for_many_weights(x_BCHW: Tensor, weight_OCkk: Tensor) -> bool:
    pixels = len(x_BCHW) * x_BCHW.shape[2] * x_BCHW.shape[3]
    return pixels <= FEW_PIXELS and weight_OCkk.numel() >= MANY_WEIGHTS and _plain_on_cpu(x_BCHW, weight_OCkk)


def _plain_on_cpu(*tensors: Tensor) -> bool:
    return all(type(one) in _PLAIN and device.is_cpu(one.device) and one.dtype == torch.float32 for one in tensors)


_PLAIN = (Tensor, nn.Parameter)  # no subclass, such as a sharded one


def _onednn(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not _HAS_ONEDNN:
        return F.linear(x, weight_NK, bias_N)
    return torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")


# torch's own compiler takes linear layers to oneDNN by this operator; a build without oneDNN has it not.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
