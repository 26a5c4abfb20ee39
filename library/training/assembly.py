"""From options to a finished run: what every script does around its task, in one order."""

import logging
import os
import platform
import secrets
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast, broadcast_object_list
from torch import Tensor, nn
from torch.optim.lr_scheduler import LRScheduler
from tqdm.contrib.logging import logging_redirect_tqdm

from library import device as devices
from library.atomic_write import remove
from library.cli.optimization import OptimizationOptions
from library.cli.options import Options
from library.cli.run import RunOptions, SavingOptions
from library.data.contact_sheet import write_contact_sheet
from library.data.dataset import TrainingData, prepare_data
from library.data.loader import MicroBatch, worker_deaths_reported
from library.data.training_set import TrainingSet
from library.disk_space import missing_space
from library.errors import InputError, TrainingError
from library.models.attention import report as attention_report
from library.models.token_counts import TokenCounter
from library.signals import Signals
from library.training import loop, validation
from library.training.agreement import check_agreement, describe_run
from library.training.caching import Encoders, make_caches
from library.training.companions import Companions, Progress, companions
from library.training.fused_backward import FusedBackward
from library.training.metrics import MetricsWriter
from library.training.optimizers import Construct, ParameterGroup, make_lr_schedule, make_optimizer
from library.training.plan_lines import plan_lines
from library.training.precision import make_accelerator
from library.training.report import FinalFigures, write_case_log
from library.training.resume import (
    Position,
    check_length,
    check_optimizer,
    check_position,
    choose_state,
    log_changed_options,
    plain_options,
    versions,
)
from library.training.rules import (
    check_caches,
    check_data,
    check_optimization,
    check_preview,
    check_saving,
    check_without_epochs,
)
from library.training.run_lock import RunLock
from library.training.saving import Cadence, Retention, epoch_name, last_name, step_name
from library.training.sharding import MakeOptimizer, Replicated, shard, sharding_kind
from library.training.state_choice import clear_left_behind, obsolete
from library.training.state_files import StateInfo, read_state
from library.training.state_writer import StateWriter
from library.training.states import Resumed, StateCadence, States, data_positions
from library.training.validation import Validator

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What a task is made in: the processes and their device, and the seed of the run."""

    accelerator: Accelerator
    seed: int
    signals: Signals
    progress: Progress  # of this process, for the others

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device


class Task(loop.Task, validation.Task, Protocol):
    """A loop's task that also says what trains and how captions become token ids."""

    @property
    def module(self) -> nn.Module:
        """The one module that trains."""

    @property
    def encoders(self) -> Encoders:
        """What does not train, for caches."""

    @property
    def network_name(self) -> str:
        """What the case log calls the network."""

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """What trains, at which rates."""

    def tokenize(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Token ids of captions, one tensor (B, chunks, 77) a text encoder. Called in the loader's workers."""

    def token_counter(self) -> TokenCounter:
        """What counts the tokens of captions."""

    def plan_lines(self) -> list[str]:
        """What is resolved about the model, for the log."""

    def checkpoint_bytes(self) -> int:
        """About what a checkpoint takes on disk."""

    def memory_lines(self, bucket_px: tuple[int, int]) -> list[str]:
        """What a step needs in memory at a bucket's width and height, for --dry_run."""


def run(
    options: Options,
    make_task: Callable[[Surroundings], Task],
    load_token_counter: Callable[[], TokenCounter],
    signals: Signals,
    started: float,
) -> None:
    """Train a task and print the final block; with --debug_dataset show its data instead.

    Args:
        load_token_counter: called where captions are shown and no task is made.
        signals: that the script listens to since it started.
        started: `time.perf_counter()` at the start of the script, for the end-to-end duration.

    Raises:
        InputError, TrainingError: as the parts raise them; what has been written stays.
        Stopped: by a signal, once what was trained is in a training state.
    """
    with ExitStack() as stack:
        accelerator = make_accelerator(options.run.mixed_precision, timedelta(minutes=options.run.ddp_timeout))
        devices.keep_freed_memory(accelerator.device)
        beside = companions(accelerator.process_index, accelerator.num_processes, signals, 60 * options.run.ddp_timeout)
        stack.enter_context(beside)
        stack.enter_context(_waiting_explained(beside))
        if not accelerator.is_main_process:
            logging.getLogger().setLevel(logging.WARNING)
        check_data(options.data, options.run)
        check_optimization(options.optimization, options.run)
        check_preview(options.preview)
        check_saving(options.saving)
        check_caches(options)
        if not options.run.dry_run:
            _prepare_output(options)
            if accelerator.is_main_process and not options.data.debug_dataset:
                lock = stack.enter_context(RunLock(options.saving.output_dir))
                clear_left_behind(options.saving.output_dir, lock)
        resumed = _resumed(options.saving, accelerator)
        surroundings = Surroundings(
            accelerator, _seed(options.run.seed, accelerator, resumed), signals, beside.progress
        )
        data = prepare_data(
            options.data,
            surroundings.seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accumulation=options.run.gradient_accumulation_steps,
            between=signals.stop_if_requested,
        )
        if data.samples is None:
            check_without_epochs(options.run, options.saving, options.preview)
        steps, epochs = _length(options.run, data)
        if resumed is not None:
            _check_resumed(resumed, options, data, surroundings.seed, steps)
        if options.data.debug_dataset:
            if accelerator.is_main_process:
                _show_data(options, data, load_token_counter(), resumed.step if resumed else 0, steps, signals)
            return
        task = make_task(surroundings)
        if accelerator.num_processes > 1:  # describing reads all code and some of every weight
            check_agreement(accelerator, describe_run(options, surroundings.seed, data, task.module))
        groups = task.parameter_groups()
        logger.info("seed: %d", surroundings.seed)
        resolved = plan_lines(options, data, steps, epochs, groups, accelerator, _sharding(options))
        for line in (*data.report(), *_caption_lines(data, task, accelerator), *task.plan_lines(), *resolved):
            logger.info(line)
        if options.run.dry_run:
            _make_schedule(options.optimization, steps, _make_optimizer(options.optimization)(groups))
            for line in task.memory_lines(data.largest_bucket):
                logger.info(line)
            return
        if accelerator.is_main_process:
            _check_room(options, task, groups)
        if isinstance(data, TrainingData):
            data = replace(
                data, caches=make_caches(options, data, task.encoders, accelerator, signals, beside.progress)
            )
        report = _train(options, task, groups, data, surroundings, steps, resumed)
        if accelerator.is_main_process:
            _finish(options, report, task.network_name, data, accelerator, started)
        accelerator.end_training()


@contextmanager
def _waiting_explained(beside: Companions) -> Iterator[None]:
    """A collective that has timed out becomes an error that says which process the others waited for."""
    try:
        yield
    except RuntimeError as error:  # gloo's, and torch's DistError
        if not beside.verdict or isinstance(error, TrainingError):
            raise
        raise TrainingError(f"{beside.verdict} ({str(error).splitlines()[0]:.200})") from error


def _train(
    options: Options,
    task: Task,
    groups: Sequence[ParameterGroup],
    data: TrainingSet,
    surroundings: Surroundings,
    steps: int,
    resumed: Resumed | None,
) -> loop.RunReport:
    """Shard, take up a state if there is one, train, save the final checkpoint."""
    accelerator, saving = surroundings.accelerator, options.saving
    make_parallel: Callable[..., Replicated] = partial(shard, _sharding(options))
    if options.optimization.fused_backward_pass:
        make_parallel = partial(FusedBackward, max_grad_norm=options.optimization.max_grad_norm)
    parallel = make_parallel(
        accelerator,
        task.module,
        groups,
        _make_optimizer(options.optimization),
        partial(_make_schedule, options.optimization, steps),
    )
    if options.optimization.use_ema:
        where = torch.device("cpu") if options.optimization.offload_ema else None
        parallel.keep_averages(options.optimization.ema_decay, where)
    writer = MetricsWriter(
        saving.output_dir,
        saving.logging_dir,
        steps,
        accelerator.is_main_process,
        steps_done=resumed.step if resumed else 0,
        board_folder=resumed.state.info.metrics.get("board_folder") if resumed else None,
    )
    with ExitStack() as stack:
        stack.callback(writer.close)
        states = _states(options, parallel, data, surroundings)
        stack.enter_context(states.writer)
        stack.enter_context(logging_redirect_tqdm())
        trainer = loop.Trainer(
            task,
            accelerator,
            parallel,
            data.epochs,
            _loop_options(options, data, steps),
            writer,
            states,
            surroundings.signals,
            surroundings.progress,
            _validator(task, data, surroundings, writer),
        )
        if resumed is not None:
            trainer.resume(resumed)
            logger.info("resumed from %s: %d steps are done", resumed.folder, resumed.step)
        trainer.stop_if_asked()
        logger.info("running training")
        stack.enter_context(worker_deaths_reported())
        report = trainer.train(iter(data.loader(task.tokenize, steps, trainer.start_step)))
        trainer.save(last_name(saving.output_name))
        if saving.save_state or saving.save_state_on_train_end:
            trainer.save_state(steps, last_name(saving.output_name))
    logger.info("model saved.")
    return report


def _caption_lines(data: TrainingSet, task: Task, accelerator: Accelerator) -> list[str]:
    """How many captions are cut off; only the main process, which logs it, reads them."""
    if not accelerator.is_main_process:
        return []
    counter = task.token_counter()
    return data.caption_lines(counter, counter.most)


def _show_data(
    options: Options, data: TrainingSet, counter: TokenCounter, start_step: int, steps: int, signals: Signals
) -> None:
    """Report on the data, and write the first samples of the run, of all its processes, as a page."""
    for line in (*data.report(), *data.caption_lines(counter, counter.most)):
        logger.info(line)
    shown = data.of_one_process()

    def batches() -> Iterator[MicroBatch]:
        for batch in shown.loader(lambda captions: (), steps, start_step):
            signals.stop_if_requested()
            yield batch

    page = options.saving.output_dir / "debug_dataset" / "index.html"
    with worker_deaths_reported():
        write_contact_sheet(page, batches(), counter, counter.most)


def _validator(task: Task, data: TrainingSet, surroundings: Surroundings, writer: MetricsWriter) -> Validator | None:
    """What measures the loss on the images that are held out, if there are any."""
    if not isinstance(data, TrainingData):
        return None  # a stream, of which nothing is held out
    found = data.validation(task.tokenize)
    if found is None:
        return None
    steps, epochs = data.options.validate_every_n_steps, data.options.validate_every_n_epochs
    cadence = Cadence(steps, epochs if steps or epochs else 1)
    return Validator(task, surroundings.accelerator, *found, cadence, writer, surroundings.signals)


def _states(options: Options, parallel: Replicated, data: TrainingSet, surroundings: Surroundings) -> States:
    """What saves training states, as the flags have it."""
    saving, accelerator = options.saving, surroundings.accelerator
    writer = StateWriter(
        saving.output_dir,
        output_name=saving.output_name,
        retention=Retention(
            saving.save_last_n_epochs_state or saving.save_last_n_epochs,
            saving.save_last_n_steps_state or saving.save_last_n_steps,
        ),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device=accelerator.device,
    )
    cadence = StateCadence(saving.save_state_every_n_steps, saving.save_state_every_n_minutes, saving.save_state)
    plan, plain, software = data.fingerprint(), _plain_options(options), versions()

    def info(step: int, metrics: Mapping[str, Any]) -> StateInfo:
        return StateInfo(step, surroundings.seed, plan, plain, software, metrics)

    return States(writer, parallel, cadence, info, partial(step_name, saving.output_name), data.position)


def _sharding(options: Options) -> str:
    return sharding_kind(options.optimization.sharding, options.optimization.optimizer_type)


def _plain_options(options: Options) -> dict[str, Any]:
    """By the flags' names, those of the only subset among them; several subsets stand as a list."""
    plain = plain_options(
        options.data, options.caches, options.optimization, options.run, options.saving, options.preview
    )
    if len(options.data.subsets) == 1:
        plain |= plain.pop("subsets")[0]
    return plain


def _resumed(saving: SavingOptions, accelerator: Accelerator) -> Resumed | None:
    """The state that --resume asks for: the main process chooses and verifies it, all read it."""
    if saving.resume is None:
        return None
    chosen = choose_state(saving.resume, saving.output_dir, saving.output_name) if accelerator.is_main_process else None
    (folder,) = broadcast_object_list([chosen])
    return None if folder is None else Resumed(folder, read_state(folder, verified=True))


def _check_resumed(resumed: Resumed, options: Options, data: TrainingSet, seed: int, steps: int) -> None:
    """Whether this run may go on from the state."""
    info = resumed.state.info
    now = Position(data.fingerprint(), seed, data.global_batch)
    check_position(info, now, resumed.folder, options.saving.resume_anyway)
    check_optimizer(info, options.optimization.optimizer_type, resumed.folder)
    check_length(resumed.step, steps, resumed.folder)
    data.go_on_from(data_positions(resumed.state), options.saving.resume_anyway)
    log_changed_options(info, _plain_options(options))


def _prepare_output(options: Options) -> None:
    """Make the output folders now: what cannot be written to is found before the training, not after it."""
    folders = {"--output_dir": options.saving.output_dir, "--logging_dir": options.saving.logging_dir}
    for flag, folder in folders.items():
        if folder is None:
            continue
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".writable.{platform.node()}.{os.getpid()}"
            probe.touch()
            probe.unlink(missing_ok=True)
        except OSError as error:
            raise InputError(f"{flag} {folder}: cannot be written to ({error.strerror}); choose another") from error


def _check_room(options: Options, task: Task, groups: Sequence[ParameterGroup]) -> None:
    """Raise InputError where --output_dir has no room for a checkpoint, and a training state if any is asked for."""
    saving, average = options.saving, options.optimization.use_ema
    trained = sum(parameter.numel() * parameter.element_size() for group in groups for parameter in group.parameters)
    states = saving.save_state, saving.save_state_every_n_steps, saving.save_state_every_n_minutes
    needed = task.checkpoint_bytes() * (1 + average) + trained * (1 + average) * any(states)
    if missing := missing_space(saving.output_dir, needed):
        raise InputError(
            f"--output_dir {saving.output_dir}: what this run saves at the least, optimizer state not counted, "
            f"{missing}; make room, or choose another"
        )


def _seed(given: int | None, accelerator: Accelerator, resumed: Resumed | None) -> int:
    """The run's seed: the one given, that of the run that goes on, or one that the main process draws.

    It is logged, to repeat the run.
    """
    if given is not None:
        return given
    if resumed is not None:
        return resumed.state.info.seed
    drawn = torch.tensor([secrets.randbits(31)], device=accelerator.device)
    return int(broadcast(drawn).item())


def _length(options: RunOptions, data: TrainingSet) -> tuple[int, int]:
    """Optimizer steps of the run, and the epochs that they touch."""
    steps = options.max_train_steps
    if options.max_train_epochs is not None:
        steps = data.epochs.steps_before_epoch(options.max_train_epochs)
        logger.info("override steps. steps for %d epochs is %d", options.max_train_epochs, steps)
        if steps == 0:
            raise InputError(
                f"--max_train_epochs={options.max_train_epochs} has not one full batch of {data.global_batch} images "
                "of one bucket; train more epochs, with a smaller --train_batch_size, or with fewer buckets"
            )
    return steps, data.epochs.epoch_of_step(steps - 1) + 1


def _make_optimizer(options: OptimizationOptions) -> MakeOptimizer:
    def make(groups: Sequence[ParameterGroup], **construct: Construct) -> torch.optim.Optimizer:
        return make_optimizer(options.optimizer_type, groups, options.optimizer_args, **construct)

    return make


def _make_schedule(options: OptimizationOptions, steps: int, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The learning rates' schedule over the run."""
    return make_lr_schedule(
        options.lr_scheduler,
        optimizer,
        steps,
        options.lr_warmup_steps,
        options.lr_scheduler_num_cycles,
        options.lr_scheduler_power,
    )


def _loop_options(options: Options, data: TrainingSet, steps: int) -> loop.LoopOptions:
    """What the loop does between steps; at the last epoch the final checkpoint stands for the epoch's."""
    name = options.saving.output_name
    saves = Cadence(options.saving.save_every_n_steps, options.saving.save_every_n_epochs)
    shows = Cadence(options.preview.sample_every_n_steps, options.preview.sample_every_n_epochs)

    def checkpoints_due(steps_done: int, epochs_done: int | None) -> list[str]:
        due = [step_name(name, steps_done)] if saves.step_is_due(steps_done) else []
        if epochs_done and saves.epoch_is_due(epochs_done) and steps_done < steps:
            due.append(epoch_name(name, epochs_done))
        return due

    def previews_due(steps_done: int, epochs_done: int | None) -> list[str]:
        if epochs_done and shows.epoch_is_due(epochs_done):
            return [f"e{epochs_done:06d}"]
        return [f"{steps_done:06d}"] if shows.step_is_due(steps_done) else []

    def forget_checkpoints(saved: Path, stem: str) -> None:
        retention = Retention(options.saving.save_last_n_epochs, options.saving.save_last_n_steps)
        names = [entry.name for entry in saved.parent.iterdir()]
        for old in obsolete(names, saved.name, retention, name, suffix=saved.name.removeprefix(stem)):
            logger.info("removing old checkpoint: %s", saved.parent / old)
            remove(saved.parent / old)

    return loop.LoopOptions(
        max_train_steps=steps,
        accumulation=options.run.gradient_accumulation_steps,
        global_batch=data.global_batch,
        max_grad_norm=options.optimization.max_grad_norm,
        output_dir=options.saving.output_dir,
        epoch_samples=sys.maxsize if data.samples is None else data.samples,
        max_bad_samples=options.data.max_bad_samples,
        left_out=data.left_out,
        preview_at_first=options.preview.sample_at_first,
        checkpoints_due=checkpoints_due,
        previews_due=previews_due,
        forget_checkpoints=forget_checkpoints,
    )


def _finish(
    options: Options,
    report: loop.RunReport,
    network_name: str,
    data: TrainingSet,
    accelerator: Accelerator,
    started: float,
) -> None:
    """Log what ran on which attention backend, write {CaseName}.log, print the final block."""
    for line in attention_report():
        logger.info(line)
    figures = FinalFigures(
        images_per_second=report.images_per_second,
        train_loss=report.average_loss,
        duration_seconds=time.perf_counter() - started,
        global_batch=data.global_batch,
        process_count=accelerator.num_processes,
        batch_per_device=options.data.train_batch_size,
        quarantined=report.quarantined,
        left_out=len(data.left_out),
        overflows=report.overflows,
        steps_not_updated=report.steps_not_updated,
    )
    if options.saving.case_name:
        write_case_log(figures, options.saving.output_dir, options.saving.case_name, network_name)
    print(figures.block(), flush=True)
