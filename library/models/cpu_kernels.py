"""Linear layers and 3×3 convolutions, forward and backward, by the faster of the kernels that the CPU has for them.

On the CPU in fp32 torch takes linear layers to MKL and convolutions to oneDNN. MKL is at its best on Intel's
processors; on others oneDNN's product is the faster one for a linear layer's output and its input's gradient. oneDNN
brings a convolution's weights into an order of its own each time, so where few pixels meet many weights a matrix
product over the unfolded pixels is sooner done (docs/measurements/train_step.md). Elsewhere torch's own choice stands.
Legend: M rows (tokens), K and N channels in and out of a linear layer; B batch, C and O channels in and out, H W rows
and columns, P pixels of the batch (B·H·W).
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library import device

KERNEL = 3  # rows and columns of the convolutions here, padded by one
# The most pixels, for at least so many weights.
FEW_PIXELS_FOR_MANY_WEIGHTS = ((128, 2**21), (256, 2**23))
# From here on a second order of the weights is more than malloc keeps, so that the input's gradient gains, too.
VERY_MANY_WEIGHTS = 2**23


def linear(x: Tensor, weight_NK: Tensor, bias_N: Tensor | None = None) -> Tensor:
    """`F.linear` without a record for backward: x (…, K) -> (…, N)."""
    if _ONEDNN and _plain_on_cpu(x, weight_NK):
        return torch.ops.mkldnn._linear_pointwise(x, weight_NK, bias_N, "none", [], "")
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
    """A linear layer; keeps its input if the weight is trained, and its weight if the input has a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight_NK: Tensor, bias_N: Tensor | None) -> Tensor:
        for_x, for_weight, _ = ctx.needs_input_grad
        ctx.save_for_backward(x if for_weight else None, weight_NK if for_x else None)
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
    """torch's linear layer, on oneDNN where that is the faster: in fp32 on some CPUs, without autocast.

    This class and `Conv2d` have their bases' names and arguments: LyCORIS and sd-scripts' networks find the layers that
    they extend by the names of classes, and make layers of the same class.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (_ONEDNN and _plain_on_cpu(x, self.weight)) or torch.is_autocast_enabled(x.device.type):
            return F.linear(x, self.weight, self.bias)
        return _Linear.apply(x, self.weight, self.bias)


def convolution(x_BCHW: Tensor, weight_OCkk: Tensor, bias_O: Tensor | None) -> Tensor:
    """A 3×3 convolution, padded by one, without a record for backward."""
    if not _few_pixels_for_many_weights(x_BCHW, weight_OCkk):
        return F.conv2d(x_BCHW, weight_OCkk, bias_O, padding=1)
    out_OP = weight_OCkk.flatten(1) @ _unfolded(x_BCHW)
    if bias_O is not None:
        out_OP += bias_O[:, None]
    return out_OP.unflatten(1, (len(x_BCHW), *x_BCHW.shape[2:])).transpose(0, 1).contiguous()


def convolution_gradients(
    grad_BOHW: Tensor, x_BCHW: Tensor, weight_OCkk: Tensor, wanted: tuple[bool, bool, bool]
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """The gradients to input, weight and bias of `convolution`, those that are wanted."""
    if torch.compiler.is_compiling():
        return _opaque_gradients(grad_BOHW, x_BCHW, weight_OCkk, wanted)
    if not _few_pixels_for_many_weights(x_BCHW, weight_OCkk):
        return _convolution_backward(grad_BOHW, x_BCHW, weight_OCkk, wanted)
    # torch's operator, asked for the bias's gradient, computes the weight's, too: it may be asked for neither.
    for_x, for_weight, for_bias = wanted
    grad_OP = grad_BOHW.transpose(0, 1).flatten(1)
    grad_x: Tensor | None = None
    if for_x and weight_OCkk.numel() >= VERY_MANY_WEIGHTS:
        grad_x = _folded(weight_OCkk.flatten(1).t() @ grad_OP, x_BCHW.shape)
    elif for_x:
        grad_x = _convolution_backward(grad_BOHW, x_BCHW, weight_OCkk, (True, False, False))[0]
    return (
        grad_x,
        (grad_OP @ _unfolded(x_BCHW).t()).view_as(weight_OCkk) if for_weight else None,
        grad_OP.sum(1) if for_bias else None,
    )


class Conv2d(nn.Conv2d):
    """torch's convolution; a 1×1 convolution can be compiled for any number of rows and columns."""

    def forward(self, x_BCHW: Tensor) -> Tensor:
        if not torch.compiler.is_compiling() or not self._is_pointwise():
            return super().forward(x_BCHW)
        kind = x_BCHW.device.type  # autograd functions see no autocast
        if device.has_autocast(kind):
            dtype = torch.get_autocast_dtype(kind)
            return _PointwiseConvolution.apply(x_BCHW.to(dtype), self.weight.to(dtype), _to(dtype, self.bias))
        return _PointwiseConvolution.apply(x_BCHW, self.weight, self.bias)

    def _is_pointwise(self) -> bool:
        """Whether each pixel of the output is a product with the same pixel of the input and no other."""
        return (
            self.kernel_size == (1, 1)
            and self.stride == (1, 1)
            and self.padding in ((0, 0), "valid", "same")
            and self.groups == 1
        )


