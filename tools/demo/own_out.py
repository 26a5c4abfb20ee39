"""The folder of --out: a tool writes into an empty one or over what it wrote there before, never over anything else."""

import argparse
import os
from collections.abc import Callable
from pathlib import Path

from library.own_folder import is_own, write_list


def write_out(parser: argparse.ArgumentParser, out: Path, write: Callable[[], None]) -> None:
    """Write into the folder, and list in it what was written; ends as argparse does where something else lies there."""
    if out.exists() and not is_own(out) and not (out.is_dir() and not any(out.iterdir())):
        parser.error(f"--out {out}: holds what this tool has not written; choose a new folder, or an empty one")
    write()
    write_list(out)
    umask = os.umask(0)
    os.umask(umask)
    for path in out.rglob("*"):  # safetensors writes files that no other user can read
        if path.is_file():
            path.chmod(0o666 & ~umask)
