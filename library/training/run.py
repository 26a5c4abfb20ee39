"""From options to a finished run: what every script does around its task, in one order."""

import logging
import os
import secrets
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import broadcast
from torch.optim.lr_scheduler import LRScheduler
from tqdm.contrib.logging import logging_redirect_tqdm

from library import device as devices
from library.data.dataset import TrainingData, prepare_data
from library.data.loader import worker_deaths_reported
from library.data.training_set import TrainingSet
from library.errors import InputError
from library.families import FAMILIES
from library.options.optimizer import OptimizerOptions
from library.options.run import RunOptions
from library.options.saved_config import config_path, write_config
from library.options.training import TrainingOptions
from library.options.values import plain_values
from library.processes.environment import place_of_process, take_environment
from library.processes.gathering import wait_for_all
from library.signals import Signals
from library.training.build import MakeRecipe, Parts, build_parts, load_token_counter
from library.training.cache_filling import make_caches
from library.training.cadence import Cadence
from library.training.counters import Counters, RunReport
from library.training.due import loop_options
from library.training.engine.bf16_update import bf16_update
from library.training.engine.compiling import check_backend
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import (
    Construct,
    ParameterGroup,
    make_lr_schedule,
    make_optimizer,
    parameters_by_name,
)
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import MakeOptimizer, Replicated, shard, sharding_kind
from library.training.engine.swapped_backward import SwappedBlocks, SwappedFusedBackward
from library.training.engine.trials import check_exactness
from library.training.inputs import input_paths
from library.training.log.metrics import MetricsWriter
from library.training.log.shown_data import caption_lines, show_data
from library.training.log.startup import plan_lines
from library.training.loop import Trainer
from library.training.output_folder import check_room, finish, prepare_output
from library.training.ranks.agreement import check_agreement, describe_run
from library.training.ranks.main_process import on_main_process
from library.training.ranks.rank_failure import together
from library.training.ranks.rank_watch import Progress, watch_ranks
from library.training.rules import check_options_here, check_without_epochs
from library.training.state.branch import start_branch
from library.training.state.choice import clear_left_behind
from library.training.state.files import StateInfo
from library.training.state.lineage import Lineage
from library.training.state.names import PROFILE_FOLDER, last_name, step_name
from library.training.state.resume import (
    check_identity,
    check_parameters,
    check_resumed,
    check_taken_up,
    resumed_state,
    versions,
)
from library.training.state.retention import Retention
from library.training.state.run_lock import RunLock
from library.training.state.states import Resumed, StateCadence, Stateful, States, take_up
from library.training.state.writer import StateWriter
from library.training.step_profile import StepProfiler, check_profile
from library.training.validation import Validator
from library.training.written_names import written_names

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Surroundings:
    """What a run is surrounded by: the processes and their device, the seed, signals."""

    accelerator: Accelerator
    seed: int
    signals: Signals
    progress: Progress  # of this process, for the others

    @property
    def device(self) -> torch.device:
        """This process's device."""
        return self.accelerator.device


