"""Ascend's fused activations and norms as operators of their own, one launch each, by their reference formulas.

The schemas are torch_npu 2.14's. GELU's erf form is x Φ(x), its tanh form Hendrycks & Gimpel's (1606.08415).
"""

import torch
import torch.nn.functional as F
from torch import Tensor

_library = torch.library.Library("npu", "DEF")
_ATEN = torch.ops.aten
_FORMS = ("none", "tanh")  # by npu_geglu's number
_SECOND_GENERATION_ONLY = "aclnn{} is not supported on this product"


def _operator(schema: str):
    """Defines an operator, whose kernel for npu tensors is the decorated function."""

    def kernel(*arguments, **named):
        """On the CPU's view of the memory, so that only what goes in and comes out counts as the device's memory."""
        tensors = [one for one in arguments if isinstance(one, Tensor)]
        device = tensors[0].device
        if any(one.device != device for one in tensors):
            raise RuntimeError(f"{schema.partition('(')[0]}: Expected all tensors to be on the same device")
        if any(one.dtype == torch.float64 for one in tensors):
            raise RuntimeError(f"{schema.partition('(')[0]}: float64 is not supported")
        views = [torch.ops.npu_sim.cpu_alias(one) if isinstance(one, Tensor) else one for one in arguments]
        result = functions[0](*views, **named)
        return result.to(device) if isinstance(result, Tensor) else tuple(one.to(device) for one in result)

    functions: list = []

    def define(function):
        functions.append(function)
        _library.define(schema)
        _library.impl(schema.partition("(")[0], kernel, "PrivateUse1")
        return function

    return define


def _gelu(x: Tensor, form: str) -> Tensor:
    return F.gelu(x.float(), approximate=form).to(x.dtype)


def _gelu_gradient(grad: Tensor, x: Tensor, form: str) -> Tensor:
    return _ATEN.gelu_backward(grad.float(), x.float(), approximate=form).to(x.dtype)


def _halves(x: Tensor, dim: int, activate_left: bool) -> tuple[Tensor, Tensor]:
    """What is activated and the other half."""
    left, right = x.chunk(2, dim)
    return (left, right) if activate_left else (right, left)


@_operator("npu_gelu(Tensor self, *, str approximate='none') -> Tensor")
def _npu_gelu(self: Tensor, *, approximate: str = "none") -> Tensor:
    if approximate not in _FORMS:
        raise RuntimeError(f"npu_gelu: approximate {approximate!r} is not one of {', '.join(_FORMS)}")
    return _gelu(self, approximate)


@_operator("npu_gelu_backward(Tensor grad_output, Tensor self, *, str approximate='none') -> Tensor")
def _npu_gelu_backward(grad_output: Tensor, self: Tensor, *, approximate: str = "none") -> Tensor:
    return _gelu_gradient(grad_output, self, approximate)


@_operator("npu_geglu(Tensor self, int dim=-1, int approximate=1, bool activate_left=False) -> (Tensor, Tensor)")
def _npu_geglu(self: Tensor, dim: int = -1, approximate: int = 1, activate_left: bool = False):
    if torch.ops.npu_sim.first_generation():
        raise RuntimeError(_SECOND_GENERATION_ONLY.format("GeGluV3"))
    active, other = _halves(self, dim, activate_left)
    gelu = _gelu(active, _FORMS[approximate])
    return other * gelu, gelu


@_operator(
    "npu_geglu_grad(Tensor grad_output, Tensor self, Tensor gelu, int dim=-1, int approximate=1, "
    "bool activate_left=False) -> Tensor"
)
def _npu_geglu_grad(grad_output, self, gelu, dim=-1, approximate=1, activate_left=False) -> Tensor:
    active, other = _halves(self, dim, activate_left)
    to_active = _gelu_gradient(grad_output * other, active, _FORMS[approximate])
    to_other = grad_output * gelu
    return torch.cat([to_active, to_other] if activate_left else [to_other, to_active], dim)


@_operator("npu_swiglu(Tensor self, int dim=-1) -> Tensor")
def _npu_swiglu(self: Tensor, dim: int = -1) -> Tensor:
    left, right = self.chunk(2, dim)
    return F.silu(left) * right


@_operator("npu_rms_norm(Tensor self, Tensor gamma, float epsilon=1e-06) -> (Tensor, Tensor)")
def _npu_rms_norm(self: Tensor, gamma: Tensor, epsilon: float = 1e-6) -> tuple[Tensor, Tensor]:
    """(x / rms(x) * gamma, 1 / rms(x)) over the last dimensions, as many as gamma has."""
    dims = tuple(range(-gamma.dim(), 0))
    rstd = torch.rsqrt(self.float().pow(2).mean(dims, keepdim=True) + epsilon)
    return (self.float() * rstd).to(self.dtype) * gamma, rstd


def _keep_gelu(ctx, inputs, keyword_only_inputs, output) -> None:
    ctx.save_for_backward(*inputs)
    ctx.approximate = keyword_only_inputs["approximate"]


def _keep_geglu(ctx, inputs, output) -> None:
    ctx.save_for_backward(inputs[0], output[1])
    ctx.settings = inputs[1:]
    ctx.mark_non_differentiable(output[1])


torch.library.register_autograd(
    "npu::npu_gelu",
    lambda ctx, grad: torch.ops.npu.npu_gelu_backward(grad, *ctx.saved_tensors, approximate=ctx.approximate),
    setup_context=_keep_gelu,
    lib=_library,
)
torch.library.register_autograd(
    "npu::npu_geglu",
    lambda ctx, grad, _: (torch.ops.npu.npu_geglu_grad(grad, *ctx.saved_tensors, *ctx.settings), None, None, None),
    setup_context=_keep_geglu,
    lib=_library,
)
torch.library.register_fake("npu::npu_gelu", lambda self, *, approximate="none": torch.empty_like(self), lib=_library)
torch.library.register_fake(
    "npu::npu_gelu_backward",
    lambda grad_output, self, *, approximate="none": torch.empty_like(self),
    lib=_library,
)


@torch.library.register_fake("npu::npu_geglu", lib=_library)
def _(self, dim=-1, approximate=1, activate_left=False):
    half = self.chunk(2, dim)[0]
    return torch.empty_like(half, memory_format=torch.contiguous_format), torch.empty(
        half.shape, dtype=self.dtype, device=self.device
    )


@torch.library.register_fake("npu::npu_geglu_grad", lib=_library)
def _(grad_output, self, gelu, dim=-1, approximate=1, activate_left=False):
    return torch.empty_like(self)


npu_gelu, npu_gelu_backward = torch.ops.npu.npu_gelu, torch.ops.npu.npu_gelu_backward
npu_geglu, npu_geglu_grad = torch.ops.npu.npu_geglu, torch.ops.npu.npu_geglu_grad
npu_swiglu, npu_rms_norm = torch.ops.npu.npu_swiglu, torch.ops.npu.npu_rms_norm
