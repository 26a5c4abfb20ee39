"""From the start of the process to a saved checkpoint, by stages, and the start beside one on diffusers' classes.

    OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 python bench/end_to_end.py
    ... python bench/end_to_end.py --example train_text_to_image_sdxl.py --example_packages FOLDER

The set is fixed: the demo's small model and 64 of its pictures. Runs of sdxl_pretrain.py take turns with
bench/diffusers_start.py and, where there is one, diffusers' own example script (examples/text_to_image of its
repository; FOLDER has what it needs beyond our requirements: `pip install --target=FOLDER datasets`), each in a process
of its own. Start-up is process start to the end of the first optimizer
step, in seconds and in this process's CPU seconds, which other work on the machine disturbs less. Then the middle of a
run: images/s, the share of time that waits for data, and the loop's own time: all of a step but loss (forward),
backward, clipping, the optimizer's step and waiting for data, with --step_batch images of 64 px a step. The last line
that is printed is one JSON object.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
STAGES = ("imports", "data", "model", "first step", "other steps", "save")
ARITHMETIC = ("loss", "backward", "clip", "optimizer")
WARMUP_STEPS = 3  # left out of the middle of the run


class Clock:
    """When a run's stages end, and what its steps consist of; seconds since the process was started."""

    def __init__(self, started: float) -> None:
        self.started = started
        self.ends: dict[str, float] = {}
        self.first_step_cpu = 0.0
        self.waits: list[float] = []
        self.between: list[float] = []  # of each step, from one batch's arrival to asking for the next
        self.parts: dict[str, list[float]] = {name: [] for name in ARITHMETIC}

    def end(self, stage: str) -> None:
        """Record that a stage ends now."""
        self.ends[stage] = time.time() - self.started

    def ending(self, function: Callable[..., Any], stage: str) -> Callable[..., Any]:
        """Wrap a function so that its return ends a stage."""

        def timed(*args: Any, **keywords: Any) -> Any:
            result = function(*args, **keywords)
            self.end(stage)
            return result

        return timed

    def part(self, function: Callable[..., Any], name: str) -> Callable[..., Any]:
        """Wrap a function so that its time counts as one part of a step's arithmetic."""

        def timed(*args: Any, **keywords: Any) -> Any:
            began = time.perf_counter()
            result = function(*args, **keywords)
            self.parts[name].append(time.perf_counter() - began)
            return result

        return timed

    def batches(self, batches: Iterator[Any]) -> Iterator[Any]:
        """Yield the batches; the time between them is a step, the time of fetching them is waiting."""
        while True:
            began = time.perf_counter()
            try:
                batch = next(batches)
            except StopIteration:
                return
            arrived = time.perf_counter()
            self.waits.append(arrived - began)
            yield batch
            self.between.append(time.perf_counter() - arrived)

    def steps(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the step; the first step ends the start-up."""

        def timed(*args: Any, **keywords: Any) -> Any:
            result = train_step(*args, **keywords)
            if "first step" not in self.ends:
                self.end("first step")
                self.first_step_cpu = time.process_time()
            return result

        return timed

    def optimizer(self, optimizer: Any) -> None:
        """Count the time of an optimizer's steps as its part. (The schedule warns if the method itself is replaced.)"""
        began = 0.0

        def before(*_: Any) -> None:
            nonlocal began
            began = time.perf_counter()

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(lambda *_: self.parts["optimizer"].append(time.perf_counter() - began))


def run_timed(started: float, arguments: Sequence[str]) -> dict[str, Any]:
    """Run sdxl_pretrain.py here with timers around its stages; returns what they show."""
    import sdxl_pretrain
    from library.training import loop, run
    from library.training.task import Task

    clock = Clock(started)
    clock.end("imports")
    run.prepare_data = clock.ending(run.prepare_data, "data")
    run.build_parts = clock.ending(run.build_parts, "model")
    Task.loss = clock.part(Task.loss, "loss")
    train = loop.Trainer.train

    def train_timed(self: loop.Trainer, batches: Iterator[Any]) -> Any:
        self.parallel.backward = clock.part(self.parallel.backward, "backward")
        self.parallel.clip = clock.part(self.parallel.clip, "clip")
        clock.optimizer(self.parallel.own_optimizer)
        report = train(self, clock.batches(batches))
        clock.end("other steps")
        return report

    loop.Trainer.train = train_timed
    loop.Trainer.train_step = clock.steps(loop.Trainer.train_step)
    status = sdxl_pretrain.main(list(arguments))
    clock.end("save")
    if status:
        raise SystemExit(status)
    return summary(clock)


def summary(clock: Clock) -> dict[str, Any]:
    """Stages in seconds, and of the steps after the warm-up the median of each part, in milliseconds."""
    last, stages = 0.0, {}
    for stage in STAGES:
        stages[stage] = clock.ends.get(stage, last) - last
        last = clock.ends.get(stage, last)
    arithmetic = [sum(parts) for parts in zip(*clock.parts.values(), strict=False)]
    middle = range(WARMUP_STEPS, len(clock.between))
    steps = [clock.between[step] for step in middle]
    waits = [clock.waits[step] for step in middle]
    loops = [clock.between[step] - arithmetic[step] for step in middle]
    return {
        "stages_s": stages,
        "start_s": clock.ends["first step"],
        "start_cpu_s": clock.first_step_cpu,
        "step_ms": 1e3 * statistics.median(steps) if steps else None,
        "parts_ms": {name: 1e3 * statistics.median(clock.parts[name][WARMUP_STEPS:]) for name in ARITHMETIC if steps},
        "loop_ms": 1e3 * statistics.median(loops) if loops else None,
        "loop_share": sum(loops) / sum(steps) if steps else None,
        "wait_share": sum(waits) / (sum(waits) + sum(steps)) if steps else None,
        "images_per_second_of": len(steps) / (sum(waits) + sum(steps)) if steps else None,
    }


def make_set(folder: Path) -> None:
    """The demo's model and pictures, these also as files of their own for the peer."""
    from tools.demo.make_data import write_data
    from tools.demo.make_model import write_model

    write_model(folder / "model")
    write_data(folder / "data", count=64)
    (folder / "pictures").mkdir()
    for shard in sorted((folder / "data").rglob("*.tar")):
        with tarfile.open(shard) as tar:
            for member in tar:
                content = tar.extractfile(member)
                if content is not None and member.name.endswith((".jpg", ".txt")):
                    (folder / "pictures" / Path(member.name).name).write_bytes(content.read())


def arguments(folder: Path, steps: int, batch: int) -> list[str]:
    """The command line of a run on the set."""
    return [
        f"--pretrained_model_name_or_path={folder / 'model'}", f"--train_data_dir={folder / 'data'}",
        "--resolution=64", "--caption_extension=.txt", f"--output_dir={folder / 'out'}", "--seed=1",
        f"--train_batch_size={batch}", f"--max_train_steps={steps}", "--max_data_loader_n_workers=0",
    ]  # fmt: skip


def ours(folder: Path, steps: int, batch: int) -> dict[str, Any]:
    """Times of a run of sdxl_pretrain.py in its own process."""
    command = [sys.executable, __file__, "--child", str(time.time()), *arguments(folder, steps, batch)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def peer(command: Sequence[str]) -> dict[str, float]:
    """A peer's start, in a process of its own: seconds and CPU seconds to the end of its first step."""
    started = time.time()
    done = subprocess.run([sys.executable, *command], capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    ended, cpu = done.stdout.split("first step ends ")[1].split()[:2]
    return {"start_s": float(ended) - started, "start_cpu_s": float(cpu)}


def peers(folder: Path, example: Path | None, packages: Path | None) -> dict[str, list[str]]:
    """The commands of the peers by name."""
    model, pictures = str(folder / "model"), folder / "pictures"
    found = {"classes": [str(ROOT / "bench" / "diffusers_start.py"), model, str(pictures)]}
    if example is not None:
        lines = [
            json.dumps({"file_name": path.name, "text": path.with_suffix(".txt").read_text()}) + "\n"
            for path in sorted(pictures.glob("*.jpg"))
        ]
        (pictures / "metadata.jsonl").write_text("".join(lines))
        found["example"] = [
            str(ROOT / "bench" / "example_start.py"), str(packages or folder), str(example),
            f"--pretrained_model_name_or_path={model}", f"--train_data_dir={pictures}", "--caption_column=text",
            f"--cache_dir={folder / 'example_cache'}", f"--output_dir={folder / 'example_out'}", "--resolution=64",
            "--train_batch_size=2", "--max_train_steps=1", "--seed=1",
        ]  # fmt: skip
    return found


def spread(values: Sequence[float]) -> dict[str, float]:
    """Median, minimum and maximum."""
    return {"median": statistics.median(values), "least": min(values), "most": max(values)}


def measure(
    rounds: int, steps: int, step_batch: int, example: Path | None = None, packages: Path | None = None
) -> dict[str, Any]:
    """Measure starts in turns, then a longer run."""
    keys = ("start_s", "start_cpu_s")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make_set(folder)
        commands = peers(folder, example, packages)
        own_starts, starts = [], {peer_name: [] for peer_name in commands}
        for _ in range(rounds):
            own_starts.append(ours(folder, 1, 2))
            for peer_name, command in commands.items():
                shutil.rmtree(folder / "example_cache", ignore_errors=True)
                starts[peer_name].append(peer(command))
        middle = ours(folder, steps, step_batch)
    return {
        "stages_s": {stage: statistics.median(own["stages_s"][stage] for own in own_starts) for stage in STAGES},
        "ours": {key: spread([own[key] for own in own_starts]) for key in keys},
        "peers": {
            peer_name: {key: spread([one[key] for one in found]) for key in keys} for peer_name, found in starts.items()
        },
        "ratios": {
            peer_name: {
                key: spread([own[key] / one[key] for own, one in zip(own_starts, found, strict=True)]) for key in keys
            }
            for peer_name, found in starts.items()
        },
        "middle": {
            **{key: middle[key] for key in ("step_ms", "parts_ms", "loop_ms", "loop_share", "wait_share")},
            "images_per_second": step_batch * middle["images_per_second_of"],
            "batch": step_batch,
            "stages_s": middle["stages_s"],
        },
    }


def print_table(found: dict[str, Any]) -> None:
    """Print the figures as a table."""
    print("| stage of a run of one step | s |\n|---|---|")
    for stage, seconds in found["stages_s"].items():
        print(f"| {stage} | {seconds:.2f} |")
    print("\n| start to the end of the first step, beside diffusers' | ours | diffusers' | ratio |\n|---|---|---|---|")
    for name in found["peers"]:
        for key, label in (("start_s", "seconds"), ("start_cpu_s", "CPU seconds")):
            cells = [found["ours"][key], found["peers"][name][key], found["ratios"][name][key]]
            shown = (f"{cell['median']:.2f} ({cell['least']:.2f} to {cell['most']:.2f})" for cell in cells)
            print(f"| {name}, {label} | {' | '.join(shown)} |")
    middle = found["middle"]
    print(f"\n| a step of {middle['batch']} images | |\n|---|---|")
    print(f"| images/s | {middle['images_per_second']:.2f} |\n| step, ms | {middle['step_ms']:.1f} |")
    for name, value in middle["parts_ms"].items():
        print(f"| {name}, ms | {value:.1f} |")
    print(f"| the loop's own, ms | {middle['loop_ms']:.2f} |\n| its share | {middle['loop_share']:.2%} |")
    print(f"| share of time waiting for data | {middle['wait_share']:.2%} |\n")


def main(argv: Sequence[str] | None = None) -> int:
    """Measure and print."""
    summary_line, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary_line, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rounds", type=int, default=3, help="starts of each (%(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="of the longer run (%(default)s)")
    parser.add_argument("--step_batch", type=int, default=8, help="its images a step (%(default)s)")
    parser.add_argument("--example", type=Path, help="diffusers' train_text_to_image_sdxl.py, as a second peer")
    parser.add_argument("--example_packages", type=Path, help="folder with what it needs beyond our requirements")
    args = parser.parse_args(argv)
    found = measure(args.rounds, args.steps, args.step_batch, args.example, args.example_packages)
    print_table(found)
    print(json.dumps({"bench": "end_to_end", "cores": os.cpu_count(), **found}))
    return 0


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    if sys.argv[1:2] == ["--child"]:
        print(json.dumps(run_timed(float(sys.argv[2]), sys.argv[3:])))
        sys.exit(0)
    sys.exit(main())
