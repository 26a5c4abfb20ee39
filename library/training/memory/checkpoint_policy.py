"""Which of the U-Net's blocks are computed again for backward, so that a step stays under a limit of memory.

What a block costs to compute again (its matrix arithmetic) and what it keeps otherwise are found on shapes alone, so
every process chooses the same, and before anything trains. Chen et al. 2016 (1604.06174) checkpoint every block; here
those come first that give back the most bytes for their arithmetic.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.training.engine.meta_copy import without_data
from library.training.memory.estimate import GIB, MemoryEstimate
from library.training.memory.meta_run import Autocast, LiveShapes, fused_attention


@dataclass(frozen=True)
class BlockCost:
    """What checkpointing a block takes and gives."""

    flops: int  # of computing it again
    kept_bytes: int  # for backward without checkpointing, besides its input and output


def choose_checkpoints(
    module: Any,
    compute_dtype: torch.dtype,
    step: Callable[[Any], Tensor],
    predict: Callable[[], MemoryEstimate],
    limit_bytes: float,
) -> list[str]:
    """Set which blocks of `module.unet` are checkpointed; says so in lines for the log.

    Args:
        compute_dtype: what autocast computes in; fp32 for none.
        step: the loss of a data-less copy of `module`, made of tensors on the meta device.
        predict: what a step takes as the module's blocks are set.

    Raises:
        InputError: the limit is too low even with every block checkpointed.
    """
    unet = module.unet
    order = checkpoint_order(block_costs(module, compute_dtype, step))

    found: dict[int, int] = {}

    def bytes_with(count: int) -> int:
        unet.checkpoint_blocks(set(order[:count]))
        found[count] = predict().total
        return found[count]

    least = bytes_with(len(order))
    if least > limit_bytes:
        raise InputError(
            f"--checkpoint_memory_gb={limit_bytes / GIB:g}: with every block checkpointed a step still takes "
            f"{least / GIB:.3f} GiB; raise it, or lower --train_batch_size or --resolution"
        )
    low, high = 0, len(order)  # `high` is enough at all times; fewer than `low` are not
    while low < high:
        middle = (low + high) // 2
        if bytes_with(middle) <= limit_bytes:
            high = middle
        else:
            low = middle + 1
    unet.checkpoint_blocks(set(order[:high]))
    return [
        f"checkpoint policy: auto, {high} of {len(order)} blocks of the U-Net for {limit_bytes / GIB:g} GiB, "
        f"estimated {found[high] / GIB:.3f} GiB"
    ]


def checkpoint_order(costs: Sequence[BlockCost]) -> list[int]:
    """The blocks' numbers, the least arithmetic per byte first; of equals those that are computed first.

    A block that backward comes to first is computed again while all before it is still held.
    """

    def rank(number: int) -> tuple[bool, Fraction, int]:
        cost = costs[number]
        keeps = cost.kept_bytes > 0
        return not keeps, Fraction(cost.flops, cost.kept_bytes if keeps else 1), number

    return sorted(range(len(costs)), key=rank)


def block_costs(module: Any, compute_dtype: torch.dtype, step: Callable[[Any], Tensor]) -> list[BlockCost]:
    """Of every block of `module.unet`, by a forward pass on shapes; arithmetic is counted once for each shape."""
    shapes = without_data(module)
    shapes.unet.enable_gradient_checkpointing(False)
    blocks = shapes.unet.blocks()
    kept: dict[Any, int] = {}
    given: dict[Any, tuple[Any, ...]] = {}

    def start(block: Any, inputs: tuple[Any, ...]) -> None:
        given[block] = inputs
        kept[block] = -live.bytes

    def end(block: Any, _: Any, output: Tensor) -> None:
        kept[block] += live.bytes - output.untyped_storage().nbytes()

    handles = [block.register_forward_pre_hook(start) for block in blocks]
    handles += [block.register_forward_hook(end) for block in blocks]
    with LiveShapes() as live, fused_attention(), Autocast(compute_dtype):
        live.hold([*shapes.parameters(), *shapes.buffers()])
        step(shapes)
    for handle in handles:
        handle.remove()
    flops: dict[Any, int] = {}
    for block in blocks:
        key = _shape(block, given[block])
        if key not in flops:
            flops[key] = _flops(block, given[block], compute_dtype)
    return [BlockCost(flops[_shape(block, given[block])], kept[block]) for block in blocks]


def _shape(block: nn.Module, inputs: Sequence[Tensor]) -> Any:
    """What a block's arithmetic depends on."""
    return type(block), *(tuple(one.shape) for one in (*block.parameters(), *inputs))


def _flops(block: nn.Module, inputs: Sequence[Tensor], compute_dtype: torch.dtype) -> int:
    """Of a block's forward pass. Attention is written out here, so that its products are counted."""
    # Brings triton, which is not for a run without a policy to wait for.
    from torch.utils.flop_counter import FlopCounterMode

    with torch.no_grad(), FlopCounterMode(display=False) as counter, Autocast(compute_dtype):
        block(*inputs)
    return counter.get_total_flops()
