"""What a rank pays for reading a training state that many ranks wrote, against parsing what every rank wrote.

    OMP_NUM_THREADS=1 python bench/state_read.py --ranks 32

A state of SDXL's 1,680 U-Net parameters, cut down to one number a row, is written as `--ranks` processes write it with
--shard=fsdp: a part of every parameter each. Then new processes read it as one rank of as many, of half as many, and as
a reader that opens every file. Figures are of the reading alone: CPU seconds and growth of the resident memory. The
hashes, which one rank checks for all, are not part of it. The last line printed is one JSON object.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.training.state.files import StateInfo, read_state
from library.training.state.lineage import new_lineage
from library.training.state.states import TRAINING, parts_in
from library.training.state.tensor_rows import rows_of
from library.training.state.writer import StateWriter

PARAMETERS, ROWS = 1680, 320


def write(folder: Path, ranks: int) -> None:
    """A state of AdamW with sharded rows."""
    size = -(-ROWS // ranks)
    writers = [StateWriter(folder, rank=rank, ranks=ranks) for rank in range(ranks)]
    for rank, writer in enumerate(writers):
        start = min(rank * size, ROWS)
        rows = torch.zeros(max(min(size, ROWS - start), 0))
        parts = {
            f"unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.parameter_{number}": {
                "start": start,
                "weight": rows.clone(),
                "state": {"step": torch.tensor(1.0), "exp_avg": rows.clone(), "exp_avg_sq": rows.clone()},
            }
            for number in range(PARAMETERS)
        }
        info = StateInfo(1, 0, "", {}, {}, {}, new_lineage(None, 0, []))
        writer.snapshot("last", info, {TRAINING: parts}, rows=rows_of(parts))
    for writer in writers:
        writer.finish()


def read(folder: Path, ranks: int, every_file: bool) -> dict[str, float]:
    """Read the rows of rank 1 of `ranks`; CPU seconds and MB."""
    before, began = resident_mb(), time.process_time()
    state = read_state(folder, verified=True)
    if every_file:
        for own in state.own:
            own[TRAINING]
    size = -(-ROWS // ranks)
    parts = parts_in(state)
    numbers = sum(len(part["weight"]) for name in parts.names for part in parts.covering(name, size, size))
    assert numbers >= PARAMETERS * min(size, ROWS - size)
    return {"cpu_s": time.process_time() - began, "mb": resident_mb() - before}


def resident_mb() -> float:
    """This process's memory that is resident, in MB (proc(5), statm)."""
    return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize() / 1e6


def main(argv: list[str] | None = None) -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--ranks", type=int, default=32)
    parser.add_argument("--read", nargs=3, metavar=("FOLDER", "RANKS", "EVERY_FILE"), help="used by this script itself")
    args = parser.parse_args(argv)
    if args.read:
        folder, ranks, every_file = args.read
        print(json.dumps(read(Path(folder), int(ranks), every_file == "True")))
        return 0
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder), args.ranks)
        for name, ranks, every_file in (
            ("every file", args.ranks, True),
            ("as many ranks as wrote", args.ranks, False),
            ("half as many ranks", args.ranks // 2, False),
        ):
            command = [sys.executable, __file__, "--read", f"{folder}/last-state", str(ranks), str(every_file)]
            printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            figures[name] = json.loads(printed.splitlines()[-1])
    print("| reader | CPU s | of every file | MB |\n|---|---|---|---|")
    for name, found in figures.items():
        ratio = found["cpu_s"] / figures["every file"]["cpu_s"]
        print(f"| {name} | {found['cpu_s']:.2f} | {ratio:.2f} | {found['mb']:.0f} |")
    print(json.dumps({"bench": "state_read", "ranks": args.ranks, "torch": torch.__version__, **figures}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
