"""Options of the run: how long it is, how many passes a step has, its seed."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, flag
from library.options.validation import SEEDS


@dataclass(frozen=True, kw_only=True)
class RunOptions(OptionGroup):
    """Length and seed of the run, and how its processes wait for each other."""

    title: ClassVar[str] = "run"
    page: ClassVar[str] = "running.md"

    max_train_steps: int = flag(1600, "Train for so many optimizer steps", least=1, replaces=("max_train_epochs",))
    max_train_epochs: int | None = flag(
        None,
        "Train for so many epochs; this takes precedence over the steps",
        least=1,
        aliases=("max_train_epoch",),
        replaces=("max_train_steps",),
    )
    gradient_accumulation_steps: int = flag(1, "Add up the gradients of so many passes for an optimizer step", least=1)
    seed: int | None = flag(
        None,
        "Draw everything random from this seed; the same seed and data give the same run (default: drawn, logged)",
        least=0,
        below=SEEDS,
    )
    ddp_timeout: int = flag(30, "Let processes wait so many minutes for each other before they give up", least=1)
    dry_run: bool = flag(False, "Print the resolved plan and an estimate of memory, then stop", told_on_resume=False)
