"""Options of the pictures that are sampled while training."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from library.diffusion.samplers import NAMES
from library.errors import Problems
from library.options.flag import OptionGroup, flag, flag_names
from library.options.prompts import PromptFile, read_prompts

if TYPE_CHECKING:
    from library.options.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class PreviewOptions(OptionGroup):
    """Which pictures are sampled while training, and when."""

    title: ClassVar[str] = "sample pictures while training"
    page: ClassVar[str] = "training.md"

    prompts: PromptFile | None = None  # what the file of --sample_prompts says
    sample_prompts: Path | None = flag(
        None,
        "Sample the prompts of this file, one a line (--w --h --d --s --l --n --ss), or .toml, .json",
        idle_without=("sample_every_n_steps", "sample_every_n_epochs", "sample_at_first"),
    )
    sample_every_n_steps: int | None = flag(None, "Sample pictures each n steps", least=1)
    sample_every_n_epochs: int | None = flag(None, "Sample pictures each n epochs", least=1)
    sample_at_first: bool = flag(False, "Sample pictures before the first step, too")
    sample_sampler: str = flag(
        "ddim", "Sample with this sampler where a prompt names none", choices=NAMES, idle_without="sample_prompts"
    )

    @classmethod
    def from_values(cls, values: Mapping[str, Any], problems: Problems) -> "PreviewOptions":
        """The options, and the prompts, read once: the run draws what stands in the file now."""
        prompts, path = None, values["sample_prompts"]
        with problems.noted():
            prompts = None if path is None else read_prompts(path)
        return cls(prompts=prompts, **{name: values[name] for name in flag_names(cls)})

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where pictures are asked for without prompts."""
        asked = self.sample_at_first or self.sample_every_n_steps or self.sample_every_n_epochs
        if asked and self.sample_prompts is None:
            yield "--sample_at_first and --sample_every_n_... sample nothing without --sample_prompts; add that"
