"""Options of checkpoints: where they go, in which form, how often, how many are kept."""

import unicodedata
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.address import user_path
from library.options.flag import REQUIRED, OptionGroup, PathTo, flag

SAVE_PRECISIONS = ("float", "fp16", "bf16")
# Forms of checkpoints, and how their names end; a diffusers folder's name has no ending.
SAVE_ENDINGS = {"ckpt": ".ckpt", "safetensors": ".safetensors", "diffusers": "", "diffusers_safetensors": ""}
SAVE_FORMS = tuple(SAVE_ENDINGS)
_UNSEEN = ("Cc", "Cs", "Zl", "Zp")  # Unicode's categories: control characters, no UTF-8, breaks of lines, paragraphs


def file_stem(text: str) -> str:
    """A name for files, without folders and without what a listing of them does not show."""
    if not text or text in (".", "..") or "/" in text:
        raise ValueError("must be a file name without '/'")
    if text != text.strip() or any(unicodedata.category(letter) in _UNSEEN for letter in text):
        raise ValueError("must be a file name without line breaks, control characters and blanks around it")
    return text


@dataclass(frozen=True, kw_only=True)
class SavingOptions(OptionGroup):
    """Where checkpoints go, in which form, how often."""

    title: ClassVar[str] = "saving"
    page: ClassVar[str] = "output_files.md"

    output_dir: Path = flag(
        REQUIRED,
        "Write checkpoints, samples and metrics.jsonl to this folder",
        told_on_resume=False,
        path_to=PathTo.OUTPUT,
    )
    output_name: str | None = flag(
        None, "Begin the checkpoints' names with this (default: epoch, at and last)", read=file_stem
    )
    save_every_n_epochs: int | None = flag(None, "Save a checkpoint {name}-{epoch} each n epochs", least=1)
    save_every_n_steps: int | None = flag(None, "Save a checkpoint {name}-step{step} each n steps", least=1)
    save_last_n_epochs: int | None = flag(
        None,
        "Keep so many of the checkpoints of epochs (default: all)",
        least=1,
        needs="save_every_n_epochs",
    )
    save_last_n_steps: int | None = flag(
        None,
        "Keep the checkpoints of the last n steps, counted in steps (default: all)",
        least=1,
        needs="save_every_n_steps",
    )
    save_precision: str | None = flag(None, "Save weights in this precision (default: float)", choices=SAVE_PRECISIONS)
    save_model_as: str | None = flag(
        None, "Save checkpoints in this form (default: that of the model that was loaded)", choices=SAVE_FORMS
    )

    def form(self, model: str) -> str:
        """The form of checkpoints.

        Args:
            model: a folder, file or hub name that the run starts from.
        """
        return self.save_model_as or ("safetensors" if user_path(model).is_file() else "diffusers_safetensors")
