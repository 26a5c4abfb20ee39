"""Options of training states: when they are saved, how many are kept, and which one a run goes on from."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, PathTo, flag


@dataclass(frozen=True, kw_only=True)
class StateOptions(OptionGroup):
    """When training states are saved, and which one a run goes on from."""

    title: ClassVar[str] = "training states and resuming"
    page: ClassVar[str] = "resuming.md"

    save_state: bool = flag(
        False,
        "Save with every checkpoint a training state {name}-state, too, from which a run goes on exactly (--resume)",
    )
    save_state_every_n_steps: int | None = flag(
        None, "Save a training state each n steps, without a checkpoint", least=1
    )
    save_state_every_n_minutes: float | None = flag(
        None, "Save a training state each n minutes, without a checkpoint", above=0
    )
    save_state_on_train_end: bool = flag(False, "Save a training state at the end, too")
    save_last_n_epochs_state: int | None = flag(
        None,
        "Keep so many of the training states of epochs (default: as --save_last_n_epochs)",
        least=1,
        needs="save_every_n_epochs & save_state",
    )
    save_last_n_steps_state: int | None = flag(
        None,
        "Keep the training states of the last n steps, counted in steps (default: as --save_last_n_steps)",
        least=1,
        needs=("save_state_every_n_steps", "save_state_every_n_minutes", "save_every_n_steps & save_state"),
    )
    resume: str | None = flag(
        None,
        "Go on from this training state; auto: from the newest whole one in --output_dir, else from the beginning",
        metavar="DIR|auto",
        told_on_resume=False,
        path_to=PathTo.STATE,
    )
    resume_anyway: bool = flag(
        False,
        "Resume although data, seed or global batch are other ones than the state's",
        needs="resume",
        told_on_resume=False,
    )
