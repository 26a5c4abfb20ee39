"""How a step's time grows with batch, resolution, accumulation and processes, and a start's with the data's size.

    OMP_NUM_THREADS=1 python bench/growth.py    # under 3 minutes; prints the table and one JSON line
    OMP_NUM_THREADS=1 python bench/growth.py --write docs/measurements    # growth.md's table and growth_*.svg

A step is forward, backward, clipping and AdamW of bench/train_step.py's small U-Net in fp32 on the CPU. The points of
batch, resolution and accumulation share one network and take turns, so that whatever else the machine does falls on
all of them. Processes are joined by DistributedDataParallel over gloo, one thread each, each with a batch of its own.
Starts are those of bench/index.py: fresh processes that find synthetic tables of many shards. Each point is a median;
a power law is fitted to each line.
"""

import argparse
import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import index
import scaling
import timing
import unet_steps
from log_plot import Series, fit, log_plot

from library import device as devices
from library.models.unet import UNet, size_embedding
from library.training.engine.optimizers import ParameterGroup, make_optimizer

CPU = torch.device("cpu")
LATENT_PX = 8  # of the image, for each of the latents
CASE = unet_steps.Case(unet_steps.SMALL, (16, 16), 1, torch.float32, CPU, gradient_checkpointing=False)
START_ROWS = 1000  # of each shard


@dataclass(frozen=True)
class Growth:
    """A plot: the quantity that grows, and its values."""

    name: str
    title: str
    x_label: str
    y_label: str


GROWTHS = (
    Growth("batch", "Step time against batch, 128 px", "images in a batch", "ms a step"),
    Growth("resolution", "Step time against resolution, batch 1", "pixels of an image", "ms a step"),
    Growth("accumulation", "Step time against accumulation, 128 px", "micro-batches of 1 image", "ms a step"),
    Growth("processes", "Step time against processes, 1 image each", "processes", "ms a step"),
    Growth("start", "A later start against the data's size", "images", "ms until the data is ready"),
)


@dataclass(frozen=True)
class Load:
    """The work of a step: latent rows and columns, images in a micro-batch, number of micro-batches."""

    latent: int
    batch: int
    accumulation: int


def step_loads(quick: bool) -> dict[str, dict[int, Load]]:
    """The loads of a line by what its x axis counts."""
    few = (1, 2) if quick else (1, 2, 4, 8)
    sides = (8, 16) if quick else (8, 16, 32, 64)
    return {
        "batch": {batch: Load(16, batch, 1) for batch in few},
        "resolution": {(LATENT_PX * side) ** 2: Load(side, 1, 1) for side in sides},
        "accumulation": {count: Load(16, 1, count) for count in few},
    }


class Steps:
    """A network with its optimizer, which takes steps of any load."""

    def __init__(self, case: unet_steps.Case, wrap: Callable[[nn.Module], nn.Module] = lambda network: network) -> None:
        with torch.device("meta"):
            network = UNet(case.config)
        network.load_state_dict(unet_steps.weights(case), assign=True)
        self.case, self.parameters = case, list(network.requires_grad_(True).parameters())
        self.network = wrap(network)
        groups = [ParameterGroup("unet", self.parameters, unet_steps.LEARNING_RATE)]
        self.optimizer = make_optimizer("AdamW", groups, [])
        self._inputs: dict[tuple[int, int], unet_steps.Inputs] = {}

    def take(self, load: Load) -> Tensor:
        """Take a step; returns the last micro-batch's loss."""
        batch = self._batch(load)
        for _ in range(load.accumulation):
            vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
            prediction = self.network(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)
            loss = F.mse_loss(prediction, batch.target_BCHW) / load.accumulation
            loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return loss.detach()

    def _batch(self, load: Load) -> unet_steps.Inputs:
        key = load.latent, load.batch
        if key not in self._inputs:
            self._inputs[key] = unet_steps.make_inputs(
                replace(self.case, latent_hw=(load.latent, load.latent), batch=load.batch)
            )
        return self._inputs[key]


def median_ms(steps: Steps, loads: Iterable[Load], rounds: int) -> dict[Load, float]:
    """Median time of a step of each load; the loads take turns, and a first round does not count."""
    times: dict[Load, list[float]] = {load: [] for load in loads}
    for number in range(rounds + 1):
        for load, found in times.items():
            ms, _ = timing.timed_ms(lambda load=load: steps.take(load), CPU)
            if number:
                found.append(ms)
    return {load: statistics.median(found) for load, found in times.items()}


