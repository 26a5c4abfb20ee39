"""The training loop of every script, in three verbs: train -> train_step -> loss (the task's).

Step numbers count optimizer steps done before: step 0 is the first. A step is a function of (seed, step) alone: its
samples, noise and timesteps follow from them, so a step repeated after an overflow sees the same batch, and a run that
was stopped goes on as if it had not been.
"""

import itertools
import logging
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object
from torch import Tensor

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.data.training_set import Epochs
from library.errors import InputError, Stopped, TrainingError
from library.signals import Signals
from library.training.counters import Counters, RunReport, StepNumbers, StepResult
from library.training.engine.sharding import Replicated
from library.training.log.metrics import MetricsWriter, SpeedMeter, StepMetrics, finite_or_none
from library.training.log.quarantine import Quarantine
from library.training.ranks.rank_failure import together
from library.training.ranks.rank_watch import (
    READING,
    SAMPLING,
    SAVING,
    TRAINING,
    VALIDATING,
    WAITING,
    Progress,
    Requests,
    sums_of_all,
)
from library.training.state.names import AVERAGE_SUFFIX
from library.training.state.states import States
from library.training.step_profile import StepProfiler
from library.training.task import Task
from library.training.validation import Validator

logger = logging.getLogger(__name__)

LOWEST_SCALE = 2.0**-10  # of the loss: where a step's gradients overflow fp16 even so, no scale helps
STATE_AGAIN_S = (1.0, 4.0, 10.0)  # before each further try of the state that a run ends with
MAX_NOT_FINITE = 3  # steps running whose loss is not finite


@dataclass(frozen=True)
class LoopOptions:
    """How long the loop runs and what it does between steps."""

    max_train_steps: int
    accumulation: int
    global_batch: int  # images per step over all processes and micro-batches
    max_grad_norm: float  # 0: gradients are not clipped
    output_dir: Path
    epoch_samples: int = 0
    max_bad_samples: float = 1.0  # share of samples that may be bad before the run stops
    left_out: Sequence[tuple[str, str]] = ()  # (name, reason) of samples that the index could not use
    preview_at_first: bool = False
    checkpoints_due: Callable[[int, int | None], Sequence[str]] = lambda steps_done, epochs_done: ()
    previews_due: Callable[[int, int | None], Sequence[str]] = lambda steps_done, epochs_done: ()
    forget_checkpoints: Callable[[Path, str], None] = lambda saved, stem: None  # removes those that it makes obsolete


