"""Weights and optimizer state by parameter name, in parts: what one way of sharding writes, any other reads.

A part is some rows (places along the first dimension) of one parameter: `{"start": row, "weight": tensor, "state":
{"exp_avg": tensor, "step": tensor, ...}, "average": tensor}`, the last where averages are kept. Each process writes the
parts that it owns; on reading, a process copies the rows that it holds out of whatever parts there are, of any number
of processes.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError

Part = Mapping[str, Any]


def make_part(
    weight: Tensor, optimizer: torch.optim.Optimizer, start: int = 0, average: Tensor | None = None
) -> dict[str, Any]:
    """The part of a parameter that begins at row `start`; `weight` is the very tensor that the optimizer updates."""
    part = {"start": start, "weight": weight.detach(), "state": dict(optimizer.state.get(weight, {}))}
    return part if average is None else {**part, "average": average}


def read_weight(name: str, into: Tensor, parts: Sequence[Part], start: int = 0) -> None:
    """Fill a parameter, or the rows from `start` on that a process holds of it.

    Raises:
        InputError: the parts have another shape, or do not cover it.
    """
    _fill(f"{name}'s weight", into.detach(), [(part["start"], part["weight"]) for part in parts], start)


def read_average(name: str, into: Tensor, parts: Sequence[Part], start: int = 0) -> bool:
    """Fill a parameter's moving average, as `read_weight`; False if the parts have none."""
    if not all("average" in part for part in parts):
        return False
    _fill(f"{name}'s average", into, [(part["start"], part["average"]) for part in parts], start)
    return True


def read_state(
    name: str, parameter: nn.Parameter, optimizer: torch.optim.Optimizer, parts: Sequence[Part], start: int = 0
) -> None:
    """Give an optimizer the state of a parameter, or of the rows from `start` on that it works on.

    Raises:
        InputError: as `read_weight`.
    """
    parts = [part for part in parts if part["state"]]
    if not parts:
        return
    whole = len(parts) == 1 and parts[0]["weight"].shape == parameter.shape
    counter_device = _counter_device(parameter, optimizer)
    state: dict[str, Any] = {}
    for key, first in parts[0]["state"].items():
        if not isinstance(first, Tensor):
            state[key] = _copied(first, parameter.device)
        elif first.dim() == 0:  # the same in every part
            state[key] = first.to(counter_device if key == "step" else parameter.device, copy=True)
        elif whole and first.shape != parameter.shape:  # sums of rows and columns, scales of blocks
            state[key] = first.to(parameter.device, copy=True)
        else:
            state[key] = torch.empty_like(parameter, dtype=first.dtype, requires_grad=False)
            _fill(f"{name}'s {key}", state[key], [(part["start"], part["state"][key]) for part in parts], start)
    optimizer.state[parameter] = state


def by_name(ranks: Sequence[Mapping[str, Part]]) -> dict[str, list[Part]]:
    """The parts of each parameter over all processes that wrote, in the order of their rows."""
    gathered: dict[str, list[Part]] = {}
    for parts in ranks:
        for name, part in parts.items():
            gathered.setdefault(name, []).append(part)
    return {name: sorted(parts, key=lambda part: part["start"]) for name, parts in gathered.items()}


def check_names(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    """Raise InputError where a state is of other parameters than those that train."""
    missing, surplus = sorted(wanted.keys() - saved.keys()), sorted(saved.keys() - wanted.keys())
    if missing or surplus:
        listed = "; ".join(
            f"{len(names)} {what}, such as {', '.join(names[:3])}"
            for names, what in ((missing, "are not in it"), (surplus, "do not train now"))
            if names
        )
        raise InputError(
            f"--resume: the state is of other parameters than those that train now ({listed}). Train the same parts "
            "(--train_text_encoder, the rates of text encoders and --block_lr, where 0 freezes) of the same model."
        )


def _counter_device(parameter: nn.Parameter, optimizer: torch.optim.Optimizer) -> torch.device:
    """Where torch's optimizers count steps: a fused one beside the parameter, others on the CPU, to read it at once."""
    group = next((group for group in optimizer.param_groups if any(one is parameter for one in group["params"])), {})
    return parameter.device if group.get("fused") or group.get("capturable") else torch.device("cpu")


def _copied(value: Any, device: torch.device) -> Any:
    """A state that is no tensor, with copies of the tensors in it."""
    if isinstance(value, Tensor):
        return value.to(device, copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(inner, device) for key, inner in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(inner, device) for inner in value)
    return value


def _fill(what: str, into: Tensor, saved: Sequence[tuple[int, Tensor]], start: int) -> None:
    """Copy rows start … start + len(into) out of the parts."""
    if into.dim() == 0:
        into.copy_(saved[0][1])
        return
    done = 0
    for first, rows in saved:
        if rows.shape[1:] != into.shape[1:]:
            raise InputError(f"--resume: {what} has rows of {tuple(rows.shape[1:])}, not {tuple(into.shape[1:])}")
        begin, end = max(first, start), min(first + len(rows), start + len(into))
        if begin < end:
            into[begin - start : end - start].copy_(rows[begin - first : end - first])
            done += end - begin
    if done != len(into):
        raise InputError(f"--resume: {what} has {done} of the {len(into)} rows that are needed; it is another model's")
