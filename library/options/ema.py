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
        "keep a moving average of what trains: sample from it, save it as {name}-ema beside each checkpoint",
    )
    ema_decay: float = flag(
        0.9999,
        "share of the average that a step leaves; less at first, (1 + n) / (10 + n) after n steps, none at the first",
        least=0,
        most=1,
        needs="use_ema",
    )
    offload_ema: bool = flag(False, "keep the average in the CPU's memory", needs="use_ema")
