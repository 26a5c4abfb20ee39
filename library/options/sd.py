"""Options of the scripts for SD 1.x and SD 2.x that SDXL's have not."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, flag


@dataclass(frozen=True, kw_only=True)
class SDOptions(OptionGroup):
    """Which of both families the model is of, and which layer of its text encoder conditions the U-Net."""

    title: ClassVar[str] = "SD 1.x and 2.x"

    v2: bool = flag(
        False,
        "Take the model as one of SD 2.x; its content tells so without the flag, and an SD 1.x model with "
        "it is refused",
    )
    clip_skip: int | None = flag(
        None,
        "Use the text encoder's states of the n-th layer from the end, through its final norm (default: 1, "
        "the last; SD 2.x is published without its text encoder's last layer: its 1 is the penultimate "
        "layer of OpenCLIP-H)",
        least=1,
    )
