"""A norm and what follows it as one autograd function, which keeps the norm's input and recomputes the cheap rest.

torch keeps the input of a norm, its output and each activation's after it for backward. These functions keep their
inputs (the feed-forward its first product, too) and compute norms and activations again: a few per cent of a step's
time for a third of its activations. Under autocast a norm is computed in fp32 and the product in half, as autocast has
it; weights are cast anew for backward instead of being kept in half.

Network modules of other packages (LoRA and its kin) replace a layer's `forward`, hook the layer, or put another layer
in its place. Such layers are called as torch calls them, with what their fused function computes around them.
Legend: B batch, C channels, H W latent rows and columns, L tokens, N K channels out of and into a linear layer.
"""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from library import device
from library.models.cpu_kernels import (
    Conv2d,
    Linear,
    bias_gradient,
    convolution,
    convolution_gradients,
    linear,
    linear_input_gradient,
    linear_weight_gradient,
)
from library.models.gelu import geglu, geglu_gradient

_ATEN = torch.ops.aten


PLAIN = (nn.Linear, Linear, nn.Conv2d, Conv2d, nn.LayerNorm, nn.GroupNorm)


def is_untouched(module: nn.Module) -> bool:
    """Whether calling the module runs the `forward` of its class and nothing else.

    Hooks that torch runs for every module of the process do not count: they only watch (torch's FLOP counter).
    """
    return not (
        "forward" in vars(module)
        or "_conv_forward" in vars(module)  # replaced by those who make textures without seams
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def is_plain(*layers: nn.Module) -> bool:
    """Whether the layers compute what their classes say from their own weights, so that they need not be called.

    A parametrized layer has a class of its own.
    """
    return all(type(layer) in PLAIN and is_untouched(layer) for layer in layers)


def normed_convolution(x_BCHW: Tensor, norm: nn.GroupNorm, convolution: nn.Conv2d) -> Tensor:
    """convolution(silu(norm(x))); fused where both layers are plain and the convolution is 3×3 and padded by one."""
    if not (is_plain(norm, convolution) and _is_3x3(convolution)):
        return convolution(F.silu(norm(x_BCHW)))
    return _NormedConvolution.apply(
        _precision(x_BCHW), norm.num_groups, norm.eps, x_BCHW, norm.weight, norm.bias, *_parameters(convolution)
    )


def normed_linears(x_BLC: Tensor, norm: nn.LayerNorm, *layers: nn.Linear) -> tuple[Tensor, ...]:
    """Each layer's product with norm(x); fused where all layers are plain and without bias.

    One layer that is called keeps the norm's output anyway, so the others gain nothing by being fused.
    """
    if not is_plain(norm, *layers) or any(layer.bias is not None for layer in layers):
        normed_BLC = norm(x_BLC)
        return tuple(layer(normed_BLC) for layer in layers)
    weights = [layer.weight for layer in layers]
    return _NormedLinears.apply(_precision(x_BLC), norm.eps, x_BLC, norm.weight, norm.bias, *weights)


def normed_feed_forward(x_BLC: Tensor, norm: nn.LayerNorm, inner: nn.Linear, outer: nn.Linear) -> Tensor:
    """outer(value · gelu(gate)), where value and gate are the halves of inner(norm(x)) (Shazeer 2020, equation 6).

    Fused where all three layers are plain.
    """
    if not is_plain(norm, inner, outer):
        return outer(geglu(inner(norm(x_BLC)))[0])
    return _NormedFeedForward.apply(
        _precision(x_BLC), norm.eps, x_BLC, norm.weight, norm.bias, *_parameters(inner), *_parameters(outer)
    )


def _is_3x3(convolution: nn.Conv2d) -> bool:
    """Whether the convolution has nine weights a pair of channels, zeros around the image, and the image's size."""
    ones = (1, 1)
    return (
        convolution.kernel_size == (3, 3)
        and convolution.padding == convolution.stride == convolution.dilation == ones
        and convolution.groups == 1
        and convolution.padding_mode == "zeros"
    )


@dataclass(frozen=True)
class _Precision:
    """What norms and what products are computed in."""

    device_type: str
    norm: torch.dtype
    product: torch.dtype

    def autocast_off(self) -> AbstractContextManager:
        return device.without_autocast(self.device_type)


_assumed: torch.dtype | None = None  # what autocast would compute in where there are no data


@contextmanager
def assume_autocast(dtype: torch.dtype) -> Iterator[None]:
    """For tensors on the meta device, which has no autocast: hold what would be held under one that computes so."""
    global _assumed
    before, _assumed = _assumed, dtype
    try:
        yield
    finally:
        _assumed = before


def _precision(x: Tensor) -> _Precision:
    kind = x.device.type
    if x.is_meta and _assumed is not None:
        return _Precision(kind, torch.float32, _assumed)
    if device.has_autocast(kind):
        return _Precision(kind, torch.float32, torch.get_autocast_dtype(kind))
    return _Precision(kind, x.dtype, x.dtype)


def _parameters(layer: nn.Linear | nn.Conv2d) -> tuple[Tensor, Tensor | None]:
    return layer.weight, layer.bias


class _NormedConvolution(torch.autograd.Function):
    """GroupNorm, SiLU, convolution; keeps the norm's input."""

    @staticmethod
    def forward(
        ctx: Any, precision: _Precision, groups: int, eps: float, x_BCHW: Tensor, *parameters: Tensor
    ) -> Tensor:
        norm_weight, norm_bias, weight, bias = parameters
        ctx.precision, ctx.groups, ctx.eps = precision, groups, eps
        ctx.save_for_backward(x_BCHW, norm_weight, norm_bias, weight)
        with precision.autocast_off():  # group norms' own kernels read rows of a channel together
            x_BCHW, norm_weight, norm_bias = _to(precision.norm, x_BCHW.contiguous(), norm_weight, norm_bias)
            active_BCHW = F.silu(F.group_norm(x_BCHW, groups, norm_weight, norm_bias, eps), inplace=True)
            return convolution(*_to(precision.product, active_BCHW, weight, bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BOHW: Tensor) -> tuple[Tensor | None, ...]:
        x_BCHW, norm_weight, norm_bias, weight = ctx.saved_tensors
        precision: _Precision = ctx.precision
        _, _, _, for_x, for_norm_weight, for_norm_bias, for_weight, for_bias = ctx.needs_input_grad
        shape, dtypes = x_BCHW.shape, [one.dtype for one in (x_BCHW, norm_weight, norm_bias, weight, weight)]
        inner = for_x or for_norm_weight or for_norm_bias
        with precision.autocast_off():
            x_BCHW, norm_weight, norm_bias = _to(precision.norm, x_BCHW.contiguous(), norm_weight, norm_bias)
            sizes = (shape[0], shape[1], shape[2:].numel())
            normed_BCHW, mean, rstd = _ATEN.native_group_norm(
                x_BCHW, norm_weight, norm_bias, *sizes, ctx.groups, ctx.eps
            )
            active_BCHW, weight = _to(precision.product, F.silu(normed_BCHW), weight)
            grad_BCHW, grad_weight, grad_bias = convolution_gradients(
                grad_BOHW.to(precision.product).contiguous(), active_BCHW, weight, (inner, for_weight, for_bias)
            )
            del active_BCHW
            gradients = [None, None, None, grad_weight, grad_bias]
            if grad_BCHW is not None:
                grad_BCHW = _ATEN.silu_backward(grad_BCHW.to(precision.norm), normed_BCHW).contiguous()
                wanted = [for_x, for_norm_weight, for_norm_bias]
                gradients[:3] = _ATEN.native_group_norm_backward(
                    grad_BCHW, x_BCHW, mean, rstd, norm_weight, *sizes, ctx.groups, wanted
                )
            return None, None, None, *_back_to(dtypes, gradients)


class _NormedLinears(torch.autograd.Function):
    """LayerNorm and linear layers side by side; keeps the norm's input."""

    @staticmethod
    def forward(ctx: Any, precision: _Precision, eps: float, x_BLC: Tensor, *parameters: Tensor) -> tuple[Tensor, ...]:
        norm_weight, norm_bias, *weights = parameters
        ctx.precision, ctx.eps = precision, eps
        ctx.save_for_backward(x_BLC, norm_weight, norm_bias, *weights)
        with precision.autocast_off():
            normed_BLC = _normed(precision, eps, x_BLC, norm_weight, norm_bias)[0].to(precision.product)
            return tuple(linear(normed_BLC, weight.to(precision.product)) for weight in weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, norm_weight, norm_bias, *weights = ctx.saved_tensors
        precision: _Precision = ctx.precision
        with precision.autocast_off():
            normed_BLC, mean, rstd = _normed(precision, ctx.eps, x_BLC, norm_weight, norm_bias)
            half_BLC = normed_BLC.to(precision.product)
            del normed_BLC
            grad_weights: list[Tensor | None] = []
            grad_BLC: Tensor | None = None
            for grad, weight, wanted in zip(grads, weights, ctx.needs_input_grad[5:], strict=True):
                grad = grad.to(precision.product)
                part_BLC = linear_input_gradient(grad, weight.to(precision.product))
                grad_BLC = part_BLC if grad_BLC is None else grad_BLC.add_(part_BLC)
                grad_weights.append(linear_weight_gradient(grad, half_BLC).to(weight.dtype) if wanted else None)
            del half_BLC
            gradients = _norm_gradients(ctx, grad_BLC, x_BLC, mean, rstd, norm_weight, norm_bias)
        return None, None, *gradients, *grad_weights


class _NormedFeedForward(torch.autograd.Function):
    """LayerNorm, GEGLU and the linear layer back; keeps the norm's input and the inner product."""

    @staticmethod
    def forward(ctx: Any, precision: _Precision, eps: float, x_BLC: Tensor, *parameters: Tensor) -> Tensor:
        norm_weight, norm_bias, inner, inner_bias, outer, outer_bias = parameters
        ctx.precision, ctx.eps = precision, eps
        with precision.autocast_off():
            normed_BLC = _normed(precision, eps, x_BLC, norm_weight, norm_bias)[0]
            inner_BLN = linear(*_to(precision.product, normed_BLC, inner, inner_bias))
            del normed_BLC
            ctx.save_for_backward(x_BLC, norm_weight, norm_bias, inner, inner_bias, outer, outer_bias, inner_BLN)
            return linear(geglu(inner_BLN)[0], *_to(precision.product, outer, outer_bias))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLC: Tensor) -> tuple[Tensor | None, ...]:
        x_BLC, norm_weight, norm_bias, inner, inner_bias, outer, outer_bias, inner_BLN = ctx.saved_tensors
        precision: _Precision = ctx.precision
        wanted = ctx.needs_input_grad[5:]
        with precision.autocast_off():
            grad_BLC = grad_BLC.to(precision.product)
            hidden, active = geglu(inner_BLN)
            grad_outer = linear_weight_gradient(grad_BLC, hidden) if wanted[2] else None
            del hidden
            grad_outer_bias = bias_gradient(grad_BLC) if wanted[3] else None
            grad_hidden = linear_input_gradient(grad_BLC, outer.to(precision.product))
            grad_inner_BLN = geglu_gradient(grad_hidden, inner_BLN, active)
            del active, grad_hidden
            normed_BLC, mean, rstd = _normed(precision, ctx.eps, x_BLC, norm_weight, norm_bias)
            grad_inner = linear_weight_gradient(grad_inner_BLN, normed_BLC.to(precision.product)) if wanted[0] else None
            grad_inner_bias = bias_gradient(grad_inner_BLN) if wanted[1] else None
            del normed_BLC
            grad_normed_BLC = linear_input_gradient(grad_inner_BLN, inner.to(precision.product))
            gradients = _norm_gradients(ctx, grad_normed_BLC, x_BLC, mean, rstd, norm_weight, norm_bias)
            dtypes = [one.dtype for one in (inner, inner_bias, outer, outer_bias)]
            products = _back_to(dtypes, [grad_inner, grad_inner_bias, grad_outer, grad_outer_bias])
        return None, None, *gradients, *products


def _to(dtype: torch.dtype, *tensors: Tensor | None) -> list[Any]:
    return [one if one is None or one.dtype == dtype else one.to(dtype) for one in tensors]  # asking is the cheaper


def _back_to(dtypes: list[torch.dtype], gradients: list[Any]) -> list[Any]:
    """Gradients in the precision of what they belong to."""
    return [_to(dtype, one)[0] for one, dtype in zip(gradients, dtypes, strict=True)]


def _normed(precision: _Precision, eps: float, x_BLC: Tensor, weight: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
    """The norm's output, its mean and its reciprocal deviation."""
    x_BLC, weight, bias = _to(precision.norm, x_BLC, weight, bias)
    return _ATEN.native_layer_norm(x_BLC, [x_BLC.shape[-1]], weight, bias, eps)


def _norm_gradients(
    ctx: Any, grad_BLC: Tensor | None, x_BLC: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor, bias: Tensor
) -> list[Any]:
    """The gradients to the norm's input, weight and bias."""
    assert grad_BLC is not None
    dtypes = [one.dtype for one in (x_BLC, weight, bias)]
    grad_BLC, x_BLC, weight, bias = _to(ctx.precision.norm, grad_BLC, x_BLC, weight, bias)
    found = _ATEN.native_layer_norm_backward(
        grad_BLC, x_BLC, [x_BLC.shape[-1]], mean, rstd, weight, bias, list(ctx.needs_input_grad[2:5])
    )
    return _back_to(dtypes, list(found))
