"""How much device memory a training step will need, found by running it on shapes alone.

The modules are copied without their data onto torch's meta device, where every operator works out shapes and none
computes. Following the life of each storage through forward and backward gives the peak of what a step holds at once.
What it cannot see: the allocator's fragmentation, libraries' workspaces, CUDA's and CANN's own context.
"""

import copy
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
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


def without_data(module: Module, dtype: torch.dtype | None = None) -> Module:
    """A copy of a module on the meta device, without its data. `dtype` None keeps each tensor's own."""

    def shape_of(tensor: Tensor) -> Tensor:
        kind = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        empty = torch.empty_like(tensor, device="meta", dtype=kind)
        return nn.Parameter(empty, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty

    tensors = [*module.parameters(), *module.buffers()]
    return copy.deepcopy(module, {id(tensor): shape_of(tensor) for tensor in tensors})


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds at the peak of a step."""

    weights: int  # all modules, as they are held
    gradients: int
    optimizer: int
    activations: int  # with half-precision copies of weights under mixed precision

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.weights + self.gradients + self.optimizer + self.activations

    def lines(self) -> list[str]:
        """For a person."""
        parts = {
            "weights": self.weights,
            "gradients": self.gradients,
            "optimizer state": self.optimizer,
            "activations": self.activations,
        }
        listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
        return [f"estimated device memory of a step: {self.total / GIB:.3f} GiB ({listed})"]


def estimate(
    module: nn.Module, frozen: Sequence[nn.Module], compute_dtype: torch.dtype, step: Callable[[nn.Module], Tensor]
) -> MemoryEstimate:
    """Run one forward and backward on shapes.

    Args:
        module: what trains, as it will be held.
        frozen: other modules on the device.
        compute_dtype: what autocast computes in; fp32 for none.
        step: the loss of a data-less copy of `module`, made of tensors on the meta device.
    """
    weights = sum(_bytes(tensor) for part in (module, *frozen) for tensor in (*part.parameters(), *part.buffers()))
    trained = sum(_bytes(parameter) for parameter in module.parameters() if parameter.requires_grad)
    shapes = without_data(module, compute_dtype if compute_dtype != torch.float32 else None)
    held = [*shapes.parameters(), *shapes.buffers()]
    with LiveBytes() as live:
        live.hold(held)
        at_start = live.bytes
        step(shapes).backward()
        computed_gradients = sum(
            _bytes(parameter.grad) for parameter in shapes.parameters() if parameter.grad is not None
        )
    # Gradients appear while activations go: what the peak holds beyond weights is both. Under autocast the copy's
    # weights stand for the half-precision copies that autocast makes, and its gradients are half of the real ones.
    copies = at_start if compute_dtype != torch.float32 else 0
    beyond = live.peak - at_start
    activations = max(beyond - computed_gradients, 0) + copies
    return MemoryEstimate(weights, trained, ADAMW_STATES * trained, activations)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