class _PointwiseConvolution(torch.autograd.Function):
    """As torch's, but for backward's kernel, which is kept from the compiler."""

    @staticmethod
    def forward(ctx: Any, x_BCHW: Tensor, weight_OC11: Tensor, bias_O: Tensor | None) -> Tensor:
        ctx.save_for_backward(x_BCHW if ctx.needs_input_grad[1] else None, weight_OC11)
        return F.conv2d(x_BCHW, weight_OC11, bias_O)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, weight_OC11 = ctx.saved_tensors
        for_x, for_weight, for_bias = ctx.needs_input_grad
        if for_weight:
            return _opaque_gradients(grad_BOHW.contiguous(), x_BCHW.contiguous(), weight_OC11, ctx.needs_input_grad)
        return (
            F.conv2d(grad_BOHW, weight_OC11.transpose(0, 1)) if for_x else None,
            None,
            grad_BOHW.sum((0, 2, 3)) if for_bias else None,
        )


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
    pixels, weights = len(x_BCHW) * x_BCHW.shape[2] * x_BCHW.shape[3], weight_OCkk.numel()
    return any(pixels <= most and weights >= least for most, least in FEW_PIXELS_FOR_MANY_WEIGHTS)


def _unfolded(x_BCHW: Tensor) -> Tensor:
    """Each pixel's neighbourhood: (C·9, P)."""
    return F.unfold(x_BCHW, KERNEL, padding=1).transpose(0, 1).flatten(1)


def _folded(neighbourhoods: Tensor, shape_BCHW: torch.Size) -> Tensor:
    """The sum of what the neighbourhoods (C·9, P) hold of each pixel."""
    by_image = neighbourhoods.unflatten(1, (shape_BCHW[0], -1)).transpose(0, 1)
    return F.fold(by_image, tuple(shape_BCHW[2:]), KERNEL, padding=1)


def _plain_on_cpu(*tensors: Tensor) -> bool:
    if torch.compiler.is_compiling():  # a compiler chooses kernels by itself
        return False
    return all(type(one) in _PLAIN and device.is_cpu(one.device) and one.dtype == torch.float32 for one in tensors)


_PLAIN = (Tensor, nn.Parameter)  # no subclass, such as a sharded one

# torch's own compiler takes linear layers to oneDNN by this operator; a build without oneDNN has it not.
_ONEDNN = (
    torch.backends.mkldnn.is_available()
    and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    and not (torch.backends.mkl.is_available() and device.cpu_is_intels())
)
