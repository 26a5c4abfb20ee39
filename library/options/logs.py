"""Options of logs beside metrics.jsonl."""

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from library.options.flag import OptionGroup, PathTo, flag
from library.options.saving import file_stem


def steps_to_profile(text: str) -> str:
    """`a..b` or one step, as it is."""
    profiled_steps(text)
    return text


def profiled_steps(text: str) -> tuple[int, int]:
    """The first and the last of the steps `a..b`, counted from 1; `a` alone is that step.

    Raises:
        ValueError: they are no such steps.
    """
    first, dots, last = text.partition("..")
    if not (first.isdecimal() and (last if dots else "1").isdecimal()):
        raise ValueError("must be a step, 10, or the first and last of some, 10..12")
    steps = int(first), int(last if dots else first)
    if not 1 <= steps[0] <= steps[1]:
        raise ValueError("steps are counted from 1, and the first comes before the last: 10..12")
    return steps


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
    profile: str | None = flag(
        None,
        "Record these steps, 10..12 for instance, with the device's profiler: a trace of each process for TensorBoard "
        "or Chrome in OUTPUT_DIR/profile",
        read=steps_to_profile,
        metavar="FIRST..LAST",
        told_on_resume=False,
    )
