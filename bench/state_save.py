"""How long saving a training state stops the training: the copy in memory, against the time that its writing takes.

    OMP_NUM_THREADS=1 python bench/state_save.py --out /some/disk

A state of `--gigabytes` (weights and two moments of AdamW, fp32) is saved a few times. The buffers are made beforehand,
beside training, as the trainer does after its first step; `stall_unreserved_s` is a first save that has to make them.
`working` is the speed of a loop of matrix products while a state is written, against the same loop alone: what the
thread that writes takes from the one that trains. Reading back is timed, too, and the strong hashes of hashlib. The
last line printed is one JSON object.
"""

import argparse
import hashlib
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.training.state.files import StateInfo, verify
from library.training.state.lineage import new_lineage
from library.training.state.names import step_name
from library.training.state.retention import Retention
from library.training.state.writer import StateWriter

TENSORS = 64  # of a third of the state each: weights, first and second moment


def hash_speeds(size_bytes: int = 256 << 20) -> dict[str, float]:
    """GB/s of hashlib's strong hashes on this processor."""
    data = bytearray(size_bytes)
    speeds = {}
    for name in ("sha256", "blake2b", "sha512", "sha3_256"):
        began = time.perf_counter()
        hashlib.new(name, data).digest()
        speeds[name] = size_bytes / 1e9 / (time.perf_counter() - began)
    return speeds


def products_per_second(go_on, matrix: torch.Tensor) -> float:
    """Speed of a loop that keeps one core busy as long as `go_on()` says."""
    count, began = 0, time.perf_counter()
    while count == 0 or go_on():
        torch.mm(matrix, matrix)
        count += 1
    return count / (time.perf_counter() - began)


def measure(folder: Path, gigabytes: float, saves: int) -> dict:
    """Save, and time what the training waits for and what it does not."""
    numbers = int(gigabytes * 1e9 / 4 / 3 / TENSORS)
    objects = {
        name: {str(index): torch.randn(numbers) for index in range(TENSORS)}
        for name in ("unet", "exp_avg", "exp_avg_sq")
    }
    info = StateInfo(0, 0, "", {}, {}, {}, new_lineage(None, 0, []))
    matrix = torch.randn(512, 512)
    stalls, writes, working = [], [], []
    with StateWriter(folder / "unreserved") as writer:
        (folder / "unreserved").mkdir()
        began = time.perf_counter()
        writer.snapshot(step_name(None, 0), info, {}, objects)
        unreserved = time.perf_counter() - began
    with StateWriter(folder, retention=Retention(last_n_steps=0)) as writer:
        writer.reserve(objects)
        for save in range(saves + 1):
            until = time.perf_counter() + 1
            alone = products_per_second(lambda until=until: time.perf_counter() < until, matrix)
            began = time.perf_counter()
            writer.snapshot(step_name(None, save), info, objects)
            copied = time.perf_counter()
            beside = products_per_second(writer.is_writing, matrix)
            writer.wait()
            stalls.append(copied - began)
            writes.append(time.perf_counter() - copied)
            working.append(beside / alone)
        began = time.perf_counter()
        verify(folder / f"{step_name(None, saves)}-state")
        read = time.perf_counter() - began
    return {
        "stall_unreserved_s": unreserved,
        "stall_first_s": stalls[0],
        "stall_first_of_write": stalls[0] / writes[0],
        "stall_s": statistics.median(stalls[1:]),
        "write_s": statistics.median(writes[1:]),
        "stall_of_write": statistics.median(s / w for s, w in zip(stalls[1:], writes[1:], strict=True)),
        "working": statistics.median(working[1:]),
        "verify_s": read,
    }


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=Path, help="folder on the disk to try (default: the temporary one)")
    parser.add_argument("--gigabytes", type=float, default=1.0)
    parser.add_argument("--saves", type=int, default=5)
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(dir=args.out) as folder:
        figures = measure(Path(folder), args.gigabytes, args.saves)
    speeds = hash_speeds()
    print("| | |\n|---|---|")
    for name, value in figures.items():
        print(f"| {name} | {value:.3f} |")
    for name, speed in speeds.items():
        print(f"| {name}, GB/s | {speed:.2f} |")
    head = {"bench": "state_save", "gigabytes": args.gigabytes, "saves": args.saves, "torch": torch.__version__}
    print(json.dumps({**head, **figures, "hash_gb_per_s": speeds, "threads": torch.get_num_threads()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
