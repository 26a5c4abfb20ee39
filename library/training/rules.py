"""Rules of options that hang on the device, on torch's optimizers or on the data; `options/rules.py` checks the others.

They are checked before anything is read or loaded; each error names the flag and the way out.
"""

import logging
from collections.abc import Sequence

import torch

from library import device as devices
from library.errors import InputError, Problems
from library.models.family import Family
from library.models.files.layout import read_layout
from library.models.model import no_such_layer
from library.models.prediction import check_v2
from library.options.compiling import CompilingOptions
from library.options.optimizer import wrong_number_of_rates
from library.options.training import TrainingOptions
from library.training.engine.optimizers import choose_optimizer
from library.training.engine.sharding import sharding_kind

logger = logging.getLogger(__name__)


def check_options_here(
    options: TrainingOptions, families: Sequence[Family], device: torch.device, processes: int
) -> None:
    """Raise InputError where options cannot go together on a device or with the model; it names all that is wrong.

    Args:
        families: those that the script trains.
        processes: of the run, each with a device of its own.
    """
    problems = Problems()
    with problems.noted():
        check_optimizer(options)
    with problems.noted():
        check_swapping(options, device, processes)
    with problems.noted():
        check_compiling(options.compiling, device)
    with problems.noted():
        check_model_flags(options, families)
    problems.raise_any()


def check_model_flags(options: TrainingOptions, families: Sequence[Family]) -> None:
    """Raise InputError where --v2, --clip_skip or --block_lr are not for the model, as far as its files tell it soon.

    Reading the model finds the rest; but that comes behind the data, whose index may take hours.
    """
    source, clip_skip = options.model.pretrained_model_name_or_path, options.clip_skip
    rates = options.optimizer.block_rates
    layout = read_layout(source, families)
    if layout is None:
        return
    problems = Problems()
    with problems.noted():
        check_v2(options.v2, layout.family, source)
    layers = min(layout.encoder_layers)
    if clip_skip is not None and 0 < layers < clip_skip:
        problems.found.append(no_such_layer(clip_skip, layers))
    if len(rates) > 1 and layout.unet_blocks and len(rates) != layout.unet_blocks:
        problems.found.append(wrong_number_of_rates(len(rates), layout.unet_blocks))
    problems.raise_any()


def check_optimizer(options: TrainingOptions) -> None:
    """Raise InputError where optimizer, sharding and precision cannot go together."""
    optimizer = options.optimizer
    choice = choose_optimizer(optimizer.optimizer_type, optimizer.optimizer_args)
    sharding = sharding_kind(optimizer.sharding, optimizer.optimizer_type)
    if sharding == "fsdp" and not choice.by_element:
        raise InputError(
            f"--sharding=fsdp leaves each process some rows of a tensor, and {choice.kind.__name__} needs all of them; "
            "use --sharding=oss or zero1, or --optimizer_type=AdamW"
        )
    if options.precision.full_bf16 and "8bit" in choice.kind.__name__:
        raise InputError(
            f"--full_bf16 steps in fp32 and rounds, and {choice.kind.__name__} updates bf16 weights in a kernel of its "
            "own, to the nearest; use --optimizer_type=AdamW or AdaFactor, or leave --full_bf16 out"
        )
    if options.memory.fused_backward_pass and sharding != "none":
        raise InputError(
            "--fused_backward_pass updates each weight as soon as its gradient is there, and "
            f"--sharding={sharding} hands gradients round after backward; leave one of the two out"
        )
    if choice.sets_its_own_rates:
        logger.warning(
            "--optimizer_type=%s sets its own rates: --learning_rate, the text encoders' and blocks' rates and "
            "--lr_scheduler, which the log shows, do nothing, except that a rate of 0 freezes; "
            ' it goes by them with --optimizer_args "relative_step=False" "scale_parameter=False"',
            optimizer.optimizer_type,
        )


def check_compiling(options: CompilingOptions, device: torch.device) -> None:
    """Raise InputError where a backend of torch.compile cannot be had on the device."""
    backend, instead = options.dynamo_backend, "use --dynamo_backend=aot_eager or eager, or leave out --torch_compile"
    if not options.torch_compile:
        return
    if devices.is_npu(device) and backend not in ("eager", "aot_eager"):
        raise InputError(
            f"--dynamo_backend={backend} makes no code for Ascend without a code generator of Ascend's own "
            f"(triton-ascend), which nobody has tried here, and its graph mode (torchair) is none of these backends; "
            f"{instead}"
        )
    if backend == "cudagraphs" and devices.is_cpu(device):
        raise InputError(f"--dynamo_backend=cudagraphs needs an NVIDIA GPU, and this run is on the CPU; {instead}")


def check_swapping(options: TrainingOptions, device: torch.device, processes: int) -> None:
    """Raise InputError where --blocks_to_swap has nowhere to swap to, or something needs all weights on the device."""
    if options.memory.blocks_to_swap is None:
        return
    flag = f"--blocks_to_swap={options.memory.blocks_to_swap}"
    if devices.is_cpu(device):
        raise InputError(
            f"{flag} keeps blocks in the CPU's memory, and the CPU is what computes here: there is nothing to save. "
            "Leave it out"
        )
    if options.precision.full_bf16:
        raise InputError(
            f"{flag} has weights on two devices, and --full_bf16 puts small ones together to update them as one; leave "
            "one of the two out"
        )
    if options.compiling.torch_compile:
        raise InputError(
            f"{flag} exchanges the weights of a block each time that it computes, and code of --torch_compile is made "
            "for weights that stay where they are; leave one of the two out"
        )
    sharding = sharding_kind(options.optimizer.sharding, options.optimizer.optimizer_type)
    if processes > 1 and sharding != "none":
        raise InputError(
            f"{flag} updates blocks on the CPU, and --sharding={sharding} shares all weights' gradients or state "
            "among the devices; leave one of the two out (--sharding=fsdp shares the weights, too)"
        )
    if processes > 1 and not options.memory.fused_backward_pass:
        raise InputError(
            f"{flag} on several processes needs --fused_backward_pass, which averages each gradient while it is still "
            "on the device; add that, or use --sharding=fsdp instead"
        )


def check_without_epochs(options: TrainingOptions) -> None:
    """Raise InputError where something happens by epochs of a stream whose number of samples nobody knows."""
    needs = [
        ("--max_train_epochs", options.run.max_train_epochs, "--max_train_steps"),
        ("--save_every_n_epochs", options.saving.save_every_n_epochs, "--save_every_n_steps"),
        ("--sample_every_n_epochs", options.preview.sample_every_n_epochs, "--sample_every_n_steps"),
    ]
    for flag, given, instead in needs:
        if given:
            raise InputError(
                f"{flag}: how many samples an epoch of this stream has is not known. Give {instead}, or put a "
                'sizes.json ({"00000.tar": 10000, …}) beside the shards'
            )
