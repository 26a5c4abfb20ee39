"""Optimizers by the names that --optimizer_type takes, and the learning-rate schedules around them."""

import ast
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library.errors import InputError

OPTIMIZERS = ["AdamW", "oss"]  # oss is AdamW with its state sharded by fairscale (library.training.sharding)

# Makes an optimizer from parameter groups, the optimizer's class and its keyword arguments; a sharded one wraps it.
Construct = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; `name` is what logs call it (lr/unet)."""

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float


def parse_optimizer_args(arguments: Iterable[str]) -> dict[str, Any]:
    """'weight_decay=0.01' and 'betas=0.9,0.999' as keyword arguments.

    Raises:
        InputError: an argument is not NAME=VALUE, or its value is no Python literal.
    """
    parsed = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        try:
            if not (name and equals):
                raise ValueError("no '='")
            parsed[name.strip()] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise InputError(
                f"--optimizer_args {argument!r} is not NAME=VALUE with a number, tuple, True, False or quoted text"
            ) from error
    return parsed


def check_optimizer(optimizer_type: str, arguments: Iterable[str]) -> dict[str, Any]:
    """The optimizer's keyword arguments.

    Raises:
        InputError: the type is not known, or does not take an argument.
    """
    kind = {name.lower(): name for name in OPTIMIZERS}.get(optimizer_type.lower())
    if kind is None:
        raise InputError(f"--optimizer_type {optimizer_type!r} is not known; choose one of {', '.join(OPTIMIZERS)}")
    keywords = parse_optimizer_args(arguments)
    own = {"params", "lr", "fused", "foreach"}
    known = [name for name in inspect.signature(torch.optim.AdamW).parameters if name not in own]
    unknown = [name for name in keywords if name not in known]
    if unknown:
        raise InputError(f"--optimizer_args {unknown[0]}: AdamW takes {', '.join(known)}, and lr by --learning_rate")
    return keywords


def _whole(groups: list[dict[str, Any]], optimizer: type[torch.optim.Optimizer], **keywords: Any) -> Any:
    return optimizer(groups, **keywords)


def make_optimizer(
    optimizer_type: str, groups: Sequence[ParameterGroup], arguments: Iterable[str], construct: Construct = _whole
) -> torch.optim.Optimizer:
    """The optimizer over the groups, in their order.

    AdamW is torch's (Loshchilov & Hutter, 1711.05101), in its fused form: one kernel a tensor, on the CPU too.

    Args:
        construct: makes it of (groups, class, **keywords); a sharded optimizer's constructor, say.

    Raises:
        InputError: as `check_optimizer`, or a value is out of the optimizer's range.
    """
    keywords = check_optimizer(optimizer_type, arguments)
    parameters = [{"params": list(group.parameters), "lr": group.learning_rate, "name": group.name} for group in groups]
    try:
        optimizer = construct(parameters, torch.optim.AdamW, lr=groups[0].learning_rate, fused=True, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--optimizer_args: AdamW refuses them: {error}") from error
    # A fused optimizer offers to undo the loss scale itself. torch_npu's scaler then hands it an argument that torch's
    # AdamW no longer takes, and elsewhere a skipped step could not be told from a taken one: the scaler does it.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def set_schedule(schedule: LambdaLR, steps: int) -> None:
    """Put a schedule where it is after that many of its steps: its rates are functions of their number alone."""
    schedule.last_epoch, schedule._step_count = steps, steps + 1
    rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def check_warmup(warmup_steps: int, max_train_steps: int) -> None:
    """Raise InputError if the warm-up is longer than the run."""
    if warmup_steps > max_train_steps:
        raise InputError(
            f"--lr_warmup_steps={warmup_steps} is longer than the run of {max_train_steps} steps; shorten the warm-up"
        )


def make_lr_schedule(
    name: str, optimizer: torch.optim.Optimizer, max_train_steps: int, warmup_steps: int, num_cycles: int, power: float
) -> LRScheduler:
    """diffusers' schedule of that name, counted in optimizer steps whatever the number of processes.

    Raises:
        InputError: a warm-up longer than the run, polynomial below its final rate.
    """
    from diffusers.optimization import get_scheduler

    check_warmup(warmup_steps, max_train_steps)
    try:
        return get_scheduler(
            name,
            optimizer=optimizer,
            num_warmup_steps=warmup_steps,
            num_training_steps=max_train_steps,
            num_cycles=num_cycles,
            power=power,
        )
    except ValueError as error:
        raise InputError(f"--lr_scheduler={name} does not go with these settings: {error}") from error
