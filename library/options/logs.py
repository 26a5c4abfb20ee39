"""Options of logs beside metrics.jsonl."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import OptionGroup, PathTo, flag
from library.options.saving import file_stem


@dataclass(frozen=True, kw_only=True)
class LogOptions(OptionGroup):
    """Where TensorBoard events and the run's figures go."""

    title: ClassVar[str] = "logging"
    page: ClassVar[str] = "output_files.md"

    logging_dir: Path | None = flag(
        None, "Write TensorBoard events to a new folder in this one", told_on_resume=False, path_to=PathTo.OUTPUT
    )
    case_name: str | None = flag(
        None,
        "Write the run's figures at the end also as OUTPUT_DIR/CASE_NAME.log (the launchers set it)",
        read=file_stem,
    )