def run(
    options: TrainingOptions, families: Sequence[str], make_recipe: MakeRecipe, signals: Signals, started: float
) -> None:
    """Train and print the final block; with --debug_dataset show the data instead.

    Args:
        families: names of the families that the script trains.
        make_recipe: what trains, made of the options and the model.
        signals: that the script listens to since it started.
        started: `time.perf_counter()` at the start of the script, for the end-to-end duration.

    Raises:
        InputError, TrainingError: as the parts raise them; what has been written stays.
        Stopped: by a signal, once what was trained is in a training state.
    """
    trained = [FAMILIES[name] for name in families]
    with ExitStack() as stack:
        accelerator = _gathered(options, signals)
        devices.keep_freed_memory(accelerator.device)
        watch = watch_ranks(accelerator.process_index, accelerator.num_processes, signals, 60 * options.run.ddp_timeout)
        stack.enter_context(watch)
        if not accelerator.is_main_process:
            logging.getLogger().setLevel(logging.WARNING)
        check_options_here(options, trained, accelerator.device, accelerator.num_processes)
        if options.compiling.torch_compile and not options.data.debug_dataset:
            check_backend(options.compiling.dynamo_backend, accelerator.device)
        if not options.run.dry_run:
            prepare_output(options)
            if not options.data.debug_dataset:
                on_main_process(accelerator, partial(_take_folder, options, stack))
        resumed = resumed_state(options, accelerator)
        seed = _seed(options.run.seed, accelerator, resumed)
        surroundings = Surroundings(accelerator, seed, signals, watch.progress)
        data = prepare_data(
            options.data,
            seed,
            rank=accelerator.process_index,
            world_size=accelerator.num_processes,
            accumulation=options.run.gradient_accumulation_steps,
            between=signals.stop_if_requested,
            output_dir=options.saving.output_dir,
        )
        if data.samples is None:
            check_without_epochs(options)
        steps, epochs = _length(options.run, data)
        check_profile(options.logs.profile, steps)
        if resumed is not None:
            check_resumed(resumed, options, data, seed, steps)
        if options.data.debug_dataset:
            if accelerator.is_main_process:
                counter = load_token_counter(options, trained)
                show_data(options, data, counter, resumed.step if resumed else 0, steps, signals)
            return
        parts = build_parts(options, trained, make_recipe, accelerator, seed, signals)
        if accelerator.num_processes > 1:  # describing reads all code and some of every weight
            check_agreement(accelerator, describe_run(options, seed, data, parts.recipe.module, parts.identity))
        parts.choose_checkpoints(data.largest_bucket)
        groups = parts.recipe.groups()
        if resumed is not None:
            check_identity(resumed, parts.identity, options.states.resume_anyway)
            check_parameters(resumed, parameters_by_name(parts.recipe.module, groups))
        _try_optimizer(options, groups, surroundings)
        logger.info("seed: %d", seed)
        resolved = plan_lines(options, data, steps, epochs, groups, accelerator, _sharding(options))
        for line in (
            *data.report(),
            *caption_lines(data, parts.token_counter, accelerator.is_main_process),
            *parts.lines,
            *resolved,
        ):
            logger.info(line)
        if options.run.dry_run:
            _make_schedule(options.optimizer, steps, _make_optimizer(options, seed)(groups))
            for line in parts.memory.lines(data.largest_bucket):
                logger.info(line)
            return
        on_main_process(accelerator, partial(check_room, options, parts.recipe.saved_bytes(), groups))
        if isinstance(data, TrainingData):
            caches = make_caches(options, data, parts.encoders, accelerator, signals, watch.progress)
            data = replace(data, caches=caches)
        report = _train(options, parts, groups, data, surroundings, steps, resumed)
        if accelerator.is_main_process:
            compiled = parts.placement.compiled.lines() if parts.placement.compiled else []
            finish(options, report, parts.model.family.title, compiled, data, accelerator, started)
        accelerator.end_training()


def _gathered(options: TrainingOptions, signals: Signals) -> Accelerator:
    """The run's accelerator, once all processes are there; of the environment nothing acts unseen."""
    precision, minutes = options.precision.mixed_precision, options.run.ddp_timeout
    place, lines = place_of_process(os.environ)
    lines += take_environment(os.environ, precision)
    for line in lines if place is None or place.rank == 0 else ():
        logger.warning(line)
    store = None if place is None else wait_for_all(place, signals, 60 * minutes)
    with signals.ending_at_once("connecting the processes") if place is not None else nullcontext():
        accelerator = make_accelerator(precision, timedelta(minutes=minutes))
    del store  # the process group has its own connection now
    return accelerator


def _take_folder(options: TrainingOptions, stack: ExitStack) -> None:
    """Lock the output folder until the stack is closed, and clear what a killed run has left there."""
    output_dir = options.saving.output_dir
    checkpoints = [written for written in written_names(options) if written.moved_aside]
    clear_left_behind(
        output_dir, stack.enter_context(RunLock(output_dir)), lambda name: any(one.has(name) for one in checkpoints)
    )


