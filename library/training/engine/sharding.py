"""Training on several processes: what each of them holds of weights, gradients and optimizer state.

| --sharding | weights | gradients | optimizer state | by |
|---|---|---|---|---|
| none | all | all | all | torch's DistributedDataParallel |
| oss | all | its own share, buckets | its own share | fairscale's OSS, ShardedDataParallel (ZeRO stage 1, 1910.02054) |
| zero1 | all | all | its own share | torch's ZeroRedundancyOptimizer and DistributedDataParallel |
| fsdp | its own share | its own share | its own share | torch's FSDP2, `fully_shard` (ZeRO stage 3) |

With oss small gradients travel in flat buckets, one for each process, and each process keeps the buckets of all, at
most 2^26 elements (third_patch/accelerate_patch); while it accumulates, each holds all gradients. With none and zero1
gradients lie in DistributedDataParallel's buckets, which stay between steps. Bytes: docs/measurements/sharding.md.

They differ in memory and in what travels (docs/scaling.md), and in nothing else: the loss, the gradient's norm and the
updated weights are those of `none`, to rounding.
"""

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LRScheduler

from library import device as devices
from library.errors import InputError
from library.training.engine.ema import Averages
from library.training.engine.group_entries import GroupState, exchanges_weights, train_mode
from library.training.engine.loss_scale import ScalerState, agree_on_overflow
from library.training.engine.meta_copy import without_data
from library.training.engine.optimizers import ParameterGroup, ScheduleState, parameters_by_name
from library.training.state.tensor_rows import (
    SavedParts,
    check_names,
    make_part,
    read_average,
    read_state,
    read_weight,
)

CLIP_EPSILON = 1e-6  # what torch adds to a norm before it divides by it
# Makes the optimizer over parameter groups, given what a sharded one is constructed with.
MakeOptimizer = Callable[..., torch.optim.Optimizer]
MakeSchedule = Callable[[torch.optim.Optimizer], LRScheduler]


def sharding_kind(sharding: str | None, optimizer_type: str) -> str:
    """What --sharding and --optimizer_type ask for together: `--optimizer_type oss` is AdamW with `--sharding oss`.

    Raises:
        InputError: they ask for different things.
    """
    oss = optimizer_type.lower() == "oss"
    if oss and sharding not in (None, "oss"):
        raise InputError(
            f"--optimizer_type={optimizer_type} is AdamW sharded by fairscale's OSS, and --sharding={sharding} asks "
            "for another way; give --optimizer_type=AdamW with it, or leave --sharding out"
        )
    return "oss" if oss else sharding or "none"


