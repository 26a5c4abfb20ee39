"""When a run saves, samples and forgets, from its options: what the loop asks after every step."""

import logging
import sys
from pathlib import Path

from library.atomic_write import remove
from library.data.training_set import TrainingSet
from library.options.training import TrainingOptions
from library.training.cadence import Cadence
from library.training.loop import LoopOptions
from library.training.state.choice import obsolete
from library.training.state.names import epoch_name, step_name
from library.training.state.retention import Retention

logger = logging.getLogger(__name__)


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

    def forget_checkpoints(saved: Path, stem: str) -> None:
        retention = Retention(options.saving.save_last_n_epochs, options.saving.save_last_n_steps)
        try:
            names = [entry.name for entry in saved.parent.iterdir()]
            for old in obsolete(names, saved.name, retention, name, suffix=saved.name.removeprefix(stem)):
                logger.info("removing old checkpoint: %s", saved.parent / old)
                remove(saved.parent / old)
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
