"""When a run saves, samples and forgets, from its options: what the loop asks after every step."""

import logging
import sys
from collections.abc import Collection
from pathlib import Path

from library.atomic_write import remove_folder
from library.data.training_set import TrainingSet
from library.models.files.own_checkpoint import is_own_checkpoint
from library.options.training import TrainingOptions
from library.training.cadence import Cadence
from library.training.inputs import input_paths
from library.training.loop import LoopOptions
from library.training.state.choice import obsolete
from library.training.state.names import epoch_name, step_name
from library.training.state.retention import Retention

logger = logging.getLogger(__name__)


def _forget(checkpoint: Path, in_use: Collection[Path]) -> None:
    """Delete a checkpoint, unless the run reads it, or not all of it was written by a run."""
    whole = checkpoint.resolve()
    if any(used == whole or used.is_relative_to(whole) for used in in_use):
        return
    if not is_own_checkpoint(checkpoint):
        logger.warning("%s: not removed: it holds what no run has written", checkpoint)
        return
    logger.info("removing old checkpoint: %s", checkpoint)
    if checkpoint.is_dir():
        remove_folder(checkpoint)
    else:
        checkpoint.unlink(missing_ok=True)


def loop_options(options: TrainingOptions, data: TrainingSet, steps: int) -> LoopOptions:
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

    in_use = {path.resolve() for path in input_paths(options)}

    def forget_checkpoints(saved: Path, stem: str) -> None:
        retention = Retention(options.saving.save_last_n_epochs, options.saving.save_last_n_steps)
        try:
            names = [entry.name for entry in saved.parent.iterdir()]
            for old in obsolete(names, saved.name, retention, name, suffix=saved.name.removeprefix(stem)):
                _forget(saved.parent / old, in_use)
        except OSError as error:  # a disk that refuses is no reason to end a run
            logger.warning("old checkpoints in %s cannot be removed (%s)", saved.parent, error.strerror)

    return LoopOptions(
        max_train_steps=steps,
        accumulation=options.run.gradient_accumulation_steps,
        global_batch=data.global_batch,
        max_grad_norm=options.optimizer.max_grad_norm,
        output_dir=options.saving.output_dir,
        epoch_samples=sys.maxsize if data.samples is None else data.samples,
        max_bad_samples=options.data.max_bad_samples,
        left_out=data.left_out,
        preview_at_first=options.preview.sample_at_first,
        checkpoints_due=checkpoints_due,
        previews_due=previews_due,
        forget_checkpoints=forget_checkpoints,
    )