class Replicated:
    """Every process holds the whole of everything, or is alone; the others are this with their differences."""

    weights_are_whole = True  # on every process

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        make_schedule: MakeSchedule,
    ) -> None:
        """
        Args:
            module: on its device, in the precision of its weights.
            groups: what of it trains.
            make_optimizer: the optimizer over groups; takes a `construct` (`library.training.engine.optimizers`).
            make_schedule: the learning rates' schedule over the optimizer.
        """
        self.accelerator, self.bare_module = accelerator, module
        self.averages: Averages | None = None
        self.named = parameters_by_name(module, groups)
        self._prepare(groups, make_optimizer, make_schedule)
        self.group_state = GroupState([self.bare_optimizer, self.own_optimizer])
        train_mode(self.bare_optimizer)

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        self.bare_optimizer = make_optimizer(groups)
        # The schedule is made first: torch would take accelerate's wrapped step for a mistake of the user.
        schedule = make_schedule(self.bare_optimizer)
        self.module, self.optimizer, self.schedule = self.accelerator.prepare(
            self.bare_module, self.bare_optimizer, schedule
        )

    @property
    def parameters(self) -> list[nn.Parameter]:
        """What the optimizer updates."""
        return list(self.named.values())

    @property
    def own_optimizer(self) -> torch.optim.Optimizer:
        """The optimizer that holds this process's share of the state."""
        return getattr(self.bare_optimizer, "optim", self.bare_optimizer)

    def no_sync(self) -> AbstractContextManager[Any]:
        """While accumulating: gradients stay where they are made."""
        return self.accelerator.no_sync(self.module)

    def backward(self, loss: Tensor) -> None:
        """Add the loss's gradients to those that there are."""
        self.accelerator.backward(loss)

    def clip(self, max_norm: float) -> Tensor:
        """Undo the loss scale, clip the gradient's norm to `max_norm` (0: leave it), return the norm before that.

        The norm is that of all gradients of all processes together, so it is the same on each: a scalar that is still
        on the device, for which nothing has waited.
        """
        self.accelerator.unscale_gradients()
        norm = self._norm()
        clip_gradients(self.parameters, norm, max_norm)
        return norm

    def _norm(self) -> Tensor:
        return total_norm(self.parameters)

    def step(self) -> None:
        """The optimizer's step."""
        self.optimizer.step()

    def check_norm(self, norm: float) -> None:
        """Raise TrainingError where the gradients of that norm have made the weights worthless."""

    def zero_grad(self) -> None:
        """Forget the gradients. Those in DistributedDataParallel's buckets, which stay, become zero in place.

        As None they would be made anew beside the buckets when the next step accumulates.
        """
        self.optimizer.zero_grad(set_to_none=not isinstance(self.module, DistributedDataParallel))

    @contextlib.contextmanager
    def whole_module(self, device: torch.device | None = None) -> Iterator[nn.Module]:
        """The module with all its weights, to compute or to save with, on the main process. Every process enters.

        Args:
            device: where gathered weights go; None for the device of this process.
        """
        yield self.bare_module

    def keep_averages(self, decay: float, device: torch.device | None = None) -> None:
        """Keep moving averages of what this process writes into training states, on a device or beside the weights."""
        own = {name: parameter for name, parameter in self.named.items() if self._writes(parameter)}
        self.averages = Averages(own, decay, device)

    @contextlib.contextmanager
    def averages_in_place(self) -> Iterator[None]:
        """The averages stand where the weights train, and afterwards the weights again. Every process enters.

        After an error nothing is exchanged, which may be a collective that this process alone would reach: the run
        is over.
        """
        if self.averages is None:
            yield
            return
        self._exchange(self.averages)
        yield
        self._exchange(self.averages)

    def _exchange(self, averages: Averages) -> None:
        """Exchange weights and averages, so that the main process has all of either."""
        averages.exchange()

    @contextlib.contextmanager
    def evaluated(self) -> Iterator[None]:
        """The weights to use stand where the weights train, for optimizers that know others, then those again."""
        optimizer: Any = self.bare_optimizer
        if not exchanges_weights(optimizer):
            yield
            return
        # Exchanging them twice would round: they are kept, in the CPU's memory.
        kept = [parameter.detach().to("cpu", copy=True) for parameter in self.parameters]
        optimizer.eval()
        try:
            yield
        finally:
            optimizer.train()
            for parameter, weight in zip(self.parameters, kept, strict=True):
                parameter.detach().copy_(weight)

    def state_objects(self) -> dict[str, Any]:
        """What belongs to a training state besides the parts of parameters, by name, each with a state_dict."""
        scaler, averages = self.accelerator.scaler, self.averages
        objects = {"optimizer": self.group_state, "schedule": ScheduleState(self.schedule.scheduler)}
        objects |= {} if scaler is None else {"scaler": ScalerState(scaler)}
        return objects if averages is None else {**objects, "averages": averages}

    def own_parts(self) -> dict[str, dict[str, Any]]:
        """What this process writes into a training state (`state.tensor_rows`), by parameter; no copies."""
        averages = self.averages.averages if self.averages is not None else {}
        return {
            name: make_part(parameter, self.own_optimizer, self._first_row(name), averages.get(name))
            for name, parameter in self.named.items()
            if self._writes(parameter)
        }

    def read_parts(self, saved: SavedParts) -> None:
        """Take weights and optimizer state out of what the processes of some run have written.

        Raises:
            InputError: they are of other parameters.
        """
        check_names(saved.names, self.named)
        for name, parameter in self.named.items():
            first = self._first_row(name)
            parts = saved.covering(name, first, len(parameter) if parameter.dim() else 1)
            read_weight(name, parameter, parts, first)
            if self._updates(parameter):
                read_state(name, parameter, self.own_optimizer, parts, first)
            if self.averages is not None and name in self.averages.averages:
                average = self.averages.averages[name]
                if not read_average(name, average, parts, first):
                    average.copy_(parameter.detach())

    def _first_row(self, name: str) -> int:
        """The first row that this process holds of a parameter."""
        return 0

    def _updates(self, parameter: nn.Parameter) -> bool:
        """Whether this process's optimizer has the parameter's state."""
        return True

    def _writes(self, parameter: nn.Parameter) -> bool:
        """Whether this process is the one to write it."""
        return self.accelerator.is_main_process


