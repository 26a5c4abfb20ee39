"""A stand-in for the trainer: all-reduces until one rank comes to the end that its arguments ask for.

worker.py STEPS [RANK END]      END: killed, input_error, deaf (to SIGTERM, and stuck)
"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.errors import InputError
from library.exit_status import run_main, run_script


def work() -> None:
    import torch
    import torch.distributed as dist

    steps, end_of = int(sys.argv[1]), dict(zip(map(int, sys.argv[2::2]), sys.argv[3::2], strict=True))
    dist.init_process_group("gloo")
    end = end_of.get(dist.get_rank())
    if end == "deaf":
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    for step in range(steps):
        dist.all_reduce(torch.ones(1))
        print(f"rank {dist.get_rank()} of {dist.get_world_size()} did step {step}", flush=True)
        if step == 2:
            come_to(end)
        time.sleep(0.1)


def come_to(end: str | None) -> None:
    if end == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if end == "input_error":
        raise InputError("--x is wrong")
    if end == "deaf":
        time.sleep(3600)


if __name__ == "__main__":
    run_script(lambda: run_main(work))