def _train(
    options: TrainingOptions,
    parts: Parts,
    groups: Sequence[ParameterGroup],
    data: TrainingSet,
    surroundings: Surroundings,
    steps: int,
    resumed: Resumed | None,
) -> RunReport:
    """Shard, take up a state if there is one, train, save the final checkpoint."""
    accelerator, saving = surroundings.accelerator, options.saving
    make_parallel: Callable[..., Replicated] = partial(shard, _sharding(options))
    in_backward = options.memory.fused_backward_pass
    max_grad_norm = options.optimizer.max_grad_norm
    host_blocks = parts.placement.host_blocks
    if host_blocks is not None and in_backward:
        make_parallel = partial(SwappedFusedBackward, max_grad_norm=max_grad_norm, host_blocks=host_blocks)
    elif host_blocks is not None:
        make_parallel = partial(SwappedBlocks, host_blocks=host_blocks)
    elif in_backward:
        make_parallel = partial(FusedBackward, max_grad_norm=max_grad_norm)
    parallel = make_parallel(
        accelerator,
        parts.recipe.module,
        groups,
        _make_optimizer(options, surroundings.seed),
        partial(_make_schedule, options.optimizer, steps),
    )
    if options.compiling.torch_compile:
        logger.info("--torch_compile compiles in the first steps; they take as long as many others")
        parts.placement.compile(options.compiling.dynamo_backend)
    if options.ema.use_ema:
        where = torch.device("cpu") if options.ema.offload_ema else None
        parallel.keep_averages(options.ema.ema_decay, where)
    counters = Counters()
    objects: dict[str, Stateful] = {"loop": counters, **parallel.state_objects()}
    recipe: Any = parts.recipe
    if hasattr(recipe, "state_dict"):  # what a recipe keeps besides what trains; most keep nothing
        objects["recipe"] = recipe
    if resumed is not None:
        with together(accelerator):
            take_up(resumed.state, parallel, objects)
        resumed.let_go()
        if parallel.weights_are_whole:
            check_taken_up(accelerator, parallel.named)
    lineage = on_main_process(
        accelerator,
        lambda: start_branch(
            saving.output_dir,
            saving.output_name,
            (resumed.folder, resumed.state.info) if resumed else None,
            data.epochs.steps_before_epoch,
            input_paths(options),
            config_path(options).name,
        ),
    )
    on_main_process(accelerator, partial(write_config, options, surroundings.seed))
    writer = MetricsWriter(
        saving.output_dir,
        options.logs.logging_dir,
        steps,
        accelerator.is_main_process,
        steps_done=resumed.step if resumed else 0,
        board_folder=resumed.state.info.metrics.get("board_folder") if resumed else None,
        run_id=lineage.run_id,
    )
    with ExitStack() as stack:
        stack.callback(writer.close)
        states = _states(options, parts, parallel, objects, data, surroundings, lineage)
        stack.enter_context(states.writer)
        surroundings.signals.unfinished.append(states.writer)
        stack.enter_context(logging_redirect_tqdm())
        profiler = _profiler(options, surroundings, resumed.step if resumed else 0, steps)
        if profiler is not None:
            stack.callback(profiler.close)
        trainer = Trainer(
            parts.task,
            accelerator,
            parallel,
            data.epochs,
            loop_options(options, data, steps),
            writer,
            states,
            surroundings.signals,
            surroundings.progress,
            _validator(parts, data, surroundings, writer, parallel),
            counters,
            resumed.step if resumed else 0,
            profiler,
        )
        if resumed is not None:
            logger.info("resumed from %s: %d steps are done", resumed.folder, resumed.step)
        logger.info(
            "run %s, attempt %d%s",
            lineage.run_id,
            lineage.attempt,
            f", goes on from run {lineage.parent}" if lineage.parent else "",
        )
        trainer.stop_if_asked()
        surroundings.signals.at_stop = "saving after this step, then ending"
        logger.info("running training")
        stack.enter_context(worker_deaths_reported())
        report = trainer.train(iter(data.loader(parts.tokenize, steps, trainer.start_step)))
        if options.states.save_state or options.states.save_state_on_train_end:
            trainer.save_state(steps, last_name(saving.output_name))
        trainer.save(last_name(saving.output_name))
        if options.states.save_state or options.states.save_state_on_train_end:
            trainer.finish_state(steps, last_name(saving.output_name))
    logger.info("model saved.")
    return report


