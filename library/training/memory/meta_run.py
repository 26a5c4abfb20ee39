"""Modules and steps without data, on torch's meta device, that hold what they would hold on a device that computes.

There every operator works out shapes and none computes. Two things torch does otherwise there than on a device: it
writes attention out, and it has no autocast. Both are put in their places here. Functions are exchanged, not overridden
by a mode: modes do not reach into the recomputation of checkpoints.
"""

import functools
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

from library.models.fused_ops import assume_autocast
from library.training.memory.live_bytes import LiveBytes

# What autocast computes in half, its weights cast once a pass, and in fp32 (torch's page "Automatic Mixed Precision").
_IN_HALF, _IN_FP32 = ("linear", "conv2d"), ("layer_norm", "group_norm")


class _FusedShapes(torch.autograd.Function):
    """What a fused attention kernel holds: inputs, output and a number a row of scores, never the scores.

    All kernels of torch lay their output out token by token, (B, T, N, D) in memory, so that the heads of a token are
    side by side without a copy.
    """

    @staticmethod
    def forward(ctx: Any, q_BNTD: Tensor, k_BNSD: Tensor, v_BNSD: Tensor) -> Tensor:
        batch, heads, tokens, _ = q_BNTD.shape
        out_BTND = q_BNTD.new_empty((batch, tokens, heads, v_BNSD.shape[-1]))
        out_BNTD = out_BTND.transpose(1, 2)
        log_sums_BNT = q_BNTD.new_empty((batch, heads, tokens), dtype=torch.float32)
        ctx.save_for_backward(q_BNTD, k_BNSD, v_BNSD, out_BNTD, log_sums_BNT)
        return out_BNTD

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention holds what a fused kernel holds."""

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FusedShapes.apply(q, k, v)

    with _exchanged("scaled_dot_product_attention", attention):
        yield


class LiveShapes(LiveBytes):
    """`LiveBytes` for steps on the meta device, where most time goes into working out shapes: each only once."""

    # By operator and arguments: size, stride and dtype of each result. What an operator gives depends on nothing else.
    _known: ClassVar[dict[Any, Any]] = {}

    def _run(self, func: Any, args: Any, kwargs: Any) -> Any:
        key = func, *(_key(value) for value in args), *((name, _key(value)) for name, value in kwargs.items())
        found = self._known.get(key)
        if found is None:
            result = func(*args, **kwargs)
            if not _writes(func) and not _storages((args, kwargs)) & _storages(result):
                self._known[key] = tree_map(_form, result)
            return result
        return tree_map(_made, found)


@dataclass(frozen=True)
class _Form:
    """A tensor without data."""

    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype
    device: torch.device


def _form(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return _Form(tuple(value.shape), value.stride(), value.dtype, value.device)


def _made(value: Any) -> Any:
    if not isinstance(value, _Form):
        return value
    return torch.empty_strided(value.size, value.stride, dtype=value.dtype, device=value.device)


def _key(value: Any) -> Any:
    """An argument as what decides on the result; 1, 1.0 and True are not the same."""
    if isinstance(value, (list, tuple)):
        return tuple(map(_key, value))
    return _form(value) if isinstance(value, Tensor) else (type(value), value)


def _storages(tree: Any) -> set[int]:
    """Whose memory tensors are: a view has that of its base."""
    return {leaf.untyped_storage()._cdata for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)}


@functools.cache
def _writes(func: Any) -> bool:
    """Whether an operator changes an argument."""
    return any(one.alias_info is not None and one.alias_info.is_write for one in func._schema.arguments)


class Autocast:
    """While active, linear layers and convolutions compute in half and norms in fp32, as under torch's autocast.

    Autocast casts a weight once a pass and keeps the copy until the pass's end, or until backward has used it.
    """

    def __init__(self, dtype: torch.dtype, uncached: Collection[Tensor] = ()) -> None:
        """
        Args:
            dtype: what is computed in; fp32 for no autocast, and then nothing happens.
            uncached: weights whose copies are not kept.
        """
        self.dtype = dtype
        self._uncached = {id(weight) for weight in uncached}
        self._copies: dict[int, Tensor] = {}
        self._in_forward = True
        self._stack = ExitStack()

    def __enter__(self) -> "Autocast":
        if self.dtype != torch.float32:
            self._stack.enter_context(assume_autocast(self.dtype))
            for names, cast in ((_IN_HALF, self._half), (_IN_FP32, self._fp32)):
                for name in names:
                    self._stack.enter_context(_exchanged(name, _cast_first(getattr(F, name), cast)))
        return self

    def __exit__(self, *_: object) -> None:
        self.end_forward()
        self._stack.close()

    def end_forward(self) -> None:
        """The copies are let go; each recomputed block makes its own."""
        self._in_forward = False
        self._copies.clear()

    def _fp32(self, tensor: Tensor) -> Tensor:
        return tensor.float()

    def _half(self, tensor: Tensor) -> Tensor:
        kept = self._in_forward and tensor.is_leaf and tensor.requires_grad and id(tensor) not in self._uncached
        if tensor.dtype != torch.float32 or not kept:
            return tensor.to(self.dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor.to(self.dtype)
        return self._copies[id(tensor)]


def _cast_first(function: Callable[..., Tensor], cast: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    """The function, after its floating-point tensors were cast."""

    def changed(value: Any) -> Any:
        return cast(value) if isinstance(value, Tensor) and value.is_floating_point() else value

    def call(*given: Any, **named: Any) -> Tensor:
        return function(*map(changed, given), **{name: changed(value) for name, value in named.items()})

    return call


@contextmanager
def _exchanged(name: str, function: Callable[..., Tensor]) -> Iterator[None]:
    """Another function stands in the place of one of torch.nn.functional."""
    original = getattr(F, name)
    setattr(F, name, function)
    try:
        yield
    finally:
        setattr(F, name, original)
