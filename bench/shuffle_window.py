"""What --shuffle_window_shards gains in reading and costs in shuffling.

    OMP_NUM_THREADS=1 python bench/shuffle_window.py
    OMP_NUM_THREADS=1 python bench/shuffle_window.py --folder /mnt/network

Two figures of reading for each window. The first is real: synthetic shards are written into a folder, dropped from the
page cache, and samples are read in the plan's order by one thread. The second is counted, not timed: a mounted object
store fetches whole blocks and keeps them in a cache, so the bytes that it fetches for a byte that is used follow from
the order alone. The last line printed is one JSON object.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections import OrderedDict
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.data.order.plan import Plan

SAMPLE_BYTES = 100_000
WINDOWS = (1, 4, 16, 64, 0)
BATCH = 256


class OneBucket:
    """Shards of equally many rows, all in one bucket."""

    def __init__(self, shards: int, rows_in_shard: int) -> None:
        self.images_SK = np.full((shards, 1), rows_in_shard, np.int32)
        self._rows_in_shard = rows_in_shard

    def rows(self, bucket: int, source: int, places_n: np.ndarray) -> np.ndarray:
        """Rows by their places in a shard."""
        return source * self._rows_in_shard + places_n


def write_shards(folder: Path, shards: int, rows: int) -> list[Path]:
    """Files that stand for shards, of random bytes."""
    paths = [folder / f"{number:05d}" for number in range(shards)]
    for path in paths:
        with path.open("wb") as file:
            file.write(os.urandom(rows * SAMPLE_BYTES))
            file.flush()
            os.fsync(file.fileno())
    return paths


def cold_samples_per_second(paths: list[Path], rows: int, plan: Plan, steps: int) -> float:
    """Samples read in the plan's order from a page cache without them."""
    descriptors = [os.open(path, os.O_RDONLY) for path in paths]
    for descriptor in descriptors:
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    began = time.perf_counter()
    for step in range(steps):
        for row in plan.batch(step).tolist():
            os.pread(descriptors[row // rows], SAMPLE_BYTES, row % rows * SAMPLE_BYTES)
    seconds = time.perf_counter() - began
    for descriptor in descriptors:
        os.close(descriptor)
    return steps * BATCH / seconds


def fetched_for_used(plan: Plan, rows: int, block: int, cache: int) -> float:
    """Bytes fetched in whole blocks, for one that is used, over an epoch, with the last used blocks kept."""
    kept: OrderedDict[tuple[int, int], None] = OrderedDict()
    fetched, steps = 0, plan.steps_before_epoch(1)
    for step in range(steps):
        for row in plan.batch(step).tolist():
            start = row % rows * SAMPLE_BYTES
            for number in range(start // block, (start + SAMPLE_BYTES - 1) // block + 1):
                key = (row // rows, number)
                if key in kept:
                    kept.move_to_end(key)
                    continue
                fetched += block
                kept[key] = None
                if len(kept) * block > cache:
                    kept.popitem(last=False)
    return fetched / (steps * BATCH * SAMPLE_BYTES)


def most_from_one(plan: Plan) -> float:
    """Mean share of a batch that comes from its most frequent shard."""
    steps = range(min(64, plan.steps_before_epoch(1)))
    return statistics.mean(
        np.unique(plan.sources_of_batch(step), return_counts=True)[1].max() / BATCH for step in steps
    )


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="where the shards are written for a while (default: a temporary)")
    parser.add_argument("--shards", type=int, default=128)
    parser.add_argument("--rows", type=int, default=100, help="samples of 100 kB in a shard that is read (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    args = parser.parse_args()
    counted_rows, block, cache = 1000, 4 << 20, 4 << 30
    found = {window: {"cold": []} for window in WINDOWS}
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        paths = write_shards(Path(folder), args.shards, args.rows)
        for _ in range(args.rounds):
            for window in WINDOWS:
                rows = OneBucket(args.shards, args.rows)
                plan = Plan(rows, rows.images_SK, 1, BATCH, window_sources=window)
                rate = cold_samples_per_second(paths, args.rows, plan, plan.steps_before_epoch(1) // 2)
                found[window]["cold"].append(rate)
    print(f"{'window':>7} {'cold reads/s':>13} {'fetched/used':>13} {'most of a batch from one shard':>31}")
    results = []
    for window in WINDOWS:
        rows = OneBucket(args.shards, counted_rows)
        plan = Plan(rows, rows.images_SK, 1, BATCH, window_sources=window)
        figures = {
            "window": window,
            "cold_samples_per_second": statistics.median(found[window]["cold"]),
            "fetched_for_used": fetched_for_used(plan, counted_rows, block, cache),
            "most_from_one_shard": most_from_one(plan),
        }
        results.append(figures)
        print(
            f"{window or 'all':>7} {figures['cold_samples_per_second']:>13.0f} {figures['fetched_for_used']:>13.1f} "
            f"{100 * figures['most_from_one_shard']:>29.1f} %"
        )
    sizes = {
        "shards": args.shards,
        "counted_rows": counted_rows,
        "block": block,
        "cache": cache,
        "read_rows": args.rows,
    }
    print(json.dumps({"bench": "shuffle_window", **sizes, "windows": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
