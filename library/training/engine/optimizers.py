"""Optimizers by the names that --optimizer_type takes, and the learning-rate schedules around them."""

import ast
import importlib
import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from library import device as devices
from library.errors import InputError
from library.options.optimizer import warmup_too_long
from library.training.engine.bf16_update import Bf16Update, with_bf16_update
from library.training.engine.by_element import updates_by_element

# The field's names that are not torch.optim's own; oss is AdamW sharded by fairscale (see sharding.py).
_PATHS = {
    "oss": "torch.optim.AdamW",
    "AdaFactor": "transformers.optimization.Adafactor",
    "AdamW8bit": "bitsandbytes.optim.AdamW8bit",
    "Lion": "lion_pytorch.Lion",
    "Lion8bit": "bitsandbytes.optim.Lion8bit",
    "SGDNesterov": "torch.optim.SGD",
    "SGDNesterov8bit": "bitsandbytes.optim.SGD8bit",
}
_PACKAGES = {"lion_pytorch": "lion-pytorch"}  # what to install, where it is not called as the module is
_PRESETS = {name: {"momentum": 0.9, "nesterov": True} for name in ("SGDNesterov", "SGDNesterov8bit")}
_REFUSED = {
    "LBFGS": "it computes the loss several times a step",
    "SparseAdam": "it takes sparse gradients alone",
    "Paged": "its memory cannot be restored when resuming; AdamW8bit holds as little",
}

# Makes an optimizer from parameter groups, the optimizer's class and its keyword arguments; a sharded one wraps it.
Construct = Callable[..., torch.optim.Optimizer]


@dataclass(frozen=True)
class ParameterGroup:
    """Parameters that share a learning rate; `name` is what logs call it (lr/unet).

    Attributes:
        places: where each parameter's first element is among all elements that train; None where all of each parameter
            is here, so that they follow each other.
    """

    name: str
    parameters: Sequence[nn.Parameter]
    learning_rate: float
    places: Sequence[int] | None = None


def parameters_by_name(module: nn.Module, groups: Iterable[ParameterGroup]) -> dict[str, nn.Parameter]:
    """What trains, by its name in the module, in the groups' order."""
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    return {names[id(parameter)]: parameter for group in groups for parameter in group.parameters}


@dataclass(frozen=True)
class OptimizerChoice:
    """What --optimizer_type and --optimizer_args stand for."""

    kind: type[torch.optim.Optimizer]
    keywords: dict[str, Any]

    @cached_property
    def by_element(self) -> bool:
        """Whether the rows of one parameter may be updated apart from each other."""
        return updates_by_element(lambda parameters: self.kind(parameters, **self.keywords_at(0.01)))

    def keywords_at(self, learning_rate: float, on: Iterable[torch.device] = ()) -> dict[str, Any]:
        """What the optimizer is made with; `fused`, one kernel a tensor, where all devices of the weights have it.

        Args:
            on: the devices that the weights are on, besides the CPU.
        """
        keywords = {"lr": None if self.sets_its_own_rates else learning_rate, **self.keywords}
        fused = all(self.kind in devices.fused_optimizers(device) for device in (torch.device("cpu"), *on))
        return {**keywords, "fused": True} if fused else keywords

    @property
    def sets_its_own_rates(self) -> bool:
        """Whether it goes by --learning_rate and --lr_scheduler; Adafactor has rates of its own unless told not to."""
        default = inspect.signature(self.kind).parameters.get("relative_step")
        return bool(self.keywords.get("relative_step", default is not None and default.default))


def parse_optimizer_args(arguments: Iterable[str]) -> dict[str, Any]:
    """'weight_decay=0.01' and 'betas=0.9,0.999' as keyword arguments.

    Raises:
        InputError: an argument is not NAME=VALUE, its value is no Python literal, or a name is given twice.
    """
    parsed: dict[str, Any] = {}
    for argument in arguments:
        name, equals, value = argument.partition("=")
        name = name.strip()
        if name in parsed:
            raise InputError(f"--optimizer_args {argument!r}: {name} is given twice; leave out one of them")
        try:
            if not (name and equals):
                raise ValueError("no '='")
            parsed[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError) as error:
            raise InputError(
                f"--optimizer_args {argument!r} is not NAME=VALUE with a number, tuple, True, False or quoted text"
            ) from error
    return parsed


def choose_optimizer(optimizer_type: str, arguments: Iterable[str]) -> OptimizerChoice:
    """The optimizer's class and keyword arguments.

    Args:
        optimizer_type: a name of the field in any case, a class of torch.optim, or module.Class.

    Raises:
        InputError: the type is not known, not installed or cannot be trained with, or does not take an argument.
    """
    kind = _find(optimizer_type)
    parameters = inspect.signature(kind).parameters
    own = {"self", "params", "lr", "fused", "foreach"}
    known = [name for name in parameters if name not in own]
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    preset = next((value for name, value in _PRESETS.items() if name.lower() == optimizer_type.lower()), {})
    keywords = {**preset, **parse_optimizer_args(arguments)}
    unknown = [name for name in keywords if name in own or not (name in known or takes_all)]
    if unknown:
        raise InputError(
            f"--optimizer_args {unknown[0]}: {kind.__name__} takes {', '.join(known)}, and lr by --learning_rate"
        )
    return OptimizerChoice(kind, keywords)


