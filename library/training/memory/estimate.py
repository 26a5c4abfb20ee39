"""How much device memory a training step will need, found by running it on shapes alone.

The modules are copied without their data onto torch's meta device, where every operator works out shapes and none
computes. Following the life of each storage through forward and backward gives the peak of what a step holds at once.
What it cannot see: the allocator's fragmentation, libraries' workspaces, CUDA's and CANN's own context.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from library.models.gelu import assume_fused_geglu
from library.training.engine.meta_copy import without_data
from library.training.memory.meta_run import Autocast, LiveShapes, fused_attention
from library.training.memory.resident import Held, Training, held_bytes

GIB = 2**30


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process holds at the peak of a step."""

    weights: int  # all modules, as they are held between steps
    optimizer: int
    backward: int  # the peak of activations and gradients together, with what is gathered or cast while it computes
    encoding: int  # of the images by the VAE, before there are activations, with the gradients that stay between steps
    update: int  # gradients, and what the optimizer takes for a moment
    averages: int  # moving averages of the weights

    @property
    def total(self) -> int:
        """The peak of a step."""
        return self.weights + self.optimizer + self.averages + max(self.backward, self.encoding, self.update)

    def lines(self) -> list[str]:
        """For a person."""
        parts = {
            "weights": self.weights,
            "optimizer state": self.optimizer,
            **({"moving averages": self.averages} if self.averages else {}),
            "activations and gradients at their peak": self.backward,
            "before these, VAE encoding": self.encoding,
            "after them, the update": self.update,
        }
        listed = ", ".join(f"{name} {size / GIB:.3f}" for name, size in parts.items())
        return [f"estimated device memory of a step: {self.total / GIB:.3f} GiB ({listed})"]


def estimator(
    module: Any,
    vae: nn.Module,
    compute_dtype: torch.dtype,
    step: Callable[[nn.Module], Tensor],
    encode: Callable[[nn.Module], Tensor],
    training: Training,
) -> Callable[[], MemoryEstimate]:
    """Run one encoding on shapes; what comes back does so with forward and backward, as `module` checkpoints then.

    Args:
        module: what trains, as it will be held; its `sharding_units` are what fsdp gathers one by one.
        vae: beside it on the device.
        compute_dtype: what autocast computes in; fp32 for none.
        step: the loss of a data-less copy of `module`, made of tensors on the meta device.
        encode: the latents by a data-less copy of `vae`.
        training: optimizer, sharding and pass.
    """
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    everything = sum(_bytes(tensor) for part in (module, vae) for tensor in (*part.parameters(), *part.buffers()))
    held = held_bytes(trained, _units(module), training)
    vae_shapes = without_data(vae)
    with LiveShapes() as encoding, fused_attention():
        encode(vae_shapes)
    frozen_elsewhere = [one for block in training.swapped for one in block if not one.requires_grad]
    weights = everything - sum(map(_bytes, (*trained, *frozen_elsewhere))) + held.weights
    without_backward = MemoryEstimate(
        weights,
        held.optimizer,
        0,
        encoding.peak + held.gradients_at_rest,
        held.gradients + held.update,
        held.averages,
    )
    return lambda: replace(without_backward, backward=_backward(module, compute_dtype, step, training, held))


def estimate(*arguments: Any) -> MemoryEstimate:
    """What `estimator` with these arguments says of the module as it is now."""
    return estimator(*arguments)()


def _backward(
    module: nn.Module,
    compute_dtype: torch.dtype,
    step: Callable[[nn.Module], Tensor],
    training: Training,
    held: Held,
) -> int:
    """The peak of forward and backward, beyond weights and optimizer state."""
    # One process alone makes its gradients while activations go, in the first pass of a step. Otherwise they are there
    # already, or they go soon.
    alone = training.kind == "none" and training.processes == 1
    collected = alone and training.passes == 1 and not training.fused_backward
    shapes = without_data(module)
    elsewhere = {id(weight) for block in training.swapped for weight in block}
    of_module = zip(module.parameters(), shapes.parameters(), strict=True)
    swapped = [shape for weight, shape in of_module if id(weight) in elsewhere]
    for parameter in swapped if collected else shapes.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(_forget)
    with (
        LiveShapes() as live,
        fused_attention(),
        assume_fused_geglu(training.fused_geglu),
        Autocast(compute_dtype, uncached=swapped) as autocast,
    ):
        live.hold([*shapes.parameters(), *shapes.buffers()])
        at_start = live.bytes
        loss = step(shapes)
        autocast.end_forward()
        loss.backward()
    gradients = 0 if collected else held.gradients
    in_backward = held.update + _besides_largest(training.compiled) if training.fused_backward else 0
    return live.peak - at_start + gradients + held.visiting + in_backward


def _besides_largest(blocks: Sequence[Sequence[Tensor]]) -> int:
    """A compiled block's gradients come all at once, not one by one: the most that its others add to the largest."""
    gradients = [[_bytes(weight) for weight in block if weight.requires_grad] for block in blocks]
    return max((sum(sizes) - max(sizes) for sizes in gradients if sizes), default=0)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None


def _units(module: Any) -> list[list[Tensor]]:
    """What trains, by the units that fsdp gathers, and the rest together."""
    units = [[one for one in unit.parameters() if one.requires_grad] for unit in module.sharding_units()]
    named = {id(one) for unit in units for one in unit}
    return [*units, [one for one in module.parameters() if one.requires_grad and id(one) not in named]]


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
