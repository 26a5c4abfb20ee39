"""Where a module lies and in which precision: devices, casts, attention, swapped blocks, compiling."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from library.errors import InputError
from library.models.attention_trial import usable
from library.models.compiled import CompiledBlocks, compile_blocks, plan
from library.models.denoiser import Denoiser
from library.options.training import TrainingOptions
from library.training.engine.block_swap import HostBlocks, move_all_but
from library.training.engine.precision import DTYPES
from library.training.engine.swap_schedule import choose_blocks

_GIB = 2**30


@dataclass
class Placement:
    """A module as it lies on its device.

    Attributes:
        compute_dtype: what autocast computes in; fp32 for none.
        attention_backend: the one that is asked for.
        swapped: blocks whose weights live in the CPU's memory (--blocks_to_swap).
        host_blocks: what brings them to the device; None where nothing is swapped, and in a dry run.
        compiled: what was compiled, once `compile` has been called.
        lines: what was resolved, for the log.
    """

    module: Denoiser
    device: torch.device
    compute_dtype: torch.dtype
    attention_backend: str
    swapped: Sequence[nn.Module]
    host_blocks: HostBlocks | None
    lines: list[str] = field(default_factory=list)
    compiled: CompiledBlocks | None = None

    def compile(self, dynamo_backend: str) -> None:
        """Compile the U-Net by block; copies that were made of it stay plain. Called once the module is sharded."""
        self.compiled = compile_blocks(self.module.unet, dynamo_backend, self.attention_backend, self.compute_dtype)


def place(module: Denoiser, options: TrainingOptions, device: torch.device) -> Placement:
    """Choose precisions and the attention backend of a module, and move it to the device.

    What does not train computes in the run's precision; with --full_bf16 what trains is in bf16, too.

    Raises:
        InputError: more blocks are to be swapped than there are.
    """
    compute_dtype = DTYPES[options.precision.mixed_precision]
    module.cast_frozen(compute_dtype)
    if options.precision.full_bf16:
        module.cast_trained(torch.bfloat16)
    backend = "npu" if options.model.enable_npu_flash_attention else "sdpa"
    if not options.run.dry_run:
        backend = usable(backend, device, compute_dtype, module.unet.config.largest_head_size)
    module.unet.set_attention_backend(backend)
    lines = []
    if options.compiling.torch_compile:
        lines.append(plan(module.unet, options.compiling.dynamo_backend))
    swapped, swap_lines = _blocks_to_swap(module, options.memory.blocks_to_swap)
    # A dry run, on the CPU, leaves everything where it is.
    host_blocks = HostBlocks(swapped, device) if swapped and not options.run.dry_run else None
    if host_blocks is not None:
        move_all_but(module, device, host_blocks.parameters)
    else:
        module.to(device)
    return Placement(module, device, compute_dtype, backend, swapped, host_blocks, [*lines, *swap_lines])


def _blocks_to_swap(module: Denoiser, count: int | None) -> tuple[list[nn.Module], list[str]]:
    """The U-Net's blocks that --blocks_to_swap=N is about, and a line about them.

    Raises:
        InputError: there are fewer.
    """
    blocks = module.unet.blocks()
    if count is None:
        return [], []
    if count > len(blocks):
        raise InputError(f"--blocks_to_swap={count}: this model's U-Net has {len(blocks)} blocks; give at most that")
    sizes = [sum(one.numel() * one.element_size() for one in block.parameters()) for block in blocks]
    chosen = choose_blocks(sizes, count)
    weights = sum(sizes[number] for number in chosen) / _GIB
    line = f"blocks swapped: {count} of {len(blocks)} of the U-Net, {weights:.3f} GiB of weights in the CPU's memory"
    return [blocks[number] for number in chosen], [line]
