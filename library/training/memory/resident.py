"""What one process holds of weights, gradients and optimizer state, by --sharding, --optimizer_type and pass."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.training.engine.fused_backward import collected_bytes
from library.training.engine.optimizers import ParameterGroup
from library.training.engine.swap_schedule import largest_together
from library.training.memory.live_bytes import LiveBytes

# third_patch/accelerate_patch: elements of each process's bucket of small gradients, and of all of them together.
OSS_BUCKET, OSS_ALL_BUCKETS = 2**23, 2**26


@dataclass(frozen=True)
class Training:
    """What decides on memory besides the model and its batch."""

    make_optimizer: Callable[[Sequence[ParameterGroup]], torch.optim.Optimizer]
    sharding: str = "none"
    processes: int = 1
    fused_backward: bool = False
    averages: bool = False  # on the device (--use_ema without --offload_ema)
    swapped: Sequence[Sequence[Tensor]] = ()  # weights of each block that lives in the CPU's memory
    passes: int = 1  # forward and backward, whose gradients add up to one step's
    compiled: Sequence[Sequence[Tensor]] = ()  # weights of each block whose backward is one program
    fused_geglu: bool = False  # the device has the feed-forward's gated unit as one operator

    @property
    def kind(self) -> str:
        """The sharding that acts: one process has nothing to share."""
        return self.sharding if self.processes > 1 else "none"


@dataclass(frozen=True)
class Held:
    """Bytes on the process that has the most."""

    weights: int  # of what trains
    visiting: int  # weights that are there while they compute: fsdp's units, swapped blocks
    optimizer: int
    gradients_at_rest: int
    gradients: int  # when the optimizer steps
    update: int  # what the optimizer takes besides for a moment
    averages: int  # of the process's own share of what trains, where they are kept


def held_bytes(trained: Sequence[Tensor], units: Sequence[Sequence[Tensor]], training: Training) -> Held:
    """Work it out.

    Args:
        trained: what trains, in the optimizer's order.
        units: the same by fsdp's units, which are gathered one by one.
    """
    kind, processes = training.kind, training.processes
    elsewhere = {id(tensor) for block in training.swapped for tensor in block}
    trained = [tensor for tensor in trained if id(tensor) not in elsewhere]
    sizes = [_bytes(tensor) for tensor in trained]
    states, update = _states(trained, training)
    whole = sum(sizes)
    average_bytes = [torch.float32.itemsize * tensor.numel() * training.averages for tensor in trained]
    if kind == "fsdp":
        # The unit that computes, and the one that is fetched meanwhile; in backward the gradient of one besides.
        largest = sorted((sum(_bytes(tensor) for tensor in unit) for unit in units), reverse=True)
        share, optimizer = math.ceil(whole / processes), math.ceil(sum(states) / processes)
        gathered = sum(largest[:2]) + sum(largest[:1])
        averages = math.ceil(sum(average_bytes) / processes)
        return Held(share, gathered, optimizer, 0, share, math.ceil(update / processes), averages)
    if kind == "none":
        # DistributedDataParallel's buckets, or what earlier passes have made.
        at_rest = whole if (processes > 1 or training.passes > 1) and not training.fused_backward else 0
        gradients = collected_bytes(whole) if training.fused_backward else whole
        visiting = largest_together([sum(map(_bytes, block)) for block in training.swapped])
        return Held(whole, visiting, sum(states), at_rest, gradients, update, sum(average_bytes))
    order = range(len(sizes)) if kind == "oss" else sorted(range(len(sizes)), key=lambda place: -sizes[place])
    shares = deal([trained[place].numel() for place in order], processes)
    optimizer = max(sum(states[order[place]] for place in share) for share in shares)
    averages = max(sum(average_bytes[order[place]] for place in share) for share in shares)
    if kind == "zero1":
        return Held(whole, 0, optimizer, whole, whole, update, averages)
    elements = min(OSS_BUCKET, OSS_ALL_BUCKETS // processes, sum(tensor.numel() for tensor in trained))
    room = trained[0].element_size() * elements
    buckets, alone = zip(*(_oss_buckets([sizes[place] for place in share], room) for share in shares), strict=True)
    return Held(whole, 0, optimizer, sum(buckets), sum(buckets) + max(alone), update, averages)


def deal(numels: Sequence[int], processes: int) -> list[list[int]]:
    """Places of whole parameters, each with the process that has the fewest elements so far, as OSS and zero1 do."""
    shares: list[list[int]] = [[] for _ in range(processes)]
    totals = [0] * processes
    for place, numel in enumerate(numels):
        process = totals.index(min(totals))
        shares[process].append(place)
        totals[process] += numel
    return shares


def _oss_buckets(sizes: Sequence[int], room: int) -> tuple[int, int]:
    """Bytes of one process's gradients that travel in its bucket, smallest first, and of those that travel alone."""
    bucket = 0
    for size in sorted(sizes):
        bucket += size if bucket + size < room else 0
    return bucket, sum(sizes) - bucket


def _states(trained: Sequence[Tensor], training: Training) -> tuple[list[int], int]:
    """Bytes of each parameter's state, and the most that a step takes besides, found by a step for each shape."""
    by_shape: dict[Any, tuple[int, int]] = {}
    together: int | None = None
    for tensor in trained:
        key = (tuple(tensor.shape), tensor.dtype)
        if key not in by_shape:
            state, extra, together = _state(*key, training)
            by_shape[key] = state, extra
    found = [by_shape[tuple(tensor.shape), tensor.dtype] for tensor in trained]
    update = max((extra for _, extra in found), default=0)
    if together is not None and not training.fused_backward:  # small parameters are updated as one
        elements = min(together, sum(tensor.numel() for tensor in trained))
        update = max(update, _state((elements,), trained[0].dtype, training)[1])
    return [state for state, _ in found], update


def _state(shape: tuple[int, ...], dtype: torch.dtype, training: Training) -> tuple[int, int, int | None]:
    """Bytes of a parameter's state, what a step takes besides, and how many elements are updated together, if any."""
    parameter = nn.Parameter(torch.zeros(shape, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = training.make_optimizer([ParameterGroup("unet", [parameter], 1e-6)])
    with LiveBytes() as live:
        optimizer.step()
    values = [value for value in optimizer.state[parameter].values() if isinstance(value, Tensor)]
    state = sum(_bytes(value) for value in values)
    return state, max(0, live.peak - state), getattr(optimizer, "elements_at_once", None)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
