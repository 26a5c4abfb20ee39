"""Options that save a device's memory: recomputing, updates in backward, blocks in the CPU's memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.options.flag import OptionGroup, flag

if TYPE_CHECKING:
    from library.options.training import TrainingOptions

CHECKPOINT_POLICIES = ("full", "auto")


@dataclass(frozen=True, kw_only=True)
class MemoryOptions(OptionGroup):
    """What is recomputed, freed early or kept in the CPU's memory."""

    title: ClassVar[str] = "memory"
    page: ClassVar[str] = "memory.md"

    gradient_checkpointing: bool = flag(False, "Recompute activations in backward: less memory, more time")
    checkpoint_policy: str = flag(
        "full",
        "Recompute this under --gradient_checkpointing: full: every block; auto: as few blocks of the U-Net"
        " as --checkpoint_memory_gb needs, the cheapest by arithmetic per byte first",
        choices=CHECKPOINT_POLICIES,
        needs="gradient_checkpointing",
    )
    checkpoint_memory_gb: float | None = flag(
        None,
        "Let a step take so much of a device's memory with --checkpoint_policy=auto, in GiB as --dry_run "
        "has it; leave some room, for the estimate sees neither fragmentation nor libraries' workspaces",
        above=0,
        metavar="GIB",
        needs="checkpoint_policy=auto",
    )
    fused_backward_pass: bool = flag(
        False,
        "Update weights in backward and free their gradients soon; --max_grad_norm then clips each tensor's"
        " gradient by itself, for the norm of all is not known yet",
    )
    blocks_to_swap: int | None = flag(
        None,
        "Keep the weights, gradients and optimizer state of the U-Net's N largest blocks in the CPU's "
        "memory; weights are brought to the device while a block computes, and updated on the CPU",
        least=1,
    )

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where what is recomputed has no limit, or updates in backward miss what they need."""
        if self.checkpoint_policy == "auto" and self.checkpoint_memory_gb is None:
            yield (
                "--checkpoint_policy=auto needs to know what a step may take; add --checkpoint_memory_gb, or use "
                "--checkpoint_policy=full"
            )
        if self.fused_backward_pass:
            yield from self._check_fused_backward(options)

    def _check_fused_backward(self, options: "TrainingOptions") -> Iterator[str]:
        flag_ = "--fused_backward_pass updates each weight as soon as its gradient is there"
        accumulation = options.run.gradient_accumulation_steps
        if accumulation > 1:
            yield (
                f"{flag_}, so gradients cannot be added up over --gradient_accumulation_steps={accumulation}; raise "
                "--train_batch_size instead, or leave one of the two out"
            )
        if options.precision.mixed_precision == "fp16":
            yield (f"{flag_}, and fp16's loss scaling must see all of them before; use --mixed_precision=bf16 or no")
