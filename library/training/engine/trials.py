"""Whether an optimizer can be trained with exactly: it is tried on a few small parameters before training.

Nothing is known of optimizers by their names. What each keeps, and of what its updates are functions, shows when it
steps: a run goes on from a training state, parameters are updated in backward, each process updates its share. Where
the weights of a trial are not those of the plain optimizer, the run would be off without a word, so it is refused.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.training.engine.group_entries import GroupState, PartialSteps, exchanges_weights, train_mode
from library.training.engine.optimizers import ParameterGroup
from library.training.state.tensor_rows import make_part, read_state
from library.training.state.tree import pack, unpack

_SHAPES = ((6, 4), (5,), (4, 3, 3, 3))  # a matrix, a vector, a kernel
_RATE, _STEPS = 0.1, 12  # steps before and after a state: what happens each few steps has happened
_SCALES = (1.0, 10.0, 0.1)  # of gradients, so that what an optimizer bounds is bounded at some steps
Make = Callable[[Sequence[ParameterGroup]], torch.optim.Optimizer]


@torch.random.fork_rng(devices=[])
def check_exactness(
    make: Make,
    make_plain: Make,
    groups: Sequence[ParameterGroup],
    optimizer_type: str,
    *,
    in_backward: bool,
    in_pieces: bool,
    sharding: str,
    averages: bool,
    device: torch.device,
) -> None:
    """Try the optimizer as the run will use it.

    Args:
        make: the run's optimizer over groups.
        make_plain: the same for fp32 weights.
        groups: of the run; their names, learning rates and precision are the trial's.
        in_backward: with --fused_backward_pass.
        in_pieces: with --full_bf16.
        sharding: as several processes do it; "none" on one.
        averages: with --use_ema.
        device: where it is tried if it does not step on the CPU.

    Raises:
        InputError: it cannot be trained with so; the message says why, and what can be done.
    """
    flag = f"--optimizer_type={optimizer_type}"
    plain, where = _plain(make_plain, groups, flag, device)
    dtype = groups[0].parameters[0].dtype
    try:
        _Trial(make, groups, dtype, where).stepped(range(2))
    except Exception as error:  # whatever an optimizer of somebody raises
        raise InputError(
            f"--full_bf16 cannot step {flag} ({_first_line(error)}); leave it out, or choose another optimizer"
        ) from error
    why = _why_not_resumable(make, groups, dtype, where)
    if why:
        raise InputError(
            f"{flag}: a run could not go on from a training state exactly, {why}. Choose another optimizer, such as "
            "AdamW"
        )
    if exchanges_weights(plain.optimizer):
        _check_exchange(flag, sharding, averages)
    for asked, what in ((in_backward, "--fused_backward_pass"), (in_pieces, "--full_bf16")):
        if asked and not _same(plain, _one_by_one(make_plain, groups, where)):
            raise InputError(
                f"{what} updates some parameters at a time, and with {flag} the update of one hangs on the others, so "
                "training would be another one. Leave it out, or choose another optimizer, such as AdamW"
            )
    if sharding in ("oss", "zero1") and not _same(plain, _in_shares(make_plain, groups, where)):
        raise InputError(
            f"--sharding={sharding} has each process update its share of the parameters, and with {flag} the update of "
            "one hangs on the others. Use --sharding=none, or another optimizer, such as AdamW"
        )


class _Trial:
    """Small parameters in the run's groups, and an optimizer over all of them or one over each share."""

    def __init__(
        self, make: Make, groups: Sequence[ParameterGroup], dtype: torch.dtype, where: torch.device, shares: int = 1
    ) -> None:
        random = torch.Generator().manual_seed(0)
        highest = max(group.learning_rate for group in groups) or 1.0
        self.groups = [
            ParameterGroup(
                group.name,
                [nn.Parameter((torch.randn(shape, generator=random) / 10).to(where, dtype)) for shape in _SHAPES],
                group.learning_rate / highest * _RATE,  # steps that rounding does not swallow
            )
            for group in groups
        ]
        self.parameters = [parameter for group in self.groups for parameter in group.parameters]
        self.optimizers = [
            make([replace(group, parameters=group.parameters[share::shares]) for group in self.groups])
            for share in range(shares)
        ]
        self.group_states = [GroupState([optimizer]) for optimizer in self.optimizers]
        for optimizer in self.optimizers:
            train_mode(optimizer)

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """The only one."""
        return self.optimizers[0]

    def give_gradients(self, step: int) -> None:
        """Of a step, the same in each trial."""
        random = torch.Generator().manual_seed(step)
        for parameter in self.parameters:
            gradient = torch.randn(parameter.shape, generator=random) * _SCALES[step % len(_SCALES)]
            parameter.grad = gradient.to(parameter.device, parameter.dtype)

    def stepped(self, steps: Sequence[int]) -> "_Trial":
        """Itself after some steps."""
        for step in steps:
            self.give_gradients(step)
            for optimizer in self.optimizers:
                optimizer.step()
        return self

    def numbers(self) -> list[tuple[dict[str, Tensor], Any]]:
        """Weights and states, for each optimizer those of its groups: what has to be the same in two trials."""
        states = [
            {**optimizer.state[parameter]}
            for parameter in self.parameters
            for optimizer in self.optimizers
            if parameter in optimizer.state
        ]
        weights = [parameter.detach() for parameter in self.parameters]
        return [pack([weights, states, groups.state_dict()]) for groups in self.group_states]