def _find(optimizer_type: str) -> type[torch.optim.Optimizer]:
    """The class that a name stands for."""
    refused = next((why for part, why in _REFUSED.items() if part.lower() in optimizer_type.lower()), None)
    if refused is not None:
        raise InputError(f"--optimizer_type {optimizer_type!r} is not supported: {refused}")
    of_torch = {name for name in dir(torch.optim) if _is_optimizer(getattr(torch.optim, name))}
    paths = {**{name: f"torch.optim.{name}" for name in of_torch}, **_PATHS}
    path = {name.lower(): path for name, path in paths.items()}.get(optimizer_type.lower(), optimizer_type)
    module_name, _, class_name = path.rpartition(".")
    if not module_name:
        raise InputError(
            f"--optimizer_type {optimizer_type!r} is not known; it is AdamW, {', '.join(_PATHS)}, a class of "
            "torch.optim, or module.Class of an installed package"
        )
    package = _PACKAGES.get(module_name.partition(".")[0], module_name.partition(".")[0])
    try:
        kind = getattr(importlib.import_module(module_name), class_name, None)
    except ImportError as error:
        raise InputError(
            f"--optimizer_type {optimizer_type!r} needs the package {package} ({error}); install it, or choose another "
            "optimizer"
        ) from error
    if kind is None or not _is_optimizer(kind):
        raise InputError(f"--optimizer_type {optimizer_type!r}: {path} is no optimizer of torch's kind")
    return kind


def _is_optimizer(value: Any) -> bool:
    base = torch.optim.Optimizer
    return isinstance(value, type) and issubclass(value, base) and value is not base


def _whole(groups: list[dict[str, Any]], optimizer: type[torch.optim.Optimizer], **keywords: Any) -> Any:
    return optimizer(groups, **keywords)


def make_optimizer(
    optimizer_type: str,
    groups: Sequence[ParameterGroup],
    arguments: Iterable[str],
    construct: Construct = _whole,
    bf16: Bf16Update | None = None,
) -> torch.optim.Optimizer:
    """The optimizer over the groups, in their order.

    AdamW is torch's (Loshchilov & Hutter, 1711.05101), in its fused form where the device has it; AdaFactor is
    transformers' (Shazeer & Stern, 1804.04235), whose arguments are those that the field's command lines give.

    Args:
        construct: makes it of (groups, class, **keywords); a sharded optimizer's constructor, say.
        bf16: how the weights are updated, where they are bf16.

    Raises:
        InputError: as `choose_optimizer`, or a value is out of the optimizer's range.
    """
    choice = choose_optimizer(optimizer_type, arguments)
    parameters = [{"params": list(group.parameters), "lr": group.learning_rate, "name": group.name} for group in groups]
    on = {parameter.device for group in groups for parameter in group.parameters}
    keywords = choice.keywords_at(groups[0].learning_rate, on)
    kind = choice.kind
    if bf16 is not None:
        kind = with_bf16_update(kind, choice.by_element, bf16, _places(groups))
    try:
        optimizer = construct(parameters, kind, **keywords)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"--optimizer_args: {choice.kind.__name__} refuses them: {error}") from error
    # A fused optimizer offers to undo the loss scale itself. torch_npu's scaler then hands it an argument that torch's
    # AdamW no longer takes, and elsewhere a skipped step could not be told from a taken one: the scaler does it.
    optimizer._step_supports_amp_scaling = False  # type: ignore[attr-defined]
    return optimizer


def _places(groups: Sequence[ParameterGroup]) -> dict[nn.Parameter, int]:
    """Where each parameter's first element is among all elements that train."""
    found: dict[nn.Parameter, int] = {}
    following = 0
    for group in groups:
        for number, parameter in enumerate(group.parameters):
            found[parameter] = following if group.places is None else group.places[number]
            following += parameter.numel()
    return found


class ScheduleState:
    """Where a schedule is, as a named object of training states: its rates are functions of its steps alone."""

    def __init__(self, schedule: LambdaLR) -> None:
        self._schedule = schedule

    def state_dict(self) -> dict[str, int]:
        """The steps of the schedule that are done."""
        return {"steps": self._schedule.last_epoch}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Put it where it was."""
        set_schedule(self._schedule, state["steps"])


def set_schedule(schedule: LambdaLR, steps: int) -> None:
    """Put a schedule where it is after that many of its steps: its rates are functions of their number alone."""
    schedule.last_epoch, schedule._step_count = steps, steps + 1
    rates = [base * rate(steps) for base, rate in zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)]
    for group, rate in zip(schedule.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    schedule._last_lr = rates


def make_lr_schedule(
    name: str, optimizer: torch.optim.Optimizer, max_train_steps: int, warmup_steps: int, num_cycles: int, power: float
) -> LRScheduler:
    """diffusers' schedule of that name, counted in optimizer steps whatever the number of processes.

    Raises:
        InputError: a warm-up longer than the run, polynomial below its final rate.
    """
    from diffusers.optimization import get_scheduler

    if warmup_steps > max_train_steps:
        raise InputError(warmup_too_long(warmup_steps, max_train_steps))
    defaults = dict(optimizer.defaults)
    if defaults.get("lr") is None:  # as of AdaFactor with rates of its own; diffusers' polynomial begins at it
        optimizer.defaults["lr"] = optimizer.param_groups[0]["lr"]
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
    finally:
        optimizer.defaults = defaults