class Trainer:
    """Runs a task to its end: data in, steps, logs, checkpoints and previews out."""

    def __init__(
        self,
        task: Task,
        accelerator: Accelerator,
        parallel: Replicated,
        epochs: Epochs,
        options: LoopOptions,
        writer: MetricsWriter,
        states: States,
        signals: Signals,
        progress: Progress | None = None,
        validator: Validator | None = None,
        counters: Counters | None = None,
        start_step: int = 0,
        profiler: StepProfiler | None = None,
    ) -> None:
        """
        Args:
            parallel: what `library.training.engine.sharding.shard` made: module, optimizer and schedule.
            progress: where the other processes see how far this one is.
            counters: of the run so far, an object of its states.
            start_step: optimizer steps done before.
            profiler: records some of the steps.
        """
        self.task, self.accelerator, self.parallel = task, accelerator, parallel
        self.optimizer, self.schedule = parallel.optimizer, parallel.schedule
        self.epochs, self.options, self.writer = epochs, options, writer
        self.states, self.signals, self.progress = states, signals, progress or Progress()
        self.validator = validator
        self.profiler = profiler
        self.start_step, self.speed, self.counters = start_step, SpeedMeter(), counters or Counters()
        self._scale: float | None = None  # of the loss, as the log of the last step has read it: a read waits
        self.quarantine = Quarantine(
            accelerator, options.output_dir, writer.write_text, options.epoch_samples, options.max_bad_samples
        )
        self.quarantine.count = self.counters.quarantined

    def train(self, batches: Iterator[MicroBatch]) -> RunReport:
        """Train from the first step, or the one after a state that was taken up, to `max_train_steps`.

        Args:
            batches: this process's micro-batches from there on, `accumulation` a step, in the order of the plan.

        Raises:
            TrainingError: loss or gradients are not finite three steps running, or too many samples are bad.
            Stopped: by SIGTERM or SIGINT on any process, once a training state is durable.
        """
        self.quarantine.begin(self.start_step, self.options.left_out)
        if self.options.preview_at_first and not self.start_step:
            self._preview(["000000"], 0)
            self.stop_if_asked()  # what a signal has cut off is drawn anew, since the next start begins anew
        if self.counters.pictures:  # a signal has cut them off, or the run has ended in mid-work
            self._preview(self.counters.pictures, self.start_step, self.counters.saved_at)
            self.stop_if_asked()  # before a step: a later state does not know of these pictures any more
        for step in range(self.start_step, self.options.max_train_steps):
            self.progress.at(step, READING)
            if self.profiler is not None:
                self.profiler.begin(step + 1)
            began = time.perf_counter()
            step_batches = [next(batches) for _ in range(self.options.accumulation)]
            waited = time.perf_counter() - began
            self.progress.at(step, TRAINING)
            result = self.train_step(step_batches)
            self._log(step, step_batches, result, waited, time.perf_counter() - began)
            if self.profiler is not None:
                self.profiler.end(step + 1)
            self._stop_if_not_finite(step, step_batches, result)
            self.quarantine.stop_if_too_many((step + 1) * self.options.global_batch)
            if step == self.start_step:
                self.states.reserve()
            self._after_step(step + 1, result.numbers.requests)
        return RunReport(
            self.speed.images_per_second,
            self.counters.average.value,
            self.options.max_train_steps,
            self.counters.overflows,
            self.counters.not_updated,
            self.quarantine.count,
        )

    def train_step(self, batches: Sequence[MicroBatch]) -> StepResult:
        """One optimizer step over the micro-batches; after an fp16 overflow the same again at a smaller loss scale.

        Where no scale helps, the weights are left alone, and the next step begins with the scale that this one had.
        """
        lr = {group["name"]: float(group["lr"]) for group in self.optimizer.param_groups}
        asked, scaler = Requests(), self.accelerator.scaler
        if scaler is not None and self._scale is None:
            self._scale = scaler.get_scale()
        scale = self._scale
        for overflows in itertools.count():
            total = self._forward_backward(batches)
            numbers = self._numbers(batches, total, self.parallel.clip(self.options.max_grad_norm))
            asked |= numbers.requests
            numbers = replace(numbers, requests=asked)
            if not math.isfinite(numbers.loss):
                self._leave_weights_alone()
                return StepResult(replace(numbers, grad_norm=math.nan), overflows, False, lr)
            self.parallel.check_norm(numbers.grad_norm)
            if not math.isfinite(numbers.grad_norm) and (scaler is None or scaler.get_scale() <= LOWEST_SCALE):
                self._leave_weights_alone(scale)
                return StepResult(numbers, overflows, False, lr)
            if self._update():
                return StepResult(numbers, overflows, True, lr)
            # A device that saturates shows an overflow to its scaler alone: the norm is finite all the same.
            if scaler is not None and scaler.get_scale() < LOWEST_SCALE:
                self._leave_weights_alone(scale)
                return StepResult(numbers, overflows, False, lr)
        raise AssertionError("unreachable")

    def _forward_backward(self, batches: Sequence[MicroBatch]) -> Tensor:
        """Add the gradients of all micro-batches; returns their mean loss, of this process."""
        total = torch.zeros((), device=self.accelerator.device)
        for index, batch in enumerate(batches):
            # Gradients travel between processes once a step, with the last micro-batch.
            last = index == len(batches) - 1
            with nullcontext() if last else self.parallel.no_sync():
                loss = self.task.loss(self.parallel.module, batch) / len(batches)
                self.parallel.backward(loss)
            total += loss.detach().float()
        return total

    def _numbers(self, batches: Sequence[MicroBatch], loss: Tensor, grad_norm: Tensor) -> StepNumbers:
        """The host's one wait for the device in a step, and the processes' one exchange of numbers."""
        replaced = sum(batch.replaced for batch in batches)
        everywhere, *counts, losses, norm = sums_of_all(
            self.accelerator, [replaced, *self._own_requests().counts], on_device=[loss], as_they_are=[grad_norm]
        )
        return StepNumbers(losses / self.accelerator.num_processes, norm, int(everywhere), Requests.of_counts(counts))

    def _leave_weights_alone(self, scale: float | None = None) -> None:
        """Forget the gradients.

        Args:
            scale: of the loss, that the next step begins with; None: as it is.
        """
        self.parallel.zero_grad()
        scaler = self.accelerator.scaler
        if scaler is not None:  # it has seen these gradients: have it forget them, too
            scaler.update(scaler.get_scale() if scale is None else scale)

    def _update(self) -> bool:
        """Step optimizer and schedule; False if an overflow skipped both (then the loss scale has fallen)."""
        self.parallel.step()
        self.schedule.step()
        self.parallel.zero_grad()
        updated = not self.accelerator.optimizer_step_was_skipped
        if updated and self.parallel.averages is not None:
            self.parallel.averages.update()
        return updated

    def _log(self, step: int, batches: Sequence[MicroBatch], result: StepResult, waited: float, seconds: float) -> None:
        images = self.options.global_batch
        self.speed.add(images, seconds)
        self.counters.average.add(result.loss)
        self.counters.overflows += result.overflows
        self.counters.not_updated += not result.updated
        self.quarantine.add(step, batches, result.numbers.replaced)
        self.counters.quarantined = self.quarantine.count
        scaler = self.accelerator.scaler
        self._scale = None if scaler is None else scaler.get_scale()
        self.writer.write(
            StepMetrics(
                step=step + 1,
                epoch=self.epochs.epoch_of_step(step) + 1,
                loss=finite_or_none(result.loss),
                average_loss=finite_or_none(self.counters.average.value),
                lr=result.lr,
                grad_norm=finite_or_none(result.grad_norm),
                loss_scale=self._scale,
                overflows=result.overflows,
                images_per_second=images / seconds,
                images_per_second_without_wait=images / max(seconds - waited, 1e-9),
                data_wait_seconds=waited,
                memory_bytes=devices.peak_memory_bytes(self.accelerator.device),
                updated=result.updated,
                quarantined=self.quarantine.count,
            )
        )

    def _stop_if_not_finite(self, step: int, batches: Sequence[MicroBatch], result: StepResult) -> None:
        if result.updated:
            self.counters.not_finite_running = 0
            return
        self.counters.not_finite_running += 1
        what = "loss" if not math.isfinite(result.loss) else "gradient"
        if what == "gradient" and self.accelerator.scaler is not None:
            what = f"gradient at any loss scale down to 2^{math.log2(LOWEST_SCALE):.0f}"
        names = self._names(batches) + self._broken_latents(batches)
        if self.counters.not_finite_running < MAX_NOT_FINITE:
            self.writer.write_text(f"step {step + 1}: {what} not finite, weights left alone; samples: {names}")
            return
        raise TrainingError(
            f"{what} not finite at step {step + 1}, {MAX_NOT_FINITE} steps running; the weights are those of step "
            f"{step + 1 - MAX_NOT_FINITE}. Lower the learning rate, use --mixed_precision=bf16, or for fp16 another "
            f"VAE (--vae, --no_half_vae). Samples of this step: {names}"
        )

    def _names(self, batches: Sequence[MicroBatch]) -> str:
        """The samples of one step over all processes, for a message."""
        return ", ".join(gather_object([name for batch in batches for name in batch.names]))

    def _broken_latents(self, batches: Sequence[MicroBatch]) -> str:
        """Of the samples of one step those whose latents are not finite, for a message; "" where there is none."""
        find: Callable[[MicroBatch], list[str]] = getattr(self.task, "samples_not_finite", lambda batch: [])
        with together(self.accelerator):
            own = [name for batch in batches for name in find(batch)]
        broken = gather_object(own)
        return f"; the latents themselves are not finite of {', '.join(broken)}" if broken else ""

    def _after_step(self, steps_done: int, requests: Requests) -> None:
        """Save and sample where it is due.

        Args:
            requests: of any process, as this step's numbers have them.
        """
        epoch = self.epochs.epoch_of_step(steps_done - 1) + 1
        epochs_done = epoch if self.epochs.steps_before_epoch(epoch) == steps_done else None
        took_long = steps_done == self.options.max_train_steps  # or it is the last time to ask
        if self.validator is not None:  # before a state is saved, which says that this step is done with
            self.progress.phase = VALIDATING
            ends = epochs_done is not None
            took_long |= self.validator.run_if_due(
                self.parallel.module, steps_done, epoch, ends, self.counters.average.value
            )
        previews = self.counters.pictures = list(self.options.previews_due(steps_done, epochs_done))
        checkpoints = self.options.checkpoints_due(steps_done, epochs_done)
        # States come first: a checkpoint or picture that fails must not cost them.
        for stem in checkpoints if self.states.cadence.with_checkpoints else ():
            self.save_state(steps_done, stem)
        if requests.save or requests.stop_signal or self.states.step_is_due(steps_done):
            self.save_state(steps_done)
        for stem in checkpoints:
            self.save(stem)
        if not requests.stop_signal:  # the states that are saved know of pictures that are due
            self._preview(previews, steps_done)
        if took_long or checkpoints or previews:
            asked = self._agreed()
            if asked.save or asked.stop_signal:
                self.save_state(steps_done)
            requests |= asked
        if requests.stop_signal:
            self.finish_state(steps_done)
            self._wait_for_others()  # torchrun gives the others 30 s once one has left
            raise Stopped(requests.stop_signal, f"{steps_done} steps are done and in {self.states.newest}")

    def finish_state(self, steps_done: int, stem: str | None = None) -> None:
        """Until this step's training state is durable; one that cannot be written is tried again. Every process calls.

        Args:
            stem: its name, as for `save_state`.

        Raises:
            TrainingError: it cannot be written, at the last try either.
        """
        self.progress.phase = SAVING
        for seconds in STATE_AGAIN_S:
            self.states.finish_writing()
            if not any(sums_of_all(self.accelerator, [int(self.states.failed)])):
                return
            time.sleep(seconds)
            self.save_state(steps_done, stem, anew=True)
        with together(self.accelerator):
            self.states.wait()

    def stop_if_asked(self) -> None:
        """Before the first step, when there is nothing to save yet. Every process calls.

        Raises:
            Stopped: a signal has asked any process for it.
        """
        requests = self._agreed()
        if requests.save:
            self.signals.save_requested = True  # after the first step
        if requests.stop_signal:
            raise Stopped(requests.stop_signal)

    def _own_requests(self) -> Requests:
        """What this process asks for; an order to save is taken by it."""
        save = self.signals.take_save_request() or self.states.minutes_are_up() or self.states.try_again()
        return Requests(self.signals.stop_signal or 0, save)

    def _agreed(self) -> Requests:
        """What any process asks for now. Every process calls."""
        return Requests.of_counts(sums_of_all(self.accelerator, self._own_requests().counts))

    def save_state(self, steps_done: int, stem: str | None = None, anew: bool = False) -> None:
        """Save a training state. Every process calls; it is written in the background, and again at a later step where
        that fails.

        Args:
            anew: also where this step has one, which could not be written.
        """
        self.writer.sync()
        metrics = {"global_batch": self.options.global_batch, "board_folder": self.writer.board_folder}
        self.states.save(steps_done, metrics, stem, anew)

    def save(self, stem: str) -> None:
        """Write a checkpoint of that name, and one of the averages. Every process calls; the others wait."""
        with self.parallel.evaluated():
            self._save(stem, stem)
        if self.parallel.averages is not None:
            with self.parallel.averages_in_place():
                self._save(stem, f"{stem}{AVERAGE_SUFFIX}")

    def _save(self, stem: str, name: str) -> None:
        with self.parallel.whole_module(torch.device("cpu")) as module, self._others_waiting():
            if self.accelerator.is_main_process:
                self.progress.phase = SAVING
                self.writer.write_text(f"writing the weights of {name}")
                with self.signals.writing("a checkpoint"):
                    path = self.task.save(name, module)
                    self.writer.write_text(f"saving checkpoint: {path}")
                    self.options.forget_checkpoints(path, stem)

    def _preview(self, positions: Sequence[str], step: int, since: float = 0.0) -> None:
        """Sample pictures. Every process calls; the others wait.

        Args:
            since: pictures of these positions that are younger than this time are there already; 0: none is.
        """
        if not positions:
            return
        with (
            self.parallel.evaluated(),
            self.parallel.averages_in_place(),
            self.parallel.whole_module() as module,
            self._others_waiting(),
        ):
            if self.accelerator.is_main_process:
                self.progress.phase = SAMPLING
                if all(self._sample(position, step, module, since) for position in positions):
                    self.counters.pictures = []

    @contextmanager
    def _others_waiting(self) -> Iterator[None]:
        """Around what the main process does alone, without a collective: an error of it is one of all processes."""
        with together(self.accelerator):
            yield
            self.progress.phase = WAITING

    def _sample(self, position: str, step: int, module: torch.nn.Module, since: float) -> bool:
        """Sample pictures; whatever goes wrong with them costs pictures alone. False where a signal cuts them off."""
        try:
            self.task.preview(position, step, module, since)
        except Stopped:
            return False  # the signal is still there for all to agree on
        except Exception as error:
            if error is self.signals.failure:  # of another process, which ends this one
                raise
            expected = isinstance(error, (OSError, InputError))
            logger.warning("sample pictures after step %d: %s; training goes on", step, error, exc_info=not expected)
        return True

    def _wait_for_others(self) -> None:
        self.progress.phase = WAITING
        self.accelerator.wait_for_everyone()
