"""Options of the run: how long, how precise, what is written and when."""

from argparse import ArgumentParser, _ArgumentGroup
from dataclasses import dataclass
from pathlib import Path

from library.diffusion.samplers import NAMES
from library.options.parser import file_stem, positive_float, positive_int, seed

CHECKPOINT_POLICIES = ("full", "auto")
DYNAMO_BACKEND = "inductor"
DYNAMO_BACKENDS = [
    "eager", "aot_eager", DYNAMO_BACKEND, "aot_ts_nvfuser", "nvprims_nvfuser", "cudagraphs", "ofi", "fx2trt", "onnxrt",
    "tensort", "ipex", "tvm",
]  # fmt: skip
BF16_UPDATES = ("stochastic", "kahan", "nearest")  # library.training.engine.bf16_update


@dataclass(frozen=True)
class RunOptions:
    """Length, precision and seed of the run."""

    max_train_steps: int
    max_train_epochs: int | None
    mixed_precision: str
    full_fp16: bool
    full_bf16: bool
    bf16_update: str | None
    seed: int | None
    gradient_checkpointing: bool
    checkpoint_policy: str
    checkpoint_memory_gb: float | None
    gradient_accumulation_steps: int
    torch_compile: bool
    dynamo_backend: str
    ddp_timeout: int  # minutes
    dry_run: bool


@dataclass(frozen=True)
class SavingOptions:
    """Where checkpoints and logs go, in which form, how often."""

    output_dir: Path
    output_name: str | None
    save_every_n_epochs: int | None
    save_every_n_steps: int | None
    save_precision: str | None
    save_model_as: str | None
    save_last_n_epochs: int | None
    save_last_n_steps: int | None
    save_state: bool
    save_state_every_n_steps: int | None
    save_state_every_n_minutes: float | None
    save_state_on_train_end: bool
    save_last_n_epochs_state: int | None
    save_last_n_steps_state: int | None
    resume: str | None
    resume_anyway: bool
    logging_dir: Path | None
    case_name: str | None


@dataclass(frozen=True)
class PreviewOptions:
    """Which pictures are sampled while training, and when."""

    sample_prompts: Path | None
    sample_every_n_steps: int | None
    sample_every_n_epochs: int | None
    sample_at_first: bool
    sample_sampler: str