def _plain(
    make: Make, groups: Sequence[ParameterGroup], flag: str, device: torch.device
) -> tuple[_Trial, torch.device]:
    """The optimizer's own steps, on the CPU or, where it does not step there, on a device."""
    failure: Exception | None = None
    for where in (torch.device("cpu"), device):
        try:
            return _Trial(make, groups, torch.float32, where).stepped(range(2 * _STEPS)), where
        except InputError:
            raise
        except Exception as error:  # whatever an optimizer of somebody raises
            failure = failure or error
    raise InputError(f"{flag}: it cannot step here ({_first_line(failure)}); choose another optimizer") from failure


def _why_not_resumable(make: Make, groups: Sequence[ParameterGroup], dtype: torch.dtype, where: torch.device) -> str:
    """What a state loses, in words; empty where a resumed trial is the uninterrupted one bit for bit."""
    whole = _Trial(make, groups, dtype, where).stepped(range(_STEPS))
    before = _plain_attributes(whole.optimizer)
    try:
        parts = [make_part(parameter, whole.optimizer) for parameter in whole.parameters]
        tensors, plain = pack({"parts": parts, "groups": whole.group_states[0].state_dict()})
        saved = unpack({name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(plain)))
        resumed = _Trial(make, groups, dtype, where)
        for parameter, part in zip(resumed.parameters, saved["parts"], strict=True):
            parameter.data.copy_(part["weight"])
            read_state("a trial", parameter, resumed.optimizer, [part])
        resumed.group_states[0].load_state_dict(saved["groups"])
        later = range(_STEPS, 2 * _STEPS)
        if _same(whole.stepped(later), resumed.stepped(later)):
            return ""
    except Exception as error:  # whatever an optimizer of somebody raises
        return f"which cannot hold what it keeps ({_first_line(error)})"
    after = _plain_attributes(whole.optimizer)
    names = sorted(name for name, value in after.items() if before.get(name) != value)
    where_else = f" (attributes {', '.join(names)})" if names else ""
    return (
        f"because it keeps more than a state of each parameter and of each group{where_else}, or draws random numbers"
    )


def _one_by_one(make: Make, groups: Sequence[ParameterGroup], where: torch.device) -> "_Trial | None":
    """Stepped for one parameter at a time; None if it cannot be."""
    try:
        trial = _Trial(make, groups, torch.float32, where)
        steps = PartialSteps(trial.optimizer)
        for step in range(2 * _STEPS):
            trial.give_gradients(step)
            steps.begin()
            for place, group in enumerate(trial.groups):
                for parameter in group.parameters:
                    steps.step({place: [parameter]})
            steps.end()
    except Exception:  # whatever an optimizer of somebody raises
        return None
    return trial


def _in_shares(make: Make, groups: Sequence[ParameterGroup], where: torch.device) -> "_Trial | None":
    """Stepped by two optimizers, of every other parameter each; None if it cannot be."""
    try:
        return _Trial(make, groups, torch.float32, where, shares=2).stepped(range(2 * _STEPS))
    except Exception:  # whatever an optimizer of somebody raises
        return None


def _same(one: _Trial, other: _Trial | None) -> bool:
    """Whether all weights and states are equal bit for bit."""
    if other is None:
        return False
    (tensors, plain), *_ = one.numbers()
    return all(
        theirs.keys() == tensors.keys()
        and all(torch.equal(theirs[name], tensor) for name, tensor in tensors.items())
        and their_plain == plain
        for theirs, their_plain in other.numbers()
    )


def _check_exchange(flag: str, sharding: str, averages: bool) -> None:
    if averages:
        raise InputError(
            f"--use_ema averages weights, and {flag} keeps an average of its own; leave one of the two out"
        )
    if sharding != "none":
        raise InputError(
            f"{flag} exchanges all weights for saving and sampling, and --sharding={sharding} has them on several "
            "processes; leave one of the two out"
        )


def _plain_attributes(optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """The numbers and texts that an optimizer has as attributes."""
    return {name: value for name, value in vars(optimizer).items() if isinstance(value, (bool, int, float, str))}


def _first_line(error: BaseException | None) -> str:
    return next(iter(str(error).splitlines()), "") or type(error).__name__