class _ByParameter(Replicated):
    """Each parameter's state is with one process, which both of torch's and fairscale's optimizers keep a table of."""

    def _updates(self, parameter: nn.Parameter) -> bool:
        optimizer: Any = self.bare_optimizer
        return optimizer._param_to_rank[parameter] == self.accelerator.process_index

    _writes = _updates

    def _exchange(self, averages: Averages) -> None:
        super()._exchange(averages)
        optimizer: Any = self.bare_optimizer
        for parameter in self.named.values():  # from the process that has its average
            dist.broadcast(parameter.detach(), src=optimizer._param_to_rank[parameter])


class OptimizerSharded(_ByParameter):
    """fairscale's OSS: through accelerate, as third_patch has it."""

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        agree_on_overflow(self.accelerator.scaler)
        super()._prepare(groups, partial(make_optimizer, construct=_oss), make_schedule)

    def clip(self, max_norm: float) -> Tensor:
        """A process has the gradients of its own share alone: OSS adds the shares up even where nothing is clipped."""
        return self.accelerator.clip_grad_norm_(self.parameters, max_norm or float("inf"))


class ZeroRedundancy(_ByParameter):
    """torch's ZeroRedundancyOptimizer beside DistributedDataParallel."""

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        # Placed before the optimizer makes the weights views of its buckets: moved afterwards, they would leave them.
        self.module = self.accelerator.prepare_model(self.bare_module)
        self.bare_optimizer = make_optimizer(groups, construct=_zero1)
        schedule = make_schedule(self.bare_optimizer)
        # Without device placement: accelerate would ask for the state dict, which takes a collective of its own.
        self.optimizer = self.accelerator.prepare_optimizer(self.bare_optimizer, device_placement=False)
        self.schedule = self.accelerator.prepare_scheduler(schedule)


