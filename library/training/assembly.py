"""From options to a finished run: what every script does around its task, in one order."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from library.cli.data import DataOptions
from library.cli.optimization import OptimizationOptions
from library.cli.run import PreviewOptions, RunOptions, SavingOptions
from library.models import attention
from library.training import loop
from library.training.metrics import MetricsWriter
from library.training.optimizers import ParameterGroup, make_lr_schedule, make_optimizer
from library.training.precision import make_accelerator
from library.training.saving import last_name

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Options:
    """The option groups that every training script has."""

    data: DataOptions
    optimization: OptimizationOptions
    run: RunOptions
    saving: SavingOptions
    preview: PreviewOptions


@dataclass(frozen=True)
class Surroundings:
    """What a task is made in: the processes and their device, and the seed of the run."""

    accelerator: Accelerator
    seed: int

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device


class Task(loop.Task, Protocol):
    """A loop's task that also says what trains and how captions become token ids."""

    module: nn.Module
    network_name: str

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """What trains, at which rates."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids of captions, one tensor (B, chunks, 77) a text encoder. Called in the loader's workers."""


def run(options: Options, make_task: Callable[[Surroundings], Task], started: float) -> None:
    """Train a task and print the final block.

    Args:
        started: `time.perf_counter()` at the start of the script, for the end-to-end duration.

    Raises:
        InputError, TrainingError: as the parts raise them; what has been written stays.
    """
    accelerator = make_accelerator(options.run.mixed_precision)
    main = accelerator.is_main_process
    logging.getLogger().setLevel(logging.INFO if main else logging.WARNING)
    _prepare_output(options.saving.output_dir)
    seed = _seed(options.run.seed, accelerator)
    plan, loader_for = _prepare_data(options, accelerator, seed)
    steps, epochs = _length(options.run, plan)
    task = make_task(Surroundings(accelerator, seed))
    groups = task.parameter_groups()
    _log_plan(options, plan, steps, epochs, groups, accelerator)
    if options.run.dry_run:
        _print_memory(options, task)
        return
    optimization = options.optimization
    bare_optimizer = make_optimizer(
        optimization.optimizer_type, groups, optimization.optimizer_args, accelerator.num_processes
    )
    schedule = make_lr_schedule(
        optimization.lr_scheduler,
        bare_optimizer,
        steps,
        optimization.lr_warmup_steps,
        optimization.lr_scheduler_num_cycles,
        optimization.lr_scheduler_power,
    )
    module, optimizer = accelerator.prepare(task.module, bare_optimizer)
    logger.info("running training")
    writer = MetricsWriter(options.saving.output_dir, options.saving.logging_dir, steps, main)
    try:
        trainer = loop.Trainer(
            task, accelerator, module, optimizer, schedule, plan, _loop_options(options, steps, plan), writer
        )
        report = trainer.train(iter(loader_for(steps, task.tokenize)))
    finally:
        writer.close()
    if main:
        logger.info("model saved: %s", task.save(last_name(options.saving.output_name)))
        for line in attention.report():
            logger.info(line)
        _finish(options, report, task.network_name, accelerator, started)
    accelerator.end_training()
