"""Time of the demo VAE's encoding with pixels channels last, as the loader's pictures lie, against contiguous ones.

    OMP_NUM_THREADS=1 python bench/vae_encode.py

Both take turns in one process on the same 16 pictures of 64×64 px. Seconds are the process's own (all threads), so that
other work on the machine counts little. The last line printed is one JSON object.
"""

import json
import statistics
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tools.demo.fit_vae import load_vae

ROUNDS = 15


@torch.no_grad()
def main() -> int:
    """Measure and print."""
    vae = load_vae()
    rows_together_BCHW = torch.rand(16, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    layouts = {
        "contiguous": rows_together_BCHW,
        "channels_last": rows_together_BCHW.contiguous(memory_format=torch.channels_last),
    }
    seconds: dict[str, list[float]] = {name: [] for name in layouts}
    for _ in range(ROUNDS + 1):
        for name, pixels_BCHW in layouts.items():
            began = time.process_time()
            vae.encode(pixels_BCHW)
            seconds[name].append(time.process_time() - began)
    medians = {name: statistics.median(values[1:]) for name, values in seconds.items()}  # the first warms up
    ratio = statistics.median(
        b / a for a, b in zip(seconds["contiguous"][1:], seconds["channels_last"][1:], strict=True)
    )
    for name, value in medians.items():
        print(f"{name:14} {1000 * value:8.1f} ms")
    print(f"channels last / contiguous {ratio:.2f}")
    versions = {"torch": torch.__version__, "threads": torch.get_num_threads()}
    print(json.dumps({"bench": "vae_encode", "seconds": medians, "time_ratio": ratio, "rounds": ROUNDS, **versions}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