class FullySharded(Replicated):
    """torch's FSDP2 over the module's own units; what does not train stays whole on every process.

    The optimizer works on the bare shards: handed DTensors, clipping and a fused AdamW take about half as long again
    (docs/measurements/sharding.md).
    """

    weights_are_whole = False

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        accelerator, module = self.accelerator, self.bare_module
        agree_on_overflow(accelerator.scaler)
        self._skeleton = without_data(module, share=lambda tensor: not tensor.requires_grad)
        self.module = accelerator.prepare_model(module, evaluation_mode=True)  # autocast, without a wrapper
        _fully_shard(self.module, accelerator)
        self._sharded: dict[str, Any] = {name: module.get_parameter(name) for name in self.named}
        self.named = {name: nn.Parameter(whole.detach().to_local()) for name, whole in self._sharded.items()}
        shards, places = iter(self.named.values()), iter(self._places())
        counts = [len(group.parameters) for group in groups]
        self.bare_optimizer = make_optimizer(
            [
                replace(
                    group,
                    parameters=list(itertools.islice(shards, count)),
                    places=list(itertools.islice(places, count)),
                )
                for group, count in zip(groups, counts, strict=True)
            ]
        )
        schedule = make_schedule(self.bare_optimizer)
        self.optimizer = accelerator.prepare_optimizer(self.bare_optimizer)
        self.schedule = accelerator.prepare_scheduler(schedule)

    def no_sync(self) -> AbstractContextManager[Any]:
        """While accumulating, too, gradients are scattered after each pass; until then they are whole."""
        return contextlib.nullcontext()

    def clip(self, max_norm: float) -> Tensor:
        """As `Replicated`, of the shards' gradients."""
        for name, whole in self._sharded.items():
            self.named[name].grad = None if whole.grad is None else whole.grad.to_local()
        return super().clip(max_norm)

    def _norm(self) -> Tensor:
        """The squared norms of all shares, added up, are the gradient's."""
        squared = total_norm(self.parameters).to(self.accelerator.device).square()
        dist.all_reduce(squared)
        return squared.sqrt()

    def zero_grad(self) -> None:
        """Forget the gradients of the shards, and those that FSDP would add to."""
        super().zero_grad()
        for whole in self._sharded.values():
            whole.grad = None

    @contextlib.contextmanager
    def whole_module(self, device: torch.device | None = None) -> Iterator[nn.Module]:
        """A copy without FSDP's hooks that holds gathered weights, one tensor at a time, on the main process."""
        for name, sharded in self._sharded.items():
            whole = sharded.detach().full_tensor()
            if self.accelerator.is_main_process:
                _put(self._skeleton, name, whole.to(device or whole.device))
            del whole
        try:
            yield self._skeleton
        finally:
            for name in self._sharded:
                _put(self._skeleton, name, self._skeleton.get_parameter(name).detach().to("meta"))

    def _places(self) -> Iterator[int]:
        """Where each shard's first element is among all elements that train."""
        before = 0
        for name, whole in self._sharded.items():
            yield before + self._first_row(name) * (whole.numel() // whole.shape[0])
            before += whole.numel()

    def _first_row(self, name: str) -> int:
        """FSDP deals out rows as `torch.chunk` does."""
        rows, processes = self._sharded[name].shape[0], self.accelerator.num_processes
        return min(-(-rows // processes) * self.accelerator.process_index, rows)

    def _writes(self, parameter: nn.Parameter) -> bool:
        return True


KINDS: dict[str, type[Replicated]] = {
    "none": Replicated,
    "oss": OptimizerSharded,
    "zero1": ZeroRedundancy,
    "fsdp": FullySharded,
}


def shard(
    kind: str,
    accelerator: Accelerator,
    module: nn.Module,
    groups: Sequence[ParameterGroup],
    make_optimizer: MakeOptimizer,
    make_schedule: MakeSchedule,
) -> Replicated:
    """Module, optimizer and schedule, ready to train on all processes. On one process there is nothing to shard."""
    actual = KINDS[kind if accelerator.num_processes > 1 else "none"]
    return actual(accelerator, module, groups, make_optimizer, make_schedule)


def _oss(groups: list[dict[str, Any]], optimizer: type[torch.optim.Optimizer], **keywords: Any) -> Any:
    from fairscale.optim.oss import OSS

    return OSS(groups, optim=optimizer, **keywords)


def _zero1(groups: list[dict[str, Any]], optimizer: type[torch.optim.Optimizer], **keywords: Any) -> Any:
    from torch.distributed.optim import ZeroRedundancyOptimizer

    # As views of one bucket a process, the updated weights travel in as many broadcasts as there are processes.
    return ZeroRedundancyOptimizer(groups, optimizer_class=optimizer, parameters_as_bucket_view=True, **keywords)


def _fully_shard(module: nn.Module, accelerator: Accelerator) -> None:
    """Shard each unit for itself, so that only one or two are whole at a time, and the rest with the root."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))
    frozen = {parameter for parameter in module.parameters() if not parameter.requires_grad}
    units: Sequence[nn.Module] = getattr(module, "sharding_units", list)()
    for unit in units:
        fully_shard(unit, mesh=mesh, ignored_params=frozen)
    fully_shard(module, mesh=mesh, ignored_params=frozen)


def clip_gradients(parameters: Sequence[nn.Parameter], norm: Tensor, max_norm: float) -> None:
    """Clip gradients of that norm to `max_norm`; 0 leaves them."""
    if max_norm > 0 and not below_limit(norm, max_norm):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)


def below_limit(norm: Tensor, max_norm: float) -> bool:
    """True where torch would multiply by 1, on the CPU: for other devices' norms the host would wait."""
    return devices.is_cpu(norm.device) and float(norm) + CLIP_EPSILON <= max_norm


def total_norm(parameters: Sequence[nn.Parameter], device: torch.device | None = None) -> Tensor:
    """The norm of all gradients together, added up in fp32 whatever they are in.

    Args:
        device: where it is added up, in the parameters' order, if they are on several.
    """
    gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if device is None and all(gradient.dtype == torch.float32 for gradient in gradients):
        return nn.utils.get_total_norm(gradients)
    # torch leaves the norm of half gradients in half, which has three digits, and adds up by device first.
    norms = [torch.linalg.vector_norm(gradient, dtype=torch.float32).to(device) for gradient in gradients]
    return torch.linalg.vector_norm(torch.stack(norms))


def _put(module: nn.Module, name: str, value: Tensor) -> None:
    """Replace a parameter by one that does not train."""
    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, nn.Parameter(value, requires_grad=False))
