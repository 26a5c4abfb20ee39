"""How much device memory a training step will need, found by running it on shapes alone.

The modules are copied without their data onto torch's meta device, where every operator works out shapes and none
computes. Following the life of each storage through forward and backward gives the peak of what a step holds at once.
What it cannot see: the allocator's fragmentation, libraries' workspaces, CUDA's and CANN's own context.
"""

import copy
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

GIB = 2**30
ADAMW_STATES = 2  # exp_avg and exp_avg_sq, Loshchilov & Hutter, 1711.05101, algorithm 2

Module = TypeVar("Module", bound=nn.Module)


class LiveBytes(TorchDispatchMode):
    """While active, counts the bytes of all storages that are alive, and their peak."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = self.peak = 0
        self._storages: dict[int, weakref.ref] = {}

    def hold(self, tensors: Sequence[Tensor]) -> None:
        """Count tensors that were made before."""
        for tensor in tensors:
            self._count(tensor)

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: Any) -> None:
            self.bytes -= size
            self._storages.pop(key, None)

        self._storages[key] = weakref.ref(storage, freed)
        self.bytes += size
        self.peak = max(self.peak, self.bytes)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._count(leaf)
        return result


class _FusedShapes(torch.autograd.Function):
    """What a fused attention kernel holds: its inputs and its output, never the matrix of scores."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = q.new_empty((*q.shape[:-1], v.shape[-1]))
        ctx.save_for_backward(q, k, v, out)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(saved) for saved in ctx.saved_tensors[:3])


@contextmanager
def _fused_attention() -> Iterator[None]:
    """On the meta device torch writes attention out, as no device does; this puts the fused kernels' shapes there.

    The function is exchanged, not overridden by a mode: modes do not reach into the recomputation of checkpoints.
    """

    def attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
        return _FusedShapes.apply(q, k, v)

    original = F.scaled_dot_product_attention
    F.scaled_dot_product_attention = attention  # type: ignore[assignment]
    try:
        yield
    finally:
        F.scaled_dot_product_attention = original


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


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds at the peak of a step."""

    weights: int  # all modules, as they are held
    optimizer: int
    backward: int  # the peak of activations and gradients together, with autocast's half copies of the weights
    encoding: int  # of the images by the VAE, before there are activations and gradients

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.weights + self.optimizer + max(self.backward, self.encoding)

    def lines(self) -> list[str]:
        """For a person."""
        parts = {
            "weights": self.weights,
            "optimizer state": self.optimizer,
            "activations and gradients at their peak": self.backward,
            "before these, VAE encoding": self.encoding,
        }
        listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
        return [f"estimated device memory of a step: {self.total / GIB:.3f} GiB ({listed})"]


def estimate(
    module: nn.Module,
    vae: nn.Module,
    compute_dtype: torch.dtype,
    step: Callable[[nn.Module], Tensor],
    encode: Callable[[nn.Module], Tensor],
) -> MemoryEstimate:
    """Run one encoding, forward and backward on shapes.

    Args:
        module: what trains, as it will be held.
        vae: beside it on the device.
        compute_dtype: what autocast computes in; fp32 for none.
        step: the loss of a data-less copy of `module`, made of tensors on the meta device.
        encode: the latents by a data-less copy of `vae`.
    """
    weights = sum(_bytes(tensor) for part in (module, vae) for tensor in (*part.parameters(), *part.buffers()))
    trained = sum(_bytes(parameter) for parameter in module.parameters() if parameter.requires_grad)
    vae_shapes = without_data(vae)
    with LiveBytes() as encoding, _fused_attention():
        encode(vae_shapes)
    shapes = without_data(module, compute_dtype if compute_dtype != torch.float32 else None)
    with LiveBytes() as live, _fused_attention():
        live.hold([*shapes.parameters(), *shapes.buffers()])
        at_start = live.bytes
        step(shapes).backward()
        computed_gradients = sum(_bytes(one.grad) for one in shapes.parameters() if one.grad is not None)
    # Under autocast the copy's weights stand for the half copies that autocast makes beside the fp32 ones, and the
    # gradients that are kept are fp32, twice as large as those of the copy.
    copies = at_start if compute_dtype != torch.float32 else 0
    backward = live.peak - at_start + copies + trained - computed_gradients
    return MemoryEstimate(weights, ADAMW_STATES * trained, backward, encoding.peak)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
