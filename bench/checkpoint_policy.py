"""How long `--checkpoint_policy=auto` looks for the blocks to recompute, at SDXL's full size, and what it chooses.

    python bench/checkpoint_policy.py

The U-Net trains at 1024 px, batch 1, bf16; the limits divide what lies between all blocks recomputed and none. Prints a
line a limit and one JSON object.
"""

import json
import sys
import time
from functools import partial
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from memory import Configuration, parts_of
from scaling import sdxl

from library.training.memory.checkpoint_policy import choose_checkpoints
from library.training.memory.estimate import GIB, estimator

SHARES = (0.1, 0.5, 0.9)  # of what lies between all blocks recomputed and none


def main() -> None:
    module, *rest = parts_of(sdxl(), Configuration(1024, "bf16", fused=True))
    predict = estimator(module, *rest)
    _, compute_dtype, step, *_ = rest
    ends = []
    for enabled in (True, False):
        module.unet.enable_gradient_checkpointing(enabled)
        ends.append(predict().total)
    rows = []
    for share in SHARES:
        calls = []
        limit = ends[0] + share * (ends[1] - ends[0])
        began = time.process_time()
        (line,) = choose_checkpoints(module, compute_dtype, step, partial(_counted, predict, calls), limit)
        seconds = time.process_time() - began
        chosen = [number for number, block in enumerate(module.unet.blocks()) if block.checkpointing]
        rows.append({"limit_gib": limit / GIB, "cpu_seconds": seconds, "predictions": len(calls), "chosen": chosen})
        print(f"{seconds:.1f} s of CPU, {len(calls)} predictions; {line}", flush=True)
    print(json.dumps({"bench": "checkpoint_policy", "torch": torch.__version__, "rows": rows}))


def _counted(predict, calls):
    calls.append(None)
    return predict()


if __name__ == "__main__":
    main()
