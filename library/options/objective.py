"""Options of the objective: what the U-Net learns to predict, on which noise schedule."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, flag


@dataclass(frozen=True, kw_only=True)
class ObjectiveOptions(OptionGroup):
    """What the U-Net learns to predict."""

    title: ClassVar[str] = "objective"
    page: ClassVar[str] = "training.md"

    v_parameterization: bool = flag(
        False,
        "Train v-prediction; without this flag what the model's files say decides, and epsilon where they say nothing",
    )
    zero_terminal_snr: bool = flag(
        False, "Rescale the betas so that the last timestep is pure noise (needs v-prediction)"
    )
