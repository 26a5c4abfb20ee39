"""Options of validation: which images are held out, and when the loss on them is measured."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import SUBSET, OptionGroup, flag

SEEDS = 2**64  # there are so many


@dataclass(frozen=True, kw_only=True)
class HeldOutOptions(OptionGroup):
    """Which of some samples are held out from training."""

    title: ClassVar[str] = "validation"
    page: ClassVar[str] = "training.md"

    validation_split: float = flag(
        0.0,
        "Hold this share of the images out from training, to measure the loss on it",
        least=0,
        most=1,
        at=SUBSET,
    )
    validation_seed: int | None = flag(
        None,
        "Choose the images that are held out, and their noise, by this seed (default: --seed)",
        least=0,
        below=SEEDS,
        at=SUBSET,
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """When the loss on the images held out is measured."""

    title: ClassVar[str] = "validation"
    page: ClassVar[str] = "training.md"

    validate_every_n_steps: int | None = flag(
        None, "Measure the loss on the images that are held out each n steps", least=1, needs="validation_split"
    )
    validate_every_n_epochs: int | None = flag(
        None,
        "Measure the loss on the images that are held out each n epochs (default: each epoch, unless steps are given)",
        least=1,
        needs="validation_split",
    )
    max_validation_steps: int | None = flag(
        None,
        "Measure the loss on so many batches of --train_batch_size at most (default: on all images that are held out)",
        least=1,
        needs="validation_split",
    )
