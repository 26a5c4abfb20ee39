"""What tests ask about the output folder of a run: its states, its metrics, its weights."""

import hashlib
import json
from pathlib import Path

import torch
from safetensors.torch import load_file

# What the clock, the machine and the number of starts say, and not the training.
LOOSE = {"images_per_second", "images_per_second_without_wait", "data_wait_seconds", "memory_bytes", "run"}


def state_of(step: int) -> str:
    """The folder's name of a step's training state."""
    return f"at-step{step:08d}-state"


def aside(out: Path, attempt: int) -> Path:
    """Where an attempt has put what it does not go on from."""
    return out / "abandoned" / f"before-attempt-{attempt}"


def lines(out: Path) -> list[dict]:
    """The lines of metrics.jsonl, as far as training decides on them."""
    found = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if name not in LOOSE} for line in found]


def assert_same_weights(out: Path, other: Path, name: str = "last.safetensors") -> None:
    """Two checkpoints hold the same tensors bit for bit."""
    mine, theirs = load_file(out / name), load_file(other / name)
    assert mine.keys() == theirs.keys()
    assert [key for key in mine if not torch.equal(mine[key], theirs[key])] == []


def digests(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, but for the lock, which names its last holder."""
    files = (path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != ".lock")
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}
