"""docs/measurements/faults.md: a section for each long test, written anew by the test that measures it."""

import os
import platform
import textwrap
import time
from importlib.metadata import version
from pathlib import Path

REPORT = Path(__file__).resolve().parents[2] / "docs/measurements/faults.md"
_INTRODUCTION = """# Faults, measured

What the long tests of `test/faults/` did to runs of `sdxl_pretrain.py`, and what became of them. Each section is
written by its test; this repeats all of them:

    bash test/run_tests.sh --all test/faults

The model is an SDXL of 1.4 million parameters on the CPU in fp32, its training state 16 MB. Equal to the undisturbed
run means: the final weights and every step's loss and gradient norm are bit for bit the same, and `metrics.jsonl` has
every step once.
"""


def write_section(title: str, lines: list[str]) -> None:
    """Put a section into the report, in the place of an earlier one of that title."""
    text = REPORT.read_text(encoding="utf-8") if REPORT.exists() else ""
    sections = dict(part.split("\n", 1) for part in text.split("\n## ")[1:])
    where = (
        f"{time.strftime('%Y-%m-%d')}, Python {platform.python_version()}, torch {version('torch')}, "
        f"{os.cpu_count()} cores that other work shares."
    )
    sections[title] = "\n".join(["", *(part for line in lines for part in _wrapped(line)), "", where, ""])
    parts = [_INTRODUCTION, *(f"## {name}\n{body.rstrip()}\n" for name, body in sorted(sections.items()))]
    REPORT.write_text("\n".join(parts), encoding="utf-8")


def _wrapped(line: str) -> list[str]:
    """Lines of at most 120 characters; rows of tables stay whole."""
    return [line] if line.startswith("|") or not line else textwrap.wrap(line, 120, break_on_hyphens=False)
