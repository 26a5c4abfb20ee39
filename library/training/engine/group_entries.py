"""What an optimizer's groups hold besides parameters: hyper-parameters, and numbers that the optimizer itself changes.

Some optimizers count steps there (`step`, `k`), or keep an estimate that all parameters share (`d` of Prodigy and
D-Adaptation, `weight_sum` of the schedule-free ones).
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError

Entries = dict[str, Any]
_SET_BY_SCHEDULE = "lr"


def entries(group: Mapping[str, Any]) -> Entries:
    """A copy of what a group holds besides its parameters."""
    return {key: _copied(value) for key, value in group.items() if key != "params"}


def restore(group: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Have a group's parameters stay, and the rest be as it was."""
    for key in group.keys() - before.keys() - {"params"}:
        del group[key]
    group.update(entries(before))


def changed(before: Mapping[str, Any], after: Mapping[str, Any]) -> Entries:
    """The entries that are new or have another value, the learning rate left out: the schedule sets that."""
    return {
        key: value
        for key, value in after.items()
        if key not in ("params", _SET_BY_SCHEDULE) and (key not in before or not _equal(before[key], value))
    }


class GroupState:
    """The state of an optimizer that is in its groups, as a named object of training states.

    What the optimizer has changed since it was made belongs to the state; the rest are hyper-parameters, which the
    flags set anew on each start.
    """

    def __init__(self, optimizers: Sequence[torch.optim.Optimizer]) -> None:
        """`optimizers` have groups of the same names; the first is what the others are shares of."""
        self._optimizers = optimizers
        self._made_with = {group["name"]: entries(group) for group in optimizers[0].param_groups}

    def state_dict(self) -> dict[str, Entries]:
        """By the groups' names what has changed."""
        return {
            group["name"]: changed(self._made_with[group["name"]], group) for group in self._optimizers[-1].param_groups
        }

    def load_state_dict(self, state: Mapping[str, Mapping[str, Any]]) -> None:
        """Put it back.

        Raises:
            InputError: the state is of other groups, and the optimizer keeps something in them.
        """
        names = {group["name"] for group in self._optimizers[-1].param_groups}
        lost = sorted(name for name, kept in state.items() if name not in names and entries(kept))
        if lost:
            raise InputError(
                f"--resume: the optimizer keeps numbers for the parameter groups {', '.join(lost[:3])} of the state, "
                f"and this run has the groups {', '.join(sorted(names)[:3])}; go on with the same --block_lr"
            )
        for optimizer in self._optimizers:
            for group in optimizer.param_groups:
                group.update(entries(state.get(group["name"], {})))


class PartialSteps:
    """Steps of an optimizer for some of its parameters at a time, which count as one step for its groups.

    Each of them begins with the entries that the groups had before the first, and all leave the same behind: otherwise
    the optimizer cannot be used so (`library.training.engine.trials` asks).
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer: Any = optimizer
        self.begin()

    def begin(self) -> None:
        """Before the first part of a step."""
        self._before = [entries(group) for group in self._optimizer.param_groups]
        self._after: dict[int, Entries] = {}

    def step(self, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """The optimizer's step for some parameters, by the places of their groups."""
        optimizer = self._optimizer
        groups = optimizer.param_groups
        # One optimizer, so that schedule and states see all of it; for this call it has no other parameters.
        some = {place: {**entries(self._before[place]), "params": list(ones)} for place, ones in parameters.items()}
        optimizer.param_groups = list(some.values())
        try:
            optimizer.step()
        finally:
            optimizer.param_groups = groups
        for place, group in some.items():
            self._after[place] = changed(self._before[place], group)

    def end(self) -> None:
        """After the last part: the groups have what the step has made of their entries."""
        for place, after in self._after.items():
            self._optimizer.param_groups[place].update(after)
        self._after = {}


def exchanges_weights(optimizer: torch.optim.Optimizer) -> bool:
    """Whether the weights to use are others than those that train (schedule-free optimizers: Defazio, 2405.15682)."""
    return callable(getattr(optimizer, "eval", None)) and callable(getattr(optimizer, "train", None))


def train_mode(optimizer: torch.optim.Optimizer) -> None:
    """Have the weights that train in their places, where an optimizer knows others."""
    if exchanges_weights(optimizer):
        optimizer.train()  # type: ignore[attr-defined]


def _copied(value: Any) -> Any:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return type(one) is type(other) and bool(one == other)
