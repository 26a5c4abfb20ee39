"""--fused_backward_pass: parameters are updated in backward soon after their gradients are there, which are then freed.

So of all gradients few exist at a time: 10.2 GB less for SDXL's U-Net in fp32. Small parameters are collected, up to 32
MiB or a hundredth of all gradients, so that not each of them costs a step of the optimizer. What follows from updating
so early: the norm of all gradients is known only after the last update, so clipping bounds each tensor's own norm; and
a gradient that is not finite is noticed when other weights have been updated, so it ends the run.
"""

import math
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor, nn

from library.errors import TrainingError
from library.training.engine.group_entries import PartialSteps
from library.training.engine.optimizers import ParameterGroup
from library.training.engine.sharding import CLIP_EPSILON, MakeOptimizer, MakeSchedule, Replicated, below_limit

# Bytes of gradients that are collected for one update: at most so many, and at most that share of all gradients.
COLLECTED_BYTES, COLLECTED_SHARE = 32 * 2**20, 0.01


class FusedBackward(Replicated):
    """As `Replicated`, with the optimizer's step in backward; on several processes each gradient is averaged there."""

    def __init__(
        self,
        accelerator: Accelerator,
        module: nn.Module,
        groups: Sequence[ParameterGroup],
        make_optimizer: MakeOptimizer,
        make_schedule: MakeSchedule,
        max_grad_norm: float,
    ) -> None:
        """`max_grad_norm` is for each tensor; 0 leaves gradients as they are."""
        self.max_grad_norm = max_grad_norm
        self._norms: list[Tensor] = []  # of this step's gradients
        # Those that wait for their update, with their gradients' norms, by their groups' places.
        self._collected: dict[int, list[tuple[nn.Parameter, Tensor]]] = {}
        self._collected_bytes = 0
        super().__init__(accelerator, module, groups, make_optimizer, make_schedule)

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        accelerator = self.accelerator
        # Autocast without DistributedDataParallel, whose sums come after the hooks that would need them.
        self.module = self._place_module()
        self.bare_optimizer = make_optimizer(groups)
        schedule = make_schedule(self.bare_optimizer)
        self.optimizer = accelerator.prepare_optimizer(self.bare_optimizer)
        self.schedule = accelerator.prepare_scheduler(schedule)
        self._steps = PartialSteps(self.bare_optimizer)
        self._watch(self.bare_optimizer.param_groups)

    def _place_module(self) -> nn.Module:
        """The module on its device, with autocast."""
        return self.accelerator.prepare_model(self.bare_module, evaluation_mode=True)

    def _watch(self, groups: Sequence[dict[str, Any]]) -> None:
        """Have the parameters of the optimizer's groups updated as their gradients are made."""
        self._most_bytes = collected_bytes(sum(one.nbytes for group in groups for one in group["params"]))
        for place, group in enumerate(groups):
            for parameter in group["params"]:
                parameter.register_post_accumulate_grad_hook(partial(self._update, place))

    def backward(self, loss: Tensor) -> None:
        """Backward and all updates; nothing at all where the loss of any process is not finite."""
        finite = loss.detach().isfinite().float()
        if self.accelerator.num_processes > 1:
            dist.all_reduce(finite, op=dist.ReduceOp.MIN)
        self._steps.begin()
        if finite:
            self.accelerator.backward(loss)
            self._update_collected()

    @torch.no_grad()
    def _update(self, place: int, parameter: nn.Parameter) -> None:
        norm = self._finish(parameter)
        self._collected.setdefault(place, []).append((parameter, norm))
        self._collected_bytes += parameter.nbytes
        if self._collected_bytes > self._most_bytes:
            self._update_collected()

    @torch.no_grad()
    def _update_collected(self) -> None:
        if self._collected:
            self._clip_each([one for some in self._collected.values() for one in some])
            self._step({place: [parameter for parameter, _ in some] for place, some in self._collected.items()})
        self._collected, self._collected_bytes = {}, 0

    def _finish(self, parameter: nn.Parameter) -> Tensor:
        """Average a gradient over all processes; returns its norm, which `clip` will have, too."""
        gradient = parameter.grad
        assert gradient is not None
        if self.accelerator.num_processes > 1:
            dist.all_reduce(gradient)
            gradient.div_(self.accelerator.num_processes)
        norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
        self._norms.append(norm)
        return norm

    def _clip_each(self, given: Sequence[tuple[nn.Parameter, Tensor]]) -> None:
        """Clip gradients by their own norms, as torch does with one: few launches for those of one device."""
        if self.max_grad_norm == 0:
            return
        norms = torch.stack([norm for _, norm in given])
        if below_limit(norms.max(), self.max_grad_norm):
            return
        coefficients = (self.max_grad_norm / (norms + CLIP_EPSILON)).clamp(max=1.0)
        for (parameter, _), coefficient in zip(given, coefficients, strict=True):
            assert parameter.grad is not None
            parameter.grad.mul_(coefficient)

    def _step(self, parameters: Mapping[int, Sequence[nn.Parameter]]) -> None:
        """The optimizer's step for some parameters, by the places of their groups, and the end of their gradients."""
        self._steps.step(parameters)
        for some in parameters.values():
            for parameter in some:
                parameter.grad = None

    def step(self) -> None:
        """The end of the updates that backward has done."""
        self._steps.end()

    def clip(self, max_norm: float) -> Tensor:
        """The norm of all gradients together, before each was clipped by itself."""
        norms = torch.stack(self._norms) if self._norms else torch.zeros(1, device=self.accelerator.device)
        self._norms.clear()
        return torch.linalg.vector_norm(norms)

    def check_norm(self, norm: float) -> None:
        """Raise TrainingError where the norm is not finite: other weights have been updated by then."""
        if not math.isfinite(norm):
            raise TrainingError(
                "a gradient is not finite though the loss is, and --fused_backward_pass has updated other weights by "
                "then. Resume from the last training state with a lower learning rate, or without the flag, which "
                "leaves such steps out"
            )


def collected_bytes(whole: int) -> int:
    """How many bytes of gradients, of so many in all, wait for their update in backward."""
    return min(COLLECTED_BYTES, int(COLLECTED_SHARE * whole))
