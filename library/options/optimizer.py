"""Options of the optimizer and its learning rates."""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.options.flag import OptionGroup, flag

if TYPE_CHECKING:
    from library.options.training import TrainingOptions

SHARDINGS = ("none", "oss", "zero1", "fsdp")  # library.training.engine.sharding
LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial")


def learning_rates(text: str) -> tuple[float, ...]:
    """Numbers of at least 0, with commas between."""
    try:
        rates = tuple(map(float, text.split(",")))
    except ValueError:
        rates = (math.nan,)
    if not all(0 <= rate < math.inf for rate in rates):
        raise ValueError("must be learning rates, numbers of at least 0 with commas between")
    return rates


def steps_or_share(text: str) -> float:
    """A whole number of steps, or a share of all steps below 1."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not (0 <= value < 1 or (value.is_integer() and value >= 1)):
        raise ValueError("must be a whole number of steps, or a share of the run below 1")
    return int(value) if value.is_integer() else value


@dataclass(frozen=True, kw_only=True)
class OptimizerOptions(OptionGroup):
    """The optimizer, what of it is shared among processes, the learning rate and its schedule."""

    title: ClassVar[str] = "optimizer and schedule"
    page: ClassVar[str] = "memory.md"

    optimizer_type: str = flag(
        "AdamW",
        "Train with this optimizer: AdamW, AdaFactor, AdamW8bit, Lion, Lion8bit, SGDNesterov, "
        "SGDNesterov8bit, another class of torch.optim, module.Class of an installed package, or oss, which"
        " is AdamW with --sharding=oss",
        metavar="NAME",
        shorthands={
            "use_8bit_adam": ("AdamW8bit", "Say --optimizer_type=AdamW8bit (needs bitsandbytes)"),
            "use_lion_optimizer": ("Lion", "Say --optimizer_type=Lion (needs lion-pytorch)"),
        },
    )
    optimizer_args: tuple[str, ...] = flag(
        (),
        'Give the optimizer these arguments, for example "weight_decay=0.01" "betas=0.9,0.999"',
        metavar="NAME=VALUE",
    )
    sharding: str | None = flag(
        None,
        "Share among several processes: none: nothing; oss: gradients and optimizer state (fairscale); "
        "zero1: optimizer state (torch); fsdp: weights, too (torch); on one process there is nothing to "
        "share (default: none, or oss with --optimizer_type=oss)",
        choices=SHARDINGS,
    )
    learning_rate: float = flag(2e-6, "Train the U-Net at this learning rate; 0: it is not trained", least=0)
    lr_scheduler: str = flag(
        "constant", "Change the learning rates over the run by this schedule", choices=LR_SCHEDULERS
    )
    lr_warmup_steps: float = flag(
        0,
        "Warm the learning rates up over so many steps, or below 1 over that share of the run; not for constant",
        read=steps_or_share,
        is_text=False,
        metavar="N",
    )
    lr_scheduler_num_cycles: int = flag(
        1, "Restart cosine_with_restarts so many times", least=1, idle_without="lr_scheduler=cosine_with_restarts"
    )
    lr_scheduler_power: float = flag(
        1.0, "Use this power for polynomial", least=0, idle_without="lr_scheduler=polynomial"
    )
    max_grad_norm: float = flag(1.0, "Clip the gradient's norm to this; 0: no clipping", least=0)

    def warmup_steps(self, steps: int) -> int:
        """Steps of warm-up in a run of so many steps."""
        return int(self.lr_warmup_steps * steps) if 0 < self.lr_warmup_steps < 1 else int(self.lr_warmup_steps)

    @property
    def block_rates(self) -> tuple[float, ...]:
        """Learning rates of the U-Net's blocks; () where all of it has one."""
        return ()

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where the warm-up does nothing or is longer than the run."""
        warmup, steps = self.lr_warmup_steps, options.run.max_train_steps
        if self.lr_scheduler == "constant" and warmup:
            yield f"--lr_warmup_steps={warmup} has no effect with --lr_scheduler=constant; use constant_with_warmup"
        if options.run.max_train_epochs is None and warmup > steps:
            yield warmup_too_long(int(warmup), steps)
        if options.precision.full_bf16 and not self.block_rates and not self.learning_rate:
            yield (
                "--full_bf16 rounds the U-Net to bf16, also where --learning_rate=0 freezes it, and checkpoints would "
                "have it rounded; leave one of the two out"
            )


@dataclass(frozen=True, kw_only=True)
class BlockRateOptimizerOptions(OptimizerOptions):
    """The optimizer, with a learning rate for each block of the U-Net."""

    block_lr: tuple[float, ...] | None = flag(
        None,
        "Train the U-Net's blocks at these learning rates in place of --learning_rate, with commas between:"
        " the embeddings of time and size, the input blocks, the middle block's 3 layers, the output "
        "blocks, the last layer; 23 for SDXL, or one for all; 0: the block is not trained",
        read=learning_rates,
        is_text=False,
        metavar="RATE,RATE,...",
    )

    @property
    def block_rates(self) -> tuple[float, ...]:
        """Learning rates of the U-Net's blocks; () where all of it has one."""
        return self.block_lr or ()

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where all rates are 0, besides what any optimizer says."""
        yield from super().check(options)
        encoders = options.text_encoders.rates(self.learning_rate)
        if self.block_rates and not any(self.block_rates) and not any(encoders):
            yield "--block_lr: all rates are 0, and no text encoder trains: nothing is learned; raise one"


def warmup_too_long(warmup_steps: int, max_train_steps: int) -> str:
    """A sentence about a warm-up that is longer than the run."""
    return (
        f"--lr_warmup_steps={warmup_steps} is longer than the run of {max_train_steps} steps, as --max_train_steps or "
        "--max_train_epochs has it; shorten the warm-up"
    )


def wrong_number_of_rates(rates: int, blocks: int) -> str:
    """A sentence about a --block_lr that is not for this model."""
    return f"--block_lr has {rates} rates, and this model's U-Net {blocks} blocks; give as many, or one"
