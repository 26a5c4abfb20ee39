"""Exponential moving averages of what trains (EMA): a smoother model than the last step's, to save and to sample from.

An update after n others makes d·average + (1 - d)·weight, with d = min(decay, (1 + n) / (10 + n)) and d = 0 at the
first one, as diffusers' EMAModel has it: the average at first follows quickly, and the weights before training are no
part of it.
Averages are fp32 whatever the weights are: bf16 would lose what one step adds to them.
"""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn


def decay_at(updates: int, decay: float) -> float:
    """The decay of an update, by the number of updates before it."""
    return min(decay, (1 + updates) / (10 + updates)) if updates else 0.0


class Averages:
    """The averages of some parameters, or of the rows that a process has of them."""

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], decay: float, device: torch.device | None = None
    ) -> None:
        """
        Args:
            parameters: by name, each a tensor of which this process keeps the average; they start as it.
            device: where the averages are; None: beside the parameters.
        """
        self.parameters, self.decay, self.updates = parameters, decay, 0
        self.averages = {
            name: parameter.detach().to(device or parameter.device, torch.float32, copy=True)
            for name, parameter in parameters.items()
        }
        self._replaced: dict[str, Tensor] = {}  # weights of another precision, while the averages stand in their places

    @torch.no_grad()
    def update(self) -> None:
        """Take in the weights as they are after an optimizer step."""
        average_in = get_ema_multi_avg_fn(decay_at(self.updates, self.decay))
        self.updates += 1
        together: dict[torch.device, tuple[list[Tensor], list[Tensor]]] = {}  # weights may lie on two devices
        for name, parameter in self.parameters.items():
            average, weight = self.averages[name], parameter.detach()
            if average.device == weight.device and average.dtype == weight.dtype:
                averages, weights = together.setdefault(weight.device, ([], []))
                averages.append(average)
                weights.append(weight)
            else:  # one tensor at a time: no copy of all weights beside the averages
                average_in([average], [weight.to(average)], self.updates)
        for averages, weights in together.values():
            average_in(averages, weights, self.updates)

    def state_dict(self) -> dict[str, int]:
        """What a training state holds besides the averages, which are with their parameters."""
        return {"updates": self.updates}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Go on counting."""
        self.updates = state["updates"]

    @torch.no_grad()
    def exchange(self) -> None:
        """Put the averages where the weights are and the weights where the averages were; twice is as before.

        Weights of another precision are kept beside the averages, which are rounded into their places.
        """
        for name, parameter in self.parameters.items():
            weight, average = parameter.detach(), self.averages[name]
            if name in self._replaced:
                weight.copy_(self._replaced.pop(name))
                continue
            kept: Tensor = weight.clone()
            weight.copy_(average)
            if kept.dtype == average.dtype:
                average.copy_(kept)
            else:
                self._replaced[name] = kept
