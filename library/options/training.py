"""The option groups that every training script has, together; a script adds its own by inheriting."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from library.options.caches import CacheOptions
from library.options.compiling import CompilingOptions
from library.options.config_file import ConfigFileOptions
from library.options.data import DataOptions
from library.options.ema import EMAOptions
from library.options.logs import LogOptions
from library.options.memory import MemoryOptions
from library.options.model import ModelOptions
from library.options.objective import ObjectiveOptions
from library.options.optimizer import OptimizerOptions
from library.options.precision import PrecisionOptions
from library.options.preview import PreviewOptions
from library.options.run import RunOptions
from library.options.saving import SavingOptions
from library.options.sd import SDOptions
from library.options.states import StateOptions
from library.options.text_encoders import SDTextEncoderOptions, SDXLTextEncoderOptions, TextEncoderOptions


@dataclass(frozen=True)
class TrainingOptions:
    """One dataclass a group, in the order of --help.

    Attributes:
        defaults: of flags for which a script has another one than their group.
    """

    defaults: ClassVar[Mapping[str, Any]] = {}

    model: ModelOptions
    text_encoders: TextEncoderOptions  # a family's scripts have that family's
    data: DataOptions
    caches: CacheOptions
    objective: ObjectiveOptions
    optimizer: OptimizerOptions
    ema: EMAOptions
    precision: PrecisionOptions
    memory: MemoryOptions
    compiling: CompilingOptions
    run: RunOptions
    saving: SavingOptions
    states: StateOptions
    logs: LogOptions
    preview: PreviewOptions
    config: ConfigFileOptions

    @property
    def clip_skip(self) -> int | None:
        """The layer whose states condition the U-Net, counted from the last, 1; None for the family's usual one."""
        return None

    @property
    def v2(self) -> bool:
        """Whether the user says that the model is an SD 2.x one."""
        return False


@dataclass(frozen=True)
class SDXLTrainingOptions(TrainingOptions):
    """The groups of every script that trains SDXL."""

    text_encoders: SDXLTextEncoderOptions


@dataclass(frozen=True)
class SDTrainingOptions(TrainingOptions):
    """The groups of every script that trains SD 1.x and 2.x."""

    text_encoders: SDTextEncoderOptions
    sd: SDOptions

    @property
    def clip_skip(self) -> int | None:
        """As --clip_skip says."""
        return self.sd.clip_skip

    @property
    def v2(self) -> bool:
        """As --v2 says."""
        return self.sd.v2
