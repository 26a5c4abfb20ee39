"""The loss on images that are held out from training, at fixed timesteps with keyed noise, so that moments compare."""

import math
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.data.micro_batch import MicroBatch
from library.data.order.held_out import ValidationPlan
from library.signals import Signals
from library.training.cadence import Cadence
from library.training.log.metrics import MetricsWriter, finite_or_none
from library.training.ranks.rank_watch import sums_of_all


@dataclass
class Validator:
    """Measures the loss when it is due; leaves nothing behind that training could notice. Every process has one.

    Attributes:
        losses: of a module, a batch, the seed, and the numbers of its first samples among all: their losses, the same
            at each call.
        batches: this process's, the same number on each.
        cadence: without one, after each epoch.
        evaluated: a context in which the module has the weights that are used, for optimizers that train others (the
            averaged weights of schedule-free ones).
    """

    losses: Callable[[nn.Module, MicroBatch, int, range], Tensor]
    accelerator: Accelerator
    plan: ValidationPlan
    batches: Iterable[MicroBatch]
    cadence: Cadence
    writer: MetricsWriter
    signals: Signals
    evaluated: Callable[[], AbstractContextManager[None]] = nullcontext

    def run_if_due(self, module: nn.Module, steps_done: int, epoch: int, epoch_ends: bool, train_loss: float) -> bool:
        """Measure and write down, if this step or this end of an epoch asks for it.

        Args:
            epoch: that the step belongs to, from 1.
            train_loss: the average loss of training, to compare with.

        Returns:
            Whether it was asked for; the same on all processes.
        """
        due = ["step"] if self.cadence.step_is_due(steps_done) else []
        if epoch_ends and self.cadence.epoch_is_due(epoch):
            due.append("epoch")
        if not due:
            return False
        self.writer.write_text(f"validating after step {steps_done}")
        with self.evaluated():
            loss = self._measure(module)
        if loss is None:
            return True
        values = {}
        for kind in due:
            values[f"loss/validation/{kind}_average"] = finite_or_none(loss)
            values[f"loss/validation/{kind}_divergence"] = finite_or_none(loss - train_loss)
        self.writer.write_values(steps_done, epoch, values)
        self.writer.write_text(f"validation loss after step {steps_done}: {loss:.4f}")
        return True

    def _measure(self, module: nn.Module) -> float | None:
        """The mean over all images that are held out, of all processes; None if a signal asks to stop."""
        modes = [(part, part.training) for part in module.modules()]  # those of frozen parts differ
        module.eval()
        total, count = 0.0, 0
        try:
            with torch.no_grad():
                for batch in self.batches:
                    if any(sums_of_all(self.accelerator, [int(self.signals.stop_requested)])):
                        return None
                    for name, reason in batch.quarantined:
                        self.writer.write_text(f"validation: {name} stands for another image or is left out: {reason}")
                    numbers = self.plan.numbers(batch.step)
                    # Also where nothing counts: with sharded weights all processes have to compute together.
                    losses_B = self.losses(module, batch, self.plan.seed, numbers)
                    total += float(losses_B.sum())
                    count += len(numbers)
        finally:
            for part, was_training in modes:
                part.training = was_training
        sums = torch.tensor([total, count], dtype=torch.float32, device=self.accelerator.device)
        total, count = self.accelerator.reduce(sums, reduction="sum").tolist()
        return total / count if count else math.nan