def _profiler(options: TrainingOptions, surroundings: Surroundings, start_step: int, steps: int) -> StepProfiler | None:
    """What records the steps that --profile names."""
    if options.logs.profile is None:
        return None
    accelerator, folder = surroundings.accelerator, options.saving.output_dir / PROFILE_FOLDER
    return StepProfiler(options.logs.profile, folder, accelerator.device, accelerator.process_index, start_step, steps)


def _validator(
    parts: Parts, data: TrainingSet, surroundings: Surroundings, writer: MetricsWriter, parallel: Replicated
) -> Validator | None:
    """What measures the loss on the images that are held out, if there are any."""
    if not isinstance(data, TrainingData):
        return None  # a stream, of which nothing is held out
    found = data.validation(parts.tokenize)
    if found is None:
        return None
    steps, epochs = data.options.validate_every_n_steps, data.options.validate_every_n_epochs
    cadence = Cadence(steps, epochs if steps or epochs else 1)
    losses, accelerator = parts.task.validation_losses, surroundings.accelerator
    return Validator(losses, accelerator, *found, cadence, writer, surroundings.signals, parallel.evaluated)


def _states(
    options: TrainingOptions,
    parts: Parts,
    parallel: Replicated,
    objects: Mapping[str, Stateful],
    data: TrainingSet,
    surroundings: Surroundings,
    lineage: Lineage,
) -> States:
    """What saves training states, as the flags have it."""
    saving, asked, accelerator = options.saving, options.states, surroundings.accelerator
    writer = StateWriter(
        saving.output_dir,
        output_name=saving.output_name,
        retention=Retention(
            asked.save_last_n_epochs_state or saving.save_last_n_epochs,
            asked.save_last_n_steps_state or saving.save_last_n_steps,
        ),
        rank=accelerator.process_index,
        ranks=accelerator.num_processes,
        device=accelerator.device,
    )
    cadence = StateCadence(asked.save_state_every_n_steps, asked.save_state_every_n_minutes, asked.save_state)
    plan, plain, software = data.fingerprint(), plain_values(options), versions()

    def info(step: int, metrics: Mapping[str, Any]) -> StateInfo:
        return StateInfo(step, surroundings.seed, plan, plain, software, metrics, lineage, parts.identity)

    return States(writer, parallel, objects, cadence, info, partial(step_name, saving.output_name), data.position)


def _sharding(options: TrainingOptions) -> str:
    return sharding_kind(options.optimizer.sharding, options.optimizer.optimizer_type)


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
                f"--max_train_epochs={options.max_train_epochs} has not one step of {data.global_batch} images; "
                "train more epochs, or with a smaller --train_batch_size"
            )
    return steps, data.epochs.epoch_of_step(steps - 1) + 1


def _try_optimizer(options: TrainingOptions, groups: Sequence[ParameterGroup], surroundings: Surroundings) -> None:
    """Raise InputError where the optimizer cannot do exactly what the flags ask of it."""
    chosen, processes = options.optimizer, surroundings.accelerator.num_processes
    check_exactness(
        _make_optimizer(options, surroundings.seed),
        partial(make_optimizer, chosen.optimizer_type, arguments=chosen.optimizer_args),
        groups,
        chosen.optimizer_type,
        in_backward=options.memory.fused_backward_pass,
        in_pieces=options.precision.full_bf16,
        sharding=_sharding(options) if processes > 1 else "none",
        averages=options.ema.use_ema,
        device=surroundings.device,
    )


def _make_optimizer(options: TrainingOptions, seed: int) -> MakeOptimizer:
    chosen, bf16 = options.optimizer, bf16_update(options.precision, seed)

    def make(groups: Sequence[ParameterGroup], **construct: Construct) -> torch.optim.Optimizer:
        return make_optimizer(chosen.optimizer_type, groups, chosen.optimizer_args, bf16=bf16, **construct)

    return make


def _make_schedule(options: OptimizerOptions, steps: int, optimizer: torch.optim.Optimizer) -> LRScheduler:
    """The learning rates' schedule over the run."""
    return make_lr_schedule(
        options.lr_scheduler,
        optimizer,
        steps,
        options.warmup_steps(steps),
        options.lr_scheduler_num_cycles,
        options.lr_scheduler_power,
    )
