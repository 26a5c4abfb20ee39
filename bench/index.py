"""Time and memory of a start with an index that is there already, against the number of rows and of shards.

    OMP_NUM_THREADS=1 python bench/index.py
    OMP_NUM_THREADS=1 python bench/index.py --cases 1000000/40000
    OMP_NUM_THREADS=1 python bench/index.py --folder_images 50000

For each case ROWS/SHARDS a synthetic index is made: empty files in place of the shards, and tables that the library's
own code keeps and sorts into buckets. Then the data is prepared anew in fresh processes, as every process of a run does
it: look at the files, find the tables, set up buckets and plan, write the report; after that, eight places of the first
batch and of a later one are resolved. Memory is the peak of the resident set above that after the imports, mapped pages
counted. With --folder_images it is the processor time of finding so many images with captions in one folder again, as
every process does. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import sdxl_pretrain
from library.data.dataset import TrainingData, prepare_data
from library.data.index import table as index_module
from library.data.index import worker_pool as parallel
from library.data.index.rows import ROW, CaptionKind, Part, Summary
from library.data.index.sources import Listed, Subset
from library.data.index.table import build_index
from library.options.data import DataOptions

CASES = "1000000/1000 10000000/1000 10000000/4000"
GLOBAL_BATCH = 2048


def options(data: Path) -> DataOptions:
    """SDXL's buckets over a folder of shards."""
    arguments = ["--pretrained_model_name_or_path=none", "--output_dir=none", f"--train_data_dir={data}"]
    arguments += ["--resolution=1024,1024", "--enable_bucket", "--min_bucket_reso=512", "--max_bucket_reso=2048"]
    arguments += ["--caption_extension=.txt", f"--train_batch_size={GLOBAL_BATCH}", "--max_bad_samples=1"]
    return sdxl_pretrain.SCRIPT.options([*arguments, "--max_data_loader_n_workers=0"]).data


def prepared(data: Path) -> TrainingData:
    """The data as a training process prepares it."""
    found = prepare_data(options(data), 1, rank=0, world_size=1, accumulation=1)
    assert isinstance(found, TrainingData)
    return found


def synthetic_part(rows: int, seed: int) -> Part:
    """A shard's table: sizes of many aspect ratios, keys of nine digits, captions in .txt members."""
    rng = np.random.default_rng(seed)
    table = np.zeros(rows, ROW)
    table["image_bytes"] = rng.integers(50_000, 200_000, rows)
    table["image_offset"] = np.cumsum(table["image_bytes"])
    table["caption_kind"], table["caption_bytes"] = CaptionKind.PLAIN, 80
    table["name_offset"], table["name_bytes"] = 9 * np.arange(rows), 9
    table["width"], table["height"] = rng.integers(300, 3000, rows), rng.integers(300, 3000, rows)
    keys = "".join(f"{number:09d}" for number in range(rows)).encode()
    return Part(table, np.frombuffer(keys, np.uint8))


def make_synthetic(data: Path, rows: int, shards: int) -> float:
    """Fill a folder; returns the seconds that making and keeping the tables took."""
    for number in range(shards):
        (data / f"{number:05d}.tar").touch()

    def scan(entry: Listed) -> tuple[dict[str, np.ndarray], dict[str, object]]:
        part = synthetic_part(rows // shards, int(entry.source.path.stem))
        return {"rows": part.rows, "text": part.text}, vars(Summary.of(part))

    index_module._scan = scan  # type: ignore[assignment]
    parallel._ALONE_SECONDS = float("inf")  # other processes would not have the synthetic scan
    began = time.perf_counter()
    assert len(prepared(data).index) == rows // shards * shards
    return time.perf_counter() - began


def memory_kib(field: str) -> int:
    """A figure of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{field}:"))


def start(data: Path) -> None:
    """One start, measured; prints JSON."""
    before = memory_kib("VmRSS")
    began = time.perf_counter()
    found = prepared(data)
    found.report()
    seconds = time.perf_counter() - began
    for step in (0, 1_000_000):
        found.plan.micro_batch(step, 0)
    first_batch = time.perf_counter() - began - seconds
    mib = (memory_kib("VmHWM") - before) / 1024
    print(json.dumps({"seconds": seconds, "two_batches_seconds": first_batch, "mib": mib}))


def start_folder(data: Path) -> None:
    """Find the images of a folder whose table is kept already; prints JSON."""
    subset = Subset(data, ".txt")
    began = time.process_time()
    count = len(build_index([subset]))
    print(json.dumps({"images": count, "cpu_seconds": time.process_time() - began}))


def measure_folder(images: int, starts: int) -> dict[str, float]:
    """The median over fresh processes; the first start, which reads every header and caption, does not count."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        Image.new("RGB", (160, 120)).save(data / "0.jpg")
        (data / "0.txt").write_text("a caption")
        for number in range(1, images):
            for extension in ("jpg", "txt"):
                (data / f"{number}.{extension}").hardlink_to(data / f"0.{extension}")
        command = [sys.executable, __file__, "--start_folder", str(data)]
        runs = []
        for _ in range(1 + starts):
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    seconds = statistics.median(run["cpu_seconds"] for run in runs[1:])
    return {"images": images, "cpu_us_an_image": seconds / images * 1e6}


def measure(rows: int, shards: int, starts: int) -> dict[str, float]:
    """Medians over fresh processes for one case."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder)
        making = make_synthetic(data, rows, shards)
        kept = sum(file.stat().st_size for file in (data / ".image_index").iterdir())
        runs = []
        for _ in range(starts):
            command = [sys.executable, __file__, "--start", str(data)]
            runs.append(json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout))
    medians = {name: statistics.median(run[name] for run in runs) for name in runs[0]}
    return {"rows": rows, "shards": shards, **medians, "kept_mib": kept / 2**20, "making_seconds": making}


def main() -> int:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", default=CASES.split(), help=f"ROWS/SHARDS of each ({CASES})")
    parser.add_argument("--starts", type=int, default=5, help="fresh processes a case (%(default)s)")
    parser.add_argument("--folder_images", type=int, help="images with captions in one folder, in place of the cases")
    parser.add_argument("--start", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--start_folder", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.start_folder:
        start_folder(args.start_folder)
        return 0
    if args.folder_images:
        print(json.dumps({"bench": "index", "starts": args.starts, **measure_folder(args.folder_images, args.starts)}))
        return 0
    if args.start:
        start(args.start)
        return 0
    print(f"{'rows':>11} {'shards':>7} {'start s':>8} {'2 batches s':>12} {'MiB':>6} {'on disk MiB':>12}")
    results = []
    for case in args.cases:
        rows, shards = map(int, case.split("/"))
        found = measure(rows, shards, args.starts)
        results.append(found)
        print(
            f"{rows:>11} {shards:>7} {found['seconds']:>8.3f} {found['two_batches_seconds']:>12.3f} "
            f"{found['mib']:>6.1f} {found['kept_mib']:>12.1f}",
            flush=True,
        )
    print(json.dumps({"bench": "index", "starts": args.starts, "cases": results}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
