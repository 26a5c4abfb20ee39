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
        "share of the images that is held out from training, to measure the loss on",
        least=0,
        most=1,
        at=SUBSET,
    )
    validation_seed: int | None = flag(
        None, "chooses those images and their noise (default: --seed)", least=0, below=SEEDS, at=SUBSET
    )


@dataclass(frozen=True, kw_only=True)
class ValidationOptions(OptionGroup):
    """When the loss on the images held out is measured."""

    title: ClassVar[str] = "validation"
    page: ClassVar[str] = "training.md"

    validate_every_n_steps: int | None = flag(None, "validate each n steps", least=1, needs="validation_split")
    validate_every_n_epochs: int | None = flag(
        None,
        "validate each n epochs (default: each epoch, unless steps are given)",
        least=1,
        needs="validation_split",
    )
    max_validation_steps: int | None = flag(
        None,
        "validate on that many batches of --train_batch_size at most (default: on all images held out)",
        least=1,
        needs="validation_split",
    )
