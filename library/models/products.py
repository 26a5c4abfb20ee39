"""Linear layers and 3×3 convolutions, forward and backward, by the faster of the kernels that the CPU has for them.

On the CPU in fp32 torch takes linear layers to MKL and convolutions to oneDNN. Where oneDNN's matrix product can be
had it is the faster one for a linear layer's output and its input's gradient; where a convolution has few pixels and
many weights, their gradient is sooner had by a matrix product over the unfolded pixels (docs/measurements/
train_step.md). Everywhere else torch's own choice stands.
Legend: M rows (tokens), K and N channels in and out of a linear layer; B batch, C and O channels in and out, H W rows
and columns.
"""

from collections.abc import Sequence
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
    if torch.compiler.is_compiling():
        return _opaque_gradients(grad_BOHW, x_BCHW, weight_OCkk, wanted)
    unfold = wanted[1] and _few_pixels_for_many_weights(x_BCHW, weight_OCkk)
    rest = (wanted[0], wanted[1] and not unfold, wanted[2])
    for_x, for_weight, for_bias = _convolution_backward(grad_BOHW, x_BCHW, weight_OCkk, rest)
    if unfold:
        pixels = F.unfold(x_BCHW, KERNEL, padding=1).transpose(0, 1).flatten(1)  # (C·9, B·H·W)
        for_weight = (grad_BOHW.transpose(0, 1).flatten(1) @ pixels.t()).view_as(weight_OCkk)
    return for_x, for_weight, for_bias


class PointwiseConvolution(nn.Conv2d):
    """torch's 1×1 convolution, which can be compiled for any number of rows and columns."""

    def __init__(self, in_channels: int, out_channels: int) -> None:
        super().__init__(in_channels, out_channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not torch.compiler.is_compiling():
            return super().forward(x_BCHW)
        kind = x_BCHW.device.type  # autograd functions see no autocast
        if torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind):
            dtype = torch.get_autocast_dtype(kind)
            return _PointwiseConvolution.apply(x_BCHW.to(dtype), self.weight.to(dtype), _to(dtype, self.bias))
        return _PointwiseConvolution.apply(x_BCHW, self.weight, self.bias)


class _PointwiseConvolution(torch.autograd.Function):
    """As torch's, but for backward's kernel, which is kept from the compiler."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_OC11: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BCHW, weight_OC11)
        return F.conv2d(x_BCHW, weight_OC11, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_OC11 = ctx.saved_tensors
        return _opaque_gradients(grad_BOHW.contiguous(), x_BCHW.contiguous(), weight_OC11, ctx.needs_input_grad)


def _convolution_backward(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """torch's gradients of a convolution that keeps rows and columns."""
    padding = weight_OCkk.shape[-1] // 2
    return torch.ops.aten.convolution_backward(
        grad_BOHW, x_BCHW, weight_OCkk, [len(weight_OCkk)], [1, 1], [padding] * 2, [1, 1], False, [0, 0], 1, wanted
    )


def _opaque_gradients(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, wanted: Sequence[bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """`_convolution_backward` as one operator that compilers do not look into.

    Inductor (torch 2.14) fixes rows and columns where it meets a convolution's backward, so that each bucket would be
    compiled anew.
    """
    for_x, for_weight, for_bias = _opaque_backward(grad_BOHW, x_BCHW, weight_OCkk, *wanted)
    return for_x if wanted[0] else None, for_weight if wanted[1] else None, for_bias if wanted[2] else None


@torch.library.custom_op("sdxl_pretrain::convolution_backward", mutates_args=())
def _opaque_backward(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """What is not wanted is empty: an operator returns tensors."""
    found = _convolution_backward(grad_BOHW, x_BCHW, weight_OCkk, (for_x, for_weight, for_bias))
    none = [grad_BOHW.new_empty(0) for _ in found]
    first, second, third = (empty if one is None else one.contiguous() for one, empty in zip(found, none, strict=True))
    return first, second, third


@_opaque_backward.register_fake
def _opaque_shapes(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, for_x: bool, for_weight: bool, for_bias: bool
) -> tuple[Tensor, Tensor, Tensor]:
    return (
        x_BCHW.new_empty(x_BCHW.shape if for_x else (0,)),
        weight_OCkk.new_empty(weight_OCkk.shape if for_weight else (0,)),
        weight_OCkk.new_empty(len(weight_OCkk) if for_bias else 0),
    )


def _to(dtype: torch.dtype, tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(dtype)


def _few_pixels_for_many_weights(x_BCHW: Tensor, weight_OCkk: Tensor) -> bool:
    if not _plain_on_cpu(x_BCHW, weight_OCkk):
        return False
    pixels = len(x_BCHW) * x_BCHW.shape[2] * x_BCHW.shape[3]
    return pixels <= FEW_PIXELS and weight_OCkk.numel() >= MANY_WEIGHTS


def _plain_on_cpu(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiler chooses kernels by itself
        return False
    return all(type(one) in _PLAIN and device.is_cpu(one.device) and one.dtype == torch.float32 for one in tensors)


_PLAIN = (Tensor, nn.Parameter)  # no subclass, such as a sharded one


def _onednn(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
    if not _HAS_ONEDNN:
        return F.linear(x, weight_NK, bias_N)
    return torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")


# torch's own compiler takes linear layers to oneDNN by this operator; a build without oneDNN has it not.
_HAS_ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")
