"""Options of precision: what is computed, kept and updated in which format."""

import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.options.flag import OptionGroup, flag

if TYPE_CHECKING:
    from library.options.training import TrainingOptions

logger = logging.getLogger(__name__)

MIXED_PRECISIONS = ("no", "fp16", "bf16")
BF16_UPDATES = ("stochastic", "kahan", "nearest")
MANY_PASSES = 16  # whose gradients may be added up in bf16 without a warning


@dataclass(frozen=True, kw_only=True)
class PrecisionOptions(OptionGroup):
    """Formats of activations, weights and updates."""

    title: ClassVar[str] = "precision"
    page: ClassVar[str] = "memory.md"

    mixed_precision: str = flag("no", "Compute passes in this format; no: in fp32", choices=MIXED_PRECISIONS)
    full_bf16: bool = flag(
        False,
        "Keep weights, gradients and optimizer state in bf16, too, half the memory, with "
        "--mixed_precision=bf16; for models that do not fit otherwise, since fp32 weights learn a little "
        "better",
    )
    bf16_update: str | None = flag(
        None,
        "Round what a step changes under --full_bf16 in this way: stochastic: up or down at random, right "
        "in the mean; kahan: to the nearest, and what is lost is kept for the next step: nearest to fp32, 2"
        " bytes a weight more; nearest: loses steps below 1/512 of a weight, to compare with (default: "
        "stochastic)",
        choices=BF16_UPDATES,
        needs="full_bf16",
    )

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where weights in bf16 cannot train; a warning where many gradients are added up."""
        if self.full_bf16 and self.mixed_precision != "bf16":
            yield (
                f"--full_bf16 trains bf16 weights, and --mixed_precision={self.mixed_precision} computes with others; "
                "add --mixed_precision=bf16, or leave it out"
            )
        if self.full_bf16 and options.run.gradient_accumulation_steps > MANY_PASSES:
            logger.warning(
                "--full_bf16 adds up gradients in bf16: of --gradient_accumulation_steps=%d passes each loses up to "
                "1/512 of the sum so far; a larger --train_batch_size with fewer passes is more exact",
                options.run.gradient_accumulation_steps,
            )
