"""Options of the optimizer and its learning rates."""

from argparse import ArgumentParser
from dataclasses import dataclass

from library.options.parser import non_negative_float, non_negative_int, positive_int, rate

SHARDINGS = ("none", "oss", "zero1", "fsdp")  # library.training.engine.sharding
EMA_DECAY = 0.9999
LR_SCHEDULERS = ["constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial"]


@dataclass(frozen=True)
class OptimizationOptions:
    """Which parameters train, by which optimizer, at which rates."""

    optimizer_type: str
    optimizer_args: list[str]
    sharding: str | None
    learning_rate: float
    train_text_encoder: bool
    learning_rate_te1: float | None
    learning_rate_te2: float | None
    lr_scheduler: str
    lr_warmup_steps: int
    lr_scheduler_num_cycles: int
    lr_scheduler_power: float
    max_grad_norm: float
    use_ema: bool
    ema_decay: float
    offload_ema: bool
    fused_backward_pass: bool
    blocks_to_swap: int | None


def add_arguments(parser: ArgumentParser) -> None:
    """Add this group's flags to a parser."""
    group = parser.add_argument_group("optimizer and schedule")
    kind = group.add_mutually_exclusive_group()
    kind.add_argument(
        "--optimizer_type",
        default="AdamW",
        metavar="NAME",
        help="AdamW, AdaFactor, AdamW8bit, Lion, Lion8bit, SGDNesterov, SGDNesterov8bit, another class of torch.optim, "
        "module.Class of an installed package, or oss: AdamW with --sharding=oss (%(default)s)",
    )
    kind.add_argument(
        "--use_8bit_adam",
        dest="optimizer_type",
        action="store_const",
        const="AdamW8bit",
        help="--optimizer_type=AdamW8bit (needs bitsandbytes)",
    )
    kind.add_argument(
        "--use_lion_optimizer",
        dest="optimizer_type",
        action="store_const",
        const="Lion",
        help="--optimizer_type=Lion (needs lion-pytorch)",
    )
    group.add_argument(
        "--optimizer_args",
        nargs="*",
        default=[],
        metavar="NAME=VALUE",
        help='for example "weight_decay=0.01" "betas=0.9,0.999"',
    )
    group.add_argument(
        "--sharding",
        choices=SHARDINGS,
        help="what several processes share among themselves: none; oss: gradients and optimizer state (fairscale); "
        "zero1: optimizer state (torch); fsdp: weights, too (torch); on one process there is nothing to share "
        "(default: none, or oss with --optimizer_type=oss)",
    )
    group.add_argument("--learning_rate", type=non_negative_float, default=2e-6, help="of the U-Net (%(default)s)")
    group.add_argument("--train_text_encoder", action="store_true", help="train both text encoders, too")
    group.add_argument(
        "--learning_rate_te1", type=non_negative_float, help="of CLIP-L (default: --learning_rate; 0: not trained)"
    )
    group.add_argument(
        "--learning_rate_te2",
        type=non_negative_float,
        help="of OpenCLIP bigG (default: --learning_rate; 0: not trained)",
    )
    group.add_argument("--lr_scheduler", choices=LR_SCHEDULERS, default="constant", help="(%(default)s)")
    group.add_argument(
        "--lr_warmup_steps",
        type=non_negative_int,
        default=0,
        help="steps of linear warm-up; not for constant (%(default)s)",
    )
    group.add_argument(
        "--lr_scheduler_num_cycles", type=positive_int, default=1, help="restarts of cosine_with_restarts (%(default)s)"
    )
    group.add_argument(
        "--lr_scheduler_power", type=non_negative_float, default=1.0, help="power of polynomial (%(default)s)"
    )
    group.add_argument(
        "--max_grad_norm",
        type=non_negative_float,
        default=1.0,
        help="clip the gradient's norm to it; 0: no clipping (%(default)s)",
    )
    group.add_argument(
        "--use_ema",
        action="store_true",
        help="keep a moving average of what trains: sample from it, save it as {name}-ema beside each checkpoint",
    )
    group.add_argument(
        "--ema_decay",
        type=rate,
        default=EMA_DECAY,
        help="share of the average that a step leaves; less at first, (1 + n) / (10 + n) after n steps (%(default)s)",
    )
    group.add_argument("--offload_ema", action="store_true", help="keep the average in the CPU's memory")
    group.add_argument(
        "--fused_backward_pass",
        action="store_true",
        help="update weights in backward and free their gradients soon; --max_grad_norm then clips each tensor's "
        "gradient by itself, for the norm of all is not known yet",
    )
    group.add_argument(
        "--blocks_to_swap",
        type=positive_int,
        metavar="N",
        help="keep the weights, gradients and optimizer state of the U-Net's N largest blocks in the CPU's memory; "
        "weights are brought to the device while a block computes, and updated on the CPU",
    )