def add_run_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `RunOptions` to a parser."""
    group = parser.add_argument_group("run")
    group.add_argument("--max_train_steps", type=positive_int, default=1600, help="optimizer steps (%(default)s)")
    group.add_argument(
        "--max_train_epochs", "--max_train_epoch", type=positive_int, help="epochs; takes precedence over the steps"
    )
    group.add_argument("--mixed_precision", choices=["no", "fp16", "bf16"], default="no", help="(%(default)s)")
    group.add_argument(
        "--full_bf16",
        action="store_true",
        help="with --mixed_precision=bf16: weights, gradients and optimizer state in bf16, too, half the memory; for "
        "models that do not fit otherwise, for fp32 weights learn a little better",
    )
    group.add_argument(
        "--bf16_update",
        choices=BF16_UPDATES,
        help="how --full_bf16 rounds what a step changes: stochastic: up or down at random, right in the mean; kahan: "
        "to the nearest, and what is lost is kept for the next step: nearest to fp32, 2 bytes a weight more; nearest: "
        "loses steps below 1/512 of a weight, to compare with (default: stochastic)",
    )
    group.add_argument("--full_fp16", action="store_true", help="refused, with the reasons; use --full_bf16")
    group.add_argument(
        "--seed",
        type=seed,
        help="of everything random; the same seed and data give the same run (default: drawn, logged)",
    )
    group.add_argument(
        "--gradient_checkpointing",
        action="store_true",
        help="recompute activations in backward: less memory, more time",
    )
    group.add_argument(
        "--checkpoint_policy",
        choices=CHECKPOINT_POLICIES,
        default="full",
        help="what --gradient_checkpointing recomputes: full: every block; auto: as few blocks of the U-Net as "
        "--checkpoint_memory_gb needs, the cheapest by arithmetic per byte first (%(default)s)",
    )
    group.add_argument(
        "--checkpoint_memory_gb",
        type=positive_float,
        metavar="GIB",
        help="with --checkpoint_policy=auto: what a step may take of a device's memory, in GiB as --dry_run has it; "
        "leave some room, for the estimate sees neither fragmentation nor libraries' workspaces",
    )
    group.add_argument(
        "--gradient_accumulation_steps", type=positive_int, default=1, help="passes per optimizer step (%(default)s)"
    )
    group.add_argument(
        "--torch_compile",
        action="store_true",
        help="compile the U-Net's blocks by torch.compile, once for all buckets",
    )
    group.add_argument(
        "--dynamo_backend",
        choices=DYNAMO_BACKENDS,
        default=DYNAMO_BACKEND,
        help="what compiles them; it is tried before training (%(default)s)",
    )
    group.add_argument(
        "--ddp_timeout",
        type=positive_int,
        default=30,
        help="minutes that processes wait for each other before they give up (%(default)s)",
    )
    group.add_argument(
        "--dry_run", action="store_true", help="print the resolved plan and an estimate of memory, then stop"
    )


def add_saving_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `SavingOptions` to a parser."""
    group = parser.add_argument_group("saving and logging")
    group.add_argument("--output_dir", required=True, type=Path, help="where checkpoints, samples and metrics.jsonl go")
    group.add_argument(
        "--output_name", type=file_stem, help="stem of the checkpoints' names (default: epoch, at and last)"
    )
    group.add_argument("--save_every_n_epochs", type=positive_int, help="checkpoint {name}-{epoch} each n epochs")
    group.add_argument("--save_every_n_steps", type=positive_int, help="checkpoint {name}-step{step} each n steps")
    group.add_argument(
        "--save_last_n_epochs", type=positive_int, help="keep that many of the checkpoints of epochs (default: all)"
    )
    group.add_argument(
        "--save_last_n_steps",
        type=positive_int,
        help="keep the checkpoints of the last n steps, counted in steps (default: all)",
    )
    _add_state_arguments(group)
    group.add_argument(
        "--save_precision", choices=["float", "fp16", "bf16"], help="of the saved weights (default: float)"
    )
    group.add_argument(
        "--save_model_as",
        choices=["ckpt", "safetensors", "diffusers", "diffusers_safetensors"],
        help="form of the checkpoints (default: as the model that was loaded)",
    )
    group.add_argument("--logging_dir", type=Path, help="TensorBoard events go to a new folder in it")
    group.add_argument(
        "--case_name",
        type=file_stem,
        help="at the end also write the run's figures as OUTPUT_DIR/CASE_NAME.log (the launchers set it)",
    )


def _add_state_arguments(group: _ArgumentGroup) -> None:
    group.add_argument(
        "--save_state",
        action="store_true",
        help="with every checkpoint also {name}-state, from which a run goes on exactly (--resume)",
    )
    group.add_argument(
        "--save_state_every_n_steps", type=positive_int, help="a state each n steps, without a checkpoint"
    )
    group.add_argument(
        "--save_state_every_n_minutes", type=positive_float, help="a state each n minutes, without a checkpoint"
    )
    group.add_argument("--save_state_on_train_end", action="store_true", help="a state at the end, too")
    group.add_argument(
        "--save_last_n_epochs_state",
        type=positive_int,
        help="keep that many of the states of epochs (default: as --save_last_n_epochs)",
    )
    group.add_argument(
        "--save_last_n_steps_state",
        type=positive_int,
        help="keep the states of the last n steps, counted in steps (default: as --save_last_n_steps)",
    )
    group.add_argument(
        "--resume",
        metavar="DIR|auto",
        help="go on from a training state; auto: from the newest whole one in --output_dir, else from the beginning",
    )
    group.add_argument(
        "--resume_anyway",
        action="store_true",
        help="resume although data, seed or global batch are other ones than the state's",
    )


def add_preview_arguments(parser: ArgumentParser) -> None:
    """Add the flags of `PreviewOptions` to a parser."""
    group = parser.add_argument_group("sample pictures while training")
    group.add_argument(
        "--sample_prompts",
        type=Path,
        help="prompts to sample, one a line (--w --h --d --s --l --n --ss), or .toml, .json",
    )
    group.add_argument("--sample_every_n_steps", type=positive_int, help="sample each n steps")
    group.add_argument("--sample_every_n_epochs", type=positive_int, help="sample each n epochs")
    group.add_argument("--sample_at_first", action="store_true", help="sample before the first step, too")
    group.add_argument(
        "--sample_sampler", choices=NAMES, default="ddim", help="where a prompt names none (%(default)s)"
    )
