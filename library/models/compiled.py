"""The U-Net's blocks compiled by torch.compile, those that are equal but for their weights as one program.

The whole network as one graph would be compiled anew, for minutes, for every bucket. Here a block is the unit, its
rows, columns and tokens are left open, and blocks of one class with weights of the same shapes share what is compiled:
SDXL's 17 residual blocks and 70 transformer layers are 14 programs. Names of parameters stay as they are, for a block
is neither wrapped nor replaced. The fused functions of library.models.fused_ops are traced as they are.
"""

from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from library.models import attention, keyed_dropout
from library.models.unet import Block, UNet

# Of one program: forward with gradients and without, each for the batch that trains and that of sample pictures; and
# once more where a size leads to another kernel. torch's own limit is 8, after which blocks run plain.
MOST_VERSIONS = 32
# On the CPU inductor lays convolutions out anew (channels last), and fixes rows and columns by that: each
# bucket would be compiled anew. On GPUs it leaves that by itself where sizes are open.
_OPTIONS: dict[str, dict[str, Any]] = {"inductor": {"layout_optimization": False}}


class Compiled:
    """What equal blocks call in place of `compute`."""

    def __init__(self, kind: type[Block], backend: str) -> None:
        # Without `isolate_recompiles` all blocks of a class would share the limit, for they share the code.
        compile_: Any = torch.compile  # whose annotations lack the last two
        self.compute = compile_(
            kind.compute,
            backend=backend,
            options=_OPTIONS.get(backend),
            isolate_recompiles=True,
            recompile_limit=MOST_VERSIONS,
        )

    def __call__(self, block: Block, x: Tensor, condition: Tensor) -> Tensor:
        for place in (2, 3) if x.dim() == 4 else (1,):  # (B, C, H, W) or (B, L, C)
            torch._dynamo.maybe_mark_dynamic(x, place)
        return self.compute(block, x, condition)

    def __deepcopy__(self, memo: dict[int, Any]) -> None:
        """Copies of a block are not compiled: they are made to look at shapes, or to be saved."""


class CompiledBlocks:
    """A record of what was compiled, for the run's report."""

    def __init__(self, blocks: int, programs: int, backend: str, attention_backend: str) -> None:
        self.blocks, self.programs, self.backend, self.attention_backend = blocks, programs, backend, attention_backend
        self._graphs_before, self._breaks_before = _graphs(), _graph_breaks()

    @property
    def graphs(self) -> int:
        """How many graphs have been compiled so far; forward and backward together count as one."""
        return _graphs() - self._graphs_before

    @property
    def graph_breaks(self) -> int:
        """How many places were met so far where a block is cut into several graphs."""
        return _graph_breaks() - self._breaks_before

    def lines(self) -> list[str]:
        """For the run's report."""
        inside = self.attention_backend == attention.COMPILED
        where = "attention in them" if inside else "attention between their graphs"
        return [
            f"torch.compile: {self.blocks} blocks of the U-Net as {self.programs} programs by {self.backend}, "
            f"{self.graphs} graphs compiled, {self.graph_breaks} graph breaks; {where}: {self.attention_backend}"
        ]


def equal_blocks(unet: UNet) -> dict[Hashable, list[Block]]:
    """The blocks, those together that differ in the values of their weights alone."""
    found: dict[Hashable, list[Block]] = {}
    for block in unet.blocks():
        parameters = tuple((name, one.shape, one.dtype, one.requires_grad) for name, one in block.named_parameters())
        found.setdefault((type(block), parameters), []).append(block)
    return found


def plan(unet: UNet, backend: str) -> str:
    """What will be compiled, for the log."""
    return f"torch.compile: {len(unet.blocks())} blocks of the U-Net as {len(equal_blocks(unet))} programs by {backend}"


def settle() -> None:
    """Set what torch.compile does beyond one call of it, for the whole process."""
    attention.keep_out_of_graphs()
    keyed_dropout.keep_out_of_graphs()
    # Else DistributedDataParallel would cut graphs at its buckets, which it cannot where there are autograd functions.
    # Blocks are small enough: their gradients travel while the blocks before them are in backward.
    torch._dynamo.config.optimize_ddp = False
    # Else what the fused functions compute again in backward would be kept from forward on: three times
    # as much of a residual block.
    torch._functorch.config.cse = False


def compile_blocks(unet: UNet, backend: str, attention_backend: str, dtype: torch.dtype) -> CompiledBlocks:
    """Compile every block, each when it is first called.

    Args:
        unet: on its device; it may be sharded already.
        backend: a name that torch.compile knows.
        attention_backend: the one asked for; what runs in its place on the device is compiled.
        dtype: what attention is computed in.
    """
    settle()
    runs = attention.runs_on(attention_backend, next(unet.parameters()).device, dtype)
    unet.set_attention_backend(runs)
    groups = equal_blocks(unet)
    for blocks in groups.values():
        compiled = Compiled(type(blocks[0]), backend)
        for block in blocks:
            block.compiled = compiled
    return CompiledBlocks(len(unet.blocks()), len(groups), backend, runs)


def _graphs() -> int:
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def _graph_breaks() -> int:
    from torch._dynamo.utils import counters

    return sum(counters["graph_break"].values())