def _process(rank: int, processes: int, rounds: int, folder: str) -> None:
    """Train in one of several processes; the first process writes the median."""
    torch.set_num_threads(1)
    devices.keep_freed_memory(CPU)
    store = dist.FileStore(f"{folder}/store", processes)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
    load = Load(CASE.latent_hw[0], 1, 1)
    wrap = DistributedDataParallel if processes > 1 else lambda network: network
    found = median_ms(Steps(CASE, wrap), [load], rounds)
    if rank == 0:
        Path(folder, "ms").write_text(str(found[load]), encoding="utf-8")
    dist.destroy_process_group()


def process_ms(processes: int, rounds: int) -> float:
    """Median time in ms of a step that the given number of processes take together."""
    with TemporaryDirectory() as folder:
        mp.spawn(_process, (processes, rounds, folder), nprocs=processes)
        return float(Path(folder, "ms").read_text(encoding="utf-8"))


def start_series(quick: bool, starts: int) -> list[Series]:
    """Starts with more shards for more images, and starts with larger shards."""
    shard_counts = (60, 90) if quick else (125, 250, 500, 1000)
    fixed = shard_counts[0]

    def ms(rows: int, shards: int) -> float:
        return 1000 * index.measure(rows, shards, starts)["seconds"]

    more = [(START_ROWS * shards, ms(START_ROWS * shards, shards)) for shards in shard_counts]
    larger = [(rows, ms(rows, fixed)) for rows, _ in more[1:]]
    return [
        Series(f"shards of {START_ROWS} images", tuple(more)),
        Series(f"{fixed} shards", (more[0], *larger)),
    ]


def measure(rounds: int, starts: int, quick: bool) -> dict[str, list[Series]]:
    """Measure the lines of every plot."""
    lines = step_loads(quick)
    times = median_ms(Steps(CASE), {load for line in lines.values() for load in line.values()}, rounds)
    found = {
        name: [Series(f"by {name}", tuple((x, times[load]) for x, load in line.items()))]
        for name, line in lines.items()
    }
    counts = (1, 2) if quick else (1, 2, 4)
    found["processes"] = [Series("by processes", tuple((count, process_ms(count, rounds)) for count in counts))]
    found["start"] = start_series(quick, starts)
    return found


def growth_table(found: dict[str, list[Series]]) -> str:
    """A table row for each line: points, exponent, and the last two points' exponent, which has less fixed cost."""
    rows = [
        [
            growth.title,
            line.name,
            ", ".join(f"{x:,.0f}: {y:,.0f}" for x, y in line.points),
            f"{fit(line.points).exponent:.2f}",
            f"{fit(line.points[-2:]).exponent:.2f}",
        ]
        for growth in GROWTHS
        for line in found[growth.name]
    ]
    return scaling.table(["Plot", "line", "x: ms", "fitted exponent", "of the last two"], rows)


def pictures(found: dict[str, list[Series]]) -> dict[str, str]:
    """SVG by file name."""
    return {
        f"growth_{growth.name}.svg": log_plot(growth.title, growth.x_label, growth.y_label, found[growth.name])
        for growth in GROWTHS
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, help="measured steps of each load (%(default)s)")
    parser.add_argument("--starts", type=int, default=2, help="fresh processes a size of the data (%(default)s)")
    parser.add_argument("--quick", action="store_true", help="two small points a line, to see that it runs")
    parser.add_argument("--write", type=Path, help="the folder whose growth.md and growth_*.svg are replaced")
    options = parser.parse_args(argv)
    began = time.perf_counter()
    torch.set_num_threads(1)
    devices.keep_freed_memory(CPU)
    found = measure(options.rounds, options.starts, options.quick)
    table = growth_table(found)
    if options.write:
        page = options.write / "growth.md"
        page.write_text(scaling.with_tables(page.read_text(encoding="utf-8"), {"growth": table}), encoding="utf-8")
        for name, picture in pictures(found).items():
            (options.write / name).write_text(picture, encoding="utf-8")
    print(table)
    result: dict[str, Any] = {
        "bench": "growth", "torch": torch.__version__, "python": platform.python_version(), "cores": os.cpu_count(),
        "seconds": time.perf_counter() - began,
        "lines": {name: [vars(line) | {"exponent": fit(line.points).exponent} for line in lines]
                  for name, lines in found.items()},
    }  # fmt: skip
    print(json.dumps(result))


if __name__ == "__main__":
    main()
