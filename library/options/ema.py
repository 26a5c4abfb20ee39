"""Options of the moving average of the weights."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import OptionGroup, flag


@dataclass(frozen=True, kw_only=True)
class EMAOptions(OptionGroup):
    """Whether a moving average of what trains is kept, and how."""

    title: ClassVar[str] = "moving average"
    page: ClassVar[str] = "training.md"

    use_ema: bool = flag(
        False,
        "Keep a moving average of what trains: sample from it, and save it as {name}-ema beside each checkpoint",
    )
    ema_decay: float = flag(
        0.9999,
        "Leave this share of the moving average at a step; less at first, (1 + n) / (10 + n) after n steps,"
        " none at the first",
        least=0,
        most=1,
        needs="use_ema",
    )
    offload_ema: bool = flag(False, "Keep the moving average in the CPU's memory", needs="use_ema")
