"""Weights and optimizer state by parameter name, in parts: what one way of sharding writes, any other reads.

A part is some rows (places along the first dimension) of one parameter: `{"start": row, "weight": tensor, "state":
{"exp_avg": tensor, "step": tensor, ...}, "average": tensor}`, the last where averages are kept. Each process writes the
parts that it owns; on reading, a process copies the rows that it holds out of whatever parts there are, of any number
of processes. A state says which process wrote which rows, so that a reader opens the files of those alone that
it needs.
"""

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.finite import is_finite

Part = Mapping[str, Any]


class Rows(NamedTuple):
    """Rows of a parameter that one process wrote; a parameter without dimensions counts as one row."""

    rank: int
    start: int
    number: int


class SavedParts:
    """The parts of all parameters that the processes of some run wrote, each read when it is needed."""

    def __init__(self, rows: Mapping[str, Iterable[Rows]], parts_of: Callable[[int], Mapping[str, Part]]) -> None:
        """
        Args:
            rows: by parameter, who wrote which.
            parts_of: gives what a rank wrote, by parameter.
        """
        self._rows = {name: sorted(those, key=_by_start) for name, those in rows.items()}
        self._parts_of = parts_of

    @property
    def names(self) -> Collection[str]:
        """Of all parameters."""
        return self._rows.keys()

    def covering(self, name: str, start: int, number: int) -> list[Part]:
        """The parts that have rows `start` ... `start + number` of a parameter, in the order of their rows.

        At least one, whose plain values are those of all parts.
        """
        those = self._rows[name]
        needed = [rows for rows in those if rows.start < start + number and start < rows.start + rows.number]
        return [self._parts_of(rows.rank)[name] for rows in needed or those[:1]]


def saved_parts(ranks: Sequence[Mapping[str, Part]]) -> SavedParts:
    """The parts that processes hold in memory, by their ranks."""
    return SavedParts(merged_rows(map(rows_of, ranks)), ranks.__getitem__)


def rows_of(parts: Mapping[str, Part]) -> dict[str, tuple[int, int]]:
    """The first row and the number of rows of each part of a process."""
    return {name: (part["start"], len(part["weight"]) if part["weight"].dim() else 1) for name, part in parts.items()}


def merged_rows(ranks: Iterable[Mapping[str, Sequence[int]]]) -> dict[str, list[Rows]]:
    """By parameter, which rank has which rows, of what `rows_of` gives for each rank."""
    merged: dict[str, list[Rows]] = {}
    for rank, rows in enumerate(ranks):
        for name, (start, number) in rows.items():
            merged.setdefault(name, []).append(Rows(rank, start, number))
    return merged


def _by_start(rows: Rows) -> int:
    return rows.start


def make_part(
    weight: Tensor, optimizer: torch.optim.Optimizer, start: int = 0, average: Tensor | None = None
) -> dict[str, Any]:
    """The part of a parameter that begins at row `start`; `weight` is the very tensor that the optimizer updates."""
    part = {"start": start, "weight": weight.detach(), "state": dict(optimizer.state.get(weight, {}))}
    return part if average is None else {**part, "average": average}


def read_weight(name: str, into: Tensor, parts: Sequence[Part], start: int = 0) -> None:
    """Fill a parameter, or the rows from `start` on that a process holds of it.

    Raises:
        InputError: the parts have another shape, do not cover it, or have numbers that are not finite.
    """
    _fill(f"{name}'s weight", into.detach(), [(part["start"], part["weight"]) for part in parts], start, finite=True)


def read_average(name: str, into: Tensor, parts: Sequence[Part], start: int = 0) -> bool:
    """Fill a parameter's moving average, as `read_weight`; False if the parts have none."""
    if not all("average" in part for part in parts):
        return False
    _fill(f"{name}'s average", into, [(part["start"], part["average"]) for part in parts], start, finite=True)
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


def check_names(saved: Collection[str], wanted: Collection[str]) -> None:
    """Raise InputError where a state is of other parameters than those that train."""
    missing, surplus = sorted({*wanted} - {*saved}), sorted({*saved} - {*wanted})
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


def _fill(what: str, into: Tensor, saved: Sequence[tuple[int, Tensor]], start: int, *, finite: bool = False) -> None:
    """Copy rows start … start + len(into) out of the parts.

    Args:
        finite: whether to refuse numbers that are NaN or infinite.
    """
    if into.dim() == 0:
        into.copy_(saved[0][1])
        return
    done = 0
    for first, rows in saved:
        if rows.shape[1:] != into.shape[1:]:
            raise InputError(f"--resume: {what} has rows of {tuple(rows.shape[1:])}, not {tuple(into.shape[1:])}")
        begin, end = max(first, start), min(first + len(rows), start + len(into))
        if begin < end:
            wanted = rows[begin - first : end - first]
            if finite and not is_finite(wanted):
                raise InputError(
                    f"--resume: {what} has numbers that are NaN or infinite: the run had diverged when it saved the "
                    "state. Go on from an earlier state, with a lower learning rate."
                )
            into[begin - start : end - start].copy_(wanted)
            done += end - begin
    if done != len(into):
        raise InputError(f"--resume: {what} has {done} of the {len(into)} rows that are needed; it is another model's")
