"""How many operators a step launches on the NPU, and how often the host waits for the device, on the simulated one.

    OMP_NUM_THREADS=1 python bench/launches.py

Two tables. The U-Net's step alone: forward and backward, then clipping and optimizer, ours beside diffusers' U-Net with
torch.optim.AdamW as its train_text_to_image_sdxl.py has it. Then whole steps of sdxl_pretrain.py on the demo's model,
from one step's first operator to the next one's, logging included, by the flags that change how a step goes.

A launch is an operator that computes on the device; views launch nothing. A wait is a read of a tensor by the host, a
blocking copy to or from the device, or a synchronization: on an accelerator the host stands still until all that was
launched before is done. Counts are exact and the same in each run; the simulated NPU (test/npu_sim) says nothing of
time. The last line printed is one JSON object.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "bench"))

STEPS = 4
# fmt: off
RUNS = {
    "fp32": ("--mixed_precision=no",),
    "fp32, fused_backward_pass": ("--mixed_precision=no", "--fused_backward_pass"),
    "fp32, AdaFactor": ("--mixed_precision=no", "--optimizer_type=AdaFactor"),
    "fp32, AdaFactor by the schedule": (
        "--mixed_precision=no", "--optimizer_type=AdaFactor",
        "--optimizer_args", "scale_parameter=False", "relative_step=False",
    ),
    "fp16, loss scaling": ("--mixed_precision=fp16",),
}
# fmt: on
_READS = {torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default, torch.ops.aten.nonzero.default}
_COPIES = {torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default}


class Counting(TorchDispatchMode):
    """Counts launches and waits of the operators that run on one type of device."""

    def __init__(self, kind: str = "npu") -> None:
        super().__init__()
        self.kind = kind
        self.counts: Counter[str] = Counter()
        self.waits: Counter[str] = Counter()  # by operator

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        keywords = kwargs or {}
        result = func(*args, **keywords)
        kinds = {leaf.device.type for leaf in tree_leaves((args, keywords, result)) if isinstance(leaf, Tensor)}
        if self.kind in kinds and not _is_view(func):
            self.counts["launches"] += 1
            copied = func in _COPIES and len(kinds) > 1 and not _does_not_block(func, args, keywords)
            if func in _READS or copied:
                self.wait(str(func))
        return result

    def wait(self, why: str) -> None:
        """Count a wait of the host."""
        self.counts["waits"] += 1
        self.waits[why] += 1

    def taken(self) -> dict[str, int]:
        """The counts since the last call."""
        found = {name: self.counts[name] for name in ("launches", "waits")}
        self.counts.clear()
        return found


def _is_view(func: Any) -> bool:
    """True if the operator returns memory of an argument without writing to it: nothing is computed."""
    returns = func._schema.returns
    return bool(returns) and all(result.alias_info is not None and not result.alias_info.is_write for result in returns)


def _does_not_block(func: Any, args: Any, keywords: Any) -> bool:
    """True for a copy that was requested as non-blocking (the simulated NPU blocks unless memory is pinned)."""
    position = {"aten::copy_": 2}.get(func._schema.name)
    return bool(keywords.get("non_blocking", position is not None and len(args) > position and args[position]))


def count_networks() -> dict[str, dict[str, dict[str, int]]]:
    """Launches and waits of both halves of a step, by network; the process must have an NPU."""
    from unet_steps import KINDS, TINY, Case, make_step

    case = Case(TINY, (8, 8), 1, torch.float32, torch.device("npu"), gradient_checkpointing=False)
    found = {}
    for kind in KINDS:
        step = make_step(kind, case)
        step()  # the optimizer's state is made in the first
        with Counting() as counting:
            step.forward_backward()
            halves = {"forward, backward": counting.taken()}
            step.update()
            halves["clip, AdamW"] = counting.taken()
        found[kind] = halves
    return found


def count_run(arguments: Sequence[str]) -> dict[str, Any]:
    """Launches and waits of a run's third step, and the operators that wait; the process must have an NPU."""
    import sdxl_pretrain
    from library import device as devices
    from library.training.loop import Trainer

    steps: list[tuple[dict[str, int], Counter[str]]] = []
    train_step, synchronize = Trainer.train_step, devices.synchronize
    counting = Counting()

    def noted(self: Trainer, batches: Any) -> Any:
        steps.append((counting.taken(), counting.waits.copy()))
        counting.waits.clear()
        return train_step(self, batches)

    def waited(device: torch.device) -> None:
        counting.wait("synchronize")
        synchronize(device)

    Trainer.train_step, devices.synchronize = noted, waited  # type: ignore[method-assign]
    try:
        with counting:
            status = sdxl_pretrain.main(list(arguments))
    finally:
        Trainer.train_step, devices.synchronize = train_step, synchronize  # type: ignore[method-assign]
    if status:
        raise SystemExit(status)
    counts, waits = steps[3]  # noted when the fourth begins
    return {**counts, "of which": dict(waits)}


def in_child(*arguments: str) -> Any:
    """The output of this script with the given arguments in a process that has a simulated NPU."""
    sys.path.insert(0, str(ROOT / "test"))
    from npu_sim.environment import environment

    done = subprocess.run(
        [sys.executable, __file__, *arguments], env=environment(1), cwd=ROOT, capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(f"{' '.join(arguments)} failed:\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure(folder: Path) -> dict[str, Any]:
    """Count everything; the model, the pictures and the runs' output go into the folder."""
    from end_to_end import make_set

    make_set(folder)
    runs = {}
    for name, flags in RUNS.items():
        out = folder / "out" / name.replace(", ", "_").replace(" ", "_")
        runs[name] = in_child("--run", *training_flags(folder / "model", folder / "data", out), *flags)
    return {"networks": in_child("--networks"), "runs": runs}


def training_flags(model: Path, data: Path, out: Path) -> list[str]:
    """The flags of a short run with one picture a step."""
    return [
        f"--pretrained_model_name_or_path={model}", f"--train_data_dir={data}", f"--output_dir={out}",
        "--resolution=64", "--caption_extension=.txt", "--train_batch_size=1", "--max_data_loader_n_workers=0",
        f"--max_train_steps={STEPS}", "--seed=1", "--learning_rate=1e-5", "--save_model_as=safetensors",
    ]  # fmt: skip


def print_tables(found: dict[str, Any]) -> None:
    """Print the counts as tables."""
    print("| one step of the U-Net (tiny, fp32) | launches | waits |\n| --- | --- | --- |")
    for kind, halves in found["networks"].items():
        for half, counts in halves.items():
            print(f"| {kind}: {half} | {counts['launches']} | {counts['waits']} |")
    print("\n| one step of sdxl_pretrain.py, demo's model | launches | waits | which |\n| --- | --- | --- | --- |")
    for name, counts in found["runs"].items():
        which = ", ".join(f"{count} × {operator}" for operator, count in counts["of which"].items())
        print(f"| {name} | {counts['launches']} | {counts['waits']} | {which} |")


def main(argv: Sequence[str] | None = None) -> int:
    """Count and print."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    if arguments[:1] == ["--networks"]:
        print(json.dumps(count_networks()))
        return 0
    if arguments[:1] == ["--run"]:
        print("\n" + json.dumps(count_run(arguments[1:])))
        return 0
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args(
        arguments
    )
    with tempfile.TemporaryDirectory() as folder:
        found = measure(Path(folder))
    print_tables(found)
    print(json.dumps(found))
    return 0


if __name__ == "__main__":
    sys.exit(main())
