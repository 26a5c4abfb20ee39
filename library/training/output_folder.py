"""The output folder of a run: looked at beforehand, so that training does not end at it, and the figures at the end."""

import logging
import os
import platform
import time
from collections.abc import Sequence
from contextlib import suppress

from accelerate import Accelerator

from library.data.training_set import TrainingSet
from library.disk_space import missing_space
from library.errors import InputError
from library.models.attention import report as attention_report
from library.options.training import TrainingOptions
from library.training.counters import RunReport
from library.training.engine.optimizers import ParameterGroup
from library.training.log.final_block import FinalFigures, write_case_log

logger = logging.getLogger(__name__)


def prepare_output(options: TrainingOptions) -> None:
    """Make the output folders now: what cannot be written to is found before the training, not after it."""
    folders = {"--output_dir": options.saving.output_dir, "--logging_dir": options.logs.logging_dir}
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


def check_room(options: TrainingOptions, checkpoint_bytes: int, groups: Sequence[ParameterGroup]) -> None:
    """Raise InputError where --output_dir has no room for a checkpoint, and a training state if any is asked for."""
    saving, average = options.saving, options.ema.use_ema
    trained = sum(parameter.numel() * parameter.element_size() for group in groups for parameter in group.parameters)
    states = options.states
    any_state = states.save_state or states.save_state_every_n_steps or states.save_state_every_n_minutes
    needed = checkpoint_bytes * (1 + average) + trained * (1 + average) * bool(any_state)
    if missing := missing_space(saving.output_dir, needed):
        raise InputError(
            f"--output_dir {saving.output_dir}: what this run saves at the least, optimizer state not counted, "
            f"{missing}; make room, or choose another"
        )


def finish(
    options: TrainingOptions,
    report: RunReport,
    network_name: str,
    lines: Sequence[str],
    data: TrainingSet,
    accelerator: Accelerator,
    started: float,
) -> None:
    """Log the task's lines and what ran on which attention backend, write {CaseName}.log, print the final block."""
    for line in (*lines, *attention_report()):
        logger.info(line)
    figures = FinalFigures(
        images_per_second=report.images_per_second,
        train_loss=report.average_loss,
        duration_seconds=time.perf_counter() - started,
        global_batch=data.global_batch,
        process_count=accelerator.num_processes,
        batch_per_device=options.data.train_batch_size,
        quarantined=report.quarantined,
        left_out=data.left_out_count,
        overflows=report.overflows,
        steps_not_updated=report.steps_not_updated,
    )
    with suppress(OSError):  # of a terminal that is gone
        print(figures.block(), flush=True)
    if options.logs.case_name:
        try:
            write_case_log(figures, options.saving.output_dir, options.logs.case_name, network_name)
        except InputError as error:  # the training itself is done, and its model saved
            logger.warning("--case_name: %s", error)
