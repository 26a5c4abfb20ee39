"""Training with --blocks_to_swap: gradients and updates of the blocks that live in the CPU's memory.

Weights and gradients of two devices go through one optimizer, which updates each where it is. The numbers are those of
training without, as far as the CPU and the device compute alike.
"""

from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from library.training.engine.block_swap import HostBlocks
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import ParameterGroup
from library.training.engine.sharding import MakeOptimizer, MakeSchedule, Replicated, total_norm


class SwappedBlocks(Replicated):
    """As `Replicated`, for one process: what is swapped is updated after backward, on the CPU."""

    def __init__(self, *given: Any, host_blocks: HostBlocks) -> None:
        """`given` is what `Replicated` takes; `host_blocks` are of its module, which is otherwise on the device."""
        self.host_blocks = host_blocks
        super().__init__(*given)

    def _prepare(
        self, groups: Sequence[ParameterGroup], make_optimizer: MakeOptimizer, make_schedule: MakeSchedule
    ) -> None:
        accelerator = self.accelerator
        # Its placement would move the swapped blocks, too.
        self.module = accelerator.prepare_model(self.bare_module, device_placement=False)
        self.bare_optimizer = make_optimizer(groups)
        schedule = make_schedule(self.bare_optimizer)
        self.optimizer = accelerator.prepare_optimizer(self.bare_optimizer, device_placement=False)
        self.schedule = accelerator.prepare_scheduler(schedule)

    def backward(self, loss: Tensor) -> None:
        """Backward; all gradients of swapped blocks are in the CPU's memory then."""
        super().backward(loss)
        self.host_blocks.settle()

    def _norm(self) -> Tensor:
        return total_norm(self.parameters, self.accelerator.device)


class SwappedFusedBackward(FusedBackward):
    """As `FusedBackward`: what is swapped is updated on the CPU as soon as its gradient has come there."""

    def __init__(self, *given: Any, host_blocks: HostBlocks, **named: Any) -> None:
        """`given` and `named` are what `FusedBackward` takes; `host_blocks` as for `SwappedBlocks`."""
        self.host_blocks = host_blocks
        super().__init__(*given, **named)

    def _place_module(self) -> nn.Module:
        return self.accelerator.prepare_model(self.bare_module, device_placement=False, evaluation_mode=True)

    def _watch(self, groups: Sequence[dict[str, Any]]) -> None:
        swapped = {id(parameter) for parameter in self.host_blocks.parameters}
        places = {id(parameter): place for place, group in enumerate(groups) for parameter in group["params"]}
        super()._watch(
            [{**group, "params": [one for one in group["params"] if id(one) not in swapped]} for group in groups]
        )
        self.host_blocks.on_gradients(
            lambda parameter: self._clip_each([(parameter, self._finish(parameter))]),
            lambda parameter: self._step({places[id(parameter)]: [parameter]}),
        )

    def backward(self, loss: Tensor) -> None:
        """Backward and all updates, those of swapped blocks included."""
        super().backward(loss)
        self.host_blocks.settle()
