"""Time and memory of one training step of our U-Net against diffusers' U-Net, same sizes and weights, interleaved.

    python bench/train_step.py --size small --steps 20
    python bench/train_step.py --size full --batch 4 --dtype bf16 --device cuda --gradient_checkpointing --one_at_a_time
    bash bench/gpu.sh    # the whole of SDXL's U-Net in bf16 and fp16, compiled and plain, on a GPU with 80 GB

A step is: forward, mean squared error, backward, clipping of the gradients' norm to 1, AdamW, the learning rate's
schedule. Ours takes what follows the loss by the trainer's own classes, with the allocator's settings as the trainer
makes them (and another optimizer with --optimizer_type), diffusers' takes torch.optim.AdamW as in its
train_text_to_image_sdxl.py. Each lives in a process of its own, so that neither gets the other's allocator; the two
take steps in turns, so that whatever else the machine does falls on both. The matrix products and convolutions of our
step (forward and both products of backward) are recorded and timed alone in a third process, too: what remains is the
share that a better program could save. With --torch_compile both networks with compiled blocks take their turns, too:
ours as the trainer compiles them, diffusers' by its `compile_repeated_blocks`; compiling is not timed. With
--fused_backward_pass ours as the trainer takes the step with that flag is a further kind, "ours fused": each tensor's
norm is clipped to 1 and its step taken in backward, its gradient freed. Its first loss is that of ours; later ones
differ where the norm of all gradients is above 1, since each tensor is clipped by itself. Where the device
cannot hold all of them, with --one_at_a_time each takes its steps in a process that has the device for itself, and so
does the next, and then once more in the opposite order. Memory is the processes' own: on the CPU the peak resident set
above that after imports. TFLOP/s count three times the forward pass (Chowdhery et al., 2204.02311, appendix B: what the
mathematics needs, whatever is computed again); MFU is their share of the device's peak. The last line printed is one
JSON object.
"""

import argparse
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from product_replay import ProductRecorder, product_replay
from timing import spread, timed_ms
from unet_steps import COMPILED, DTYPES, FUSED, KINDS, SIZES, TINY, Case, TrainStep, make_step, model_flops

from library import device as devices

# Dense TFLOP/s of fp16 and bf16, as NVIDIA's data sheets have them, by a part of the device's name.
PEAK_TFLOPS = {"A100": 312.0, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "H200": 989.4, "L40S": 362.05}


def parts_of_step(kind: str, step: TrainStep, device: torch.device) -> dict[str, Callable[[], Any]]:
    """The functions that a process times: a step's halves by name, or the matrix arithmetic of our step."""
    if kind == FUSED:
        return {f"{kind}: all but the norm": step.forward_backward, f"{kind}: norm": step.update}
    if kind != "products":
        return {f"{kind}: forward, backward": step.forward_backward, f"{kind}: clip, AdamW": step.update}
    with ProductRecorder() as recorder:
        step()
    return {"products": product_replay(recorder, device)[0]}


def serve(kind: str, case: Case) -> None:
    """Serve as a process of the measurement: print a line of JSON for each line of input."""
    on_cpu = devices.is_cpu(case.device)
    if on_cpu:  # a first step of little size imports, and allocates, what is not this step's
        plain = kind if kind == FUSED else "diffusers" if kind.startswith("diffusers") else "ours"
        make_step(plain, replace(case, config=TINY, latent_hw=(8, 8), batch=1))()
    before = _resident_bytes() if on_cpu else 0
    if not kind.startswith("diffusers"):
        devices.keep_freed_memory(case.device)
    step = make_step("ours" if kind == "products" else kind, case)
    parts = parts_of_step(kind, step, case.device)
    for line in sys.stdin:
        if line.strip() == "memory":
            peak = devices.peak_memory_bytes(case.device) - before
            answer: dict[str, Any] = {"peak": peak, "state": step.state_bytes()}
        else:
            answer = {"ms": {}, "loss": None}
            for name, run in parts.items():
                answer["ms"][name], result = timed_ms(run, case.device)
                answer["loss"] = float(result) if isinstance(result, Tensor) else answer["loss"]
        print(json.dumps(answer), flush=True)


class Process:
    """A child process, which takes its turn on request."""

    def __init__(self, kind: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, f"--serve={kind}"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> dict[str, Any]:
        """Send "step" or "memory" to the process and return its answer."""
        assert self._child.stdin is not None and self._child.stdout is not None
        print(question, file=self._child.stdin, flush=True)
        return json.loads(self._child.stdout.readline())

    def close(self) -> None:
        self._child.communicate()


@dataclass
class Measured:
    """The processes' results: first steps' losses, times in ms by part, peaks and states in bytes."""

    losses: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)
    states: dict[str, int] = field(default_factory=dict)

    def begin(self, kind: str, process: Process) -> None:
        """The first step, which is not timed."""
        self.losses[kind] = process.ask("step")["loss"]

    def step(self, kind: str, process: Process, counts: bool = True) -> None:
        """Take a timed step."""
        parts = process.ask("step")["ms"]
        if counts:
            for name, value in (parts | {kind: sum(parts.values())}).items():
                self.times.setdefault(name, []).append(value)

    def end(self, kind: str, process: Process) -> None:
        """Record the peak memory and the state of the process."""
        memory = process.ask("memory")
        self.peaks[kind], self.states[kind] = memory["peak"], memory["state"]


def in_turns(arguments: list[str], kinds: Sequence[str], steps: int, warmup: int) -> Measured:
    """Take a step of each kind in turn, in changing order."""
    measured = Measured()
    processes = {kind: Process(kind, arguments) for kind in kinds}
    try:
        for kind, process in processes.items():
            measured.begin(kind, process)
        for index in range(warmup + steps):
            for kind in list(processes)[:: 1 if index % 2 else -1]:
                measured.step(kind, processes[kind], index >= warmup)
        for kind, process in processes.items():
            measured.end(kind, process)
    finally:
        for process in processes.values():
            process.close()
    return measured


def one_at_a_time(arguments: list[str], kinds: Sequence[str], steps: int, warmup: int) -> Measured:
    """Take half of the steps kind by kind, then the other half in the opposite order of kinds."""
    measured = Measured()
    for order, count in ((kinds, steps - steps // 2), (kinds[::-1], steps // 2)):
        for kind in order:
            process = Process(kind, arguments)
            try:
                measured.begin(kind, process)
                for index in range(warmup + count):
                    measured.step(kind, process, index >= warmup)
                measured.end(kind, process)
            finally:
                process.close()
    return measured


def measure(arguments: list[str], case: Case, steps: int, warmup: int, apart: bool = False) -> dict[str, Any]:
    """Measure both steps, their halves, and the matrix arithmetic."""
    take = one_at_a_time if apart else in_turns
    measured = take(arguments, (*case.kinds, "products"), steps, warmup)
    peaks, states, losses = (
        {kind: of[kind] for kind in case.kinds} for of in (measured.peaks, measured.states, measured.losses)
    )
    found = figures(losses, measured.times)
    return found | memory_figures(peaks, states) | speed_figures(case, found["ms"])


def memory_figures(peaks: dict[str, int], states: dict[str, int]) -> dict[str, Any]:
    """Peaks in bytes and their ratios to diffusers'; weights with optimizer state, and the peak above these."""
    above = {kind: peaks[kind] - states[kind] for kind in peaks}
    return {
        "memory_bytes": {kind: {"peak": peak, "state": states[kind]} for kind, peak in peaks.items()},
        "memory_ratio": {kind: peak / peaks["diffusers"] for kind, peak in peaks.items()},
        "ratio_above_state": {kind: value / above["diffusers"] for kind, value in above.items()},
    }


def speed_figures(case: Case, ms: dict[str, dict[str, float]]) -> dict[str, Any]:
    """TFLOP/s of each network's steps at the median time, and the share of the device's peak where that is known."""
    flops = model_flops(case)
    reached = {kind: flops / ms[kind]["median"] / 1e9 for kind in case.kinds}
    name = devices.device_name(case.device)
    peak = next((peak for part, peak in PEAK_TFLOPS.items() if part in name), None)
    if peak is None or case.dtype == torch.float32:
        return {"step_tflop": flops / 1e12, "tflops": reached}
    mfu = {kind: value / peak for kind, value in reached.items()}
    return {"step_tflop": flops / 1e12, "tflops": reached, "peak_tflops": peak, "mfu": mfu}


def figures(losses: dict[str, float], times: dict[str, list[float]]) -> dict[str, Any]:
    """The result's ratios and spreads."""

    def ratio(one: str, other: str) -> dict[str, float]:
        return spread([a / b for a, b in zip(times[one], times[other], strict=True)])

    further = {
        "fused_time_ratio_to_ours": (FUSED, "ours"),
        "fused_time_ratio_to_diffusers": (FUSED, "diffusers"),
        "compiled_time_ratio_to_ours": ("ours compiled", "ours"),
        "compiled_network_time_ratio_to_ours": ("ours compiled: forward, backward", "ours: forward, backward"),
        "compiled_time_ratio_to_diffusers_compiled": ("ours compiled", "diffusers compiled"),
        "diffusers_compiled_time_ratio_to_diffusers": ("diffusers compiled", "diffusers"),
    }
    return {
        "loss": losses,
        "loss_relative_difference": abs(losses["ours"] / losses["diffusers"] - 1),
        "ms": {name: spread(values) for name, values in times.items()},
        "time_ratio_ours_to_diffusers": ratio("ours", "diffusers"),
        "network_time_ratio": ratio("ours: forward, backward", "diffusers: forward, backward"),
        "product_share_of_our_step": ratio("products", "ours"),
        "product_share_of_our_network": ratio("products", "ours: forward, backward"),
        **{name: ratio(*pair) for name, pair in further.items() if all(one in times for one in pair)},
    }


def _resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * resource.getpagesize()


# The program


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", choices=SIZES, default="small", help="full is SDXL: about 41 GB of state for each")
    parser.add_argument("--latent", help="latent rows and columns, HxW; default by size")
    parser.add_argument("--batch", type=int, help="default by size")
    parser.add_argument("--steps", type=int, default=15, help="measured steps of each, at least 2")
    parser.add_argument("--warmup", type=int, default=2)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32", help="fp16 and bf16: fp32 weights under autocast")
    parser.add_argument("--device", help="cpu, cuda or npu; default is what the trainer would take")
    parser.add_argument("--gradient_checkpointing", action="store_true")
    parser.add_argument("--fused_backward_pass", action="store_true", help="measure ours with AdamW in backward, too")
    parser.add_argument("--optimizer_type", default="AdamW", help="of ours; diffusers' is AdamW (%(default)s)")
    parser.add_argument("--optimizer_args", nargs="*", default=[], help="its arguments, as the trainer takes them")
    parser.add_argument(
        "--no_update", action="store_true", help="forward and backward alone, each gradient dropped as it is made"
    )
    parser.add_argument("--torch_compile", action="store_true", help="measure both networks with compiled blocks, too")
    parser.add_argument("--dynamo_backend", default="inductor", help="what compiles them (%(default)s)")
    parser.add_argument(
        "--one_at_a_time", action="store_true", help="for sizes of which the device holds one; half the steps each time"
    )
    parser.add_argument("--serve", choices=[*KINDS, FUSED, *COMPILED, "products"], help=argparse.SUPPRESS)
    return parser


def case_of(options: argparse.Namespace) -> Case:
    config, latent_hw, batch = SIZES[options.size]
    if options.latent:
        rows, _, columns = options.latent.partition("x")
        latent_hw = (int(rows), int(columns))
    return Case(
        config=config,
        latent_hw=latent_hw,
        batch=options.batch or batch,
        dtype=DTYPES[options.dtype],
        device=torch.device(options.device) if options.device else devices.default_device(),
        gradient_checkpointing=options.gradient_checkpointing,
        dynamo_backend=options.dynamo_backend if options.torch_compile else None,
        fused_backward_pass=options.fused_backward_pass,
        no_update=options.no_update,
        optimizer_type=options.optimizer_type,
        optimizer_args=tuple(options.optimizer_args),
    )


def versions(case: Case) -> dict[str, Any]:
    """Versions of the packages on which the figures depend."""
    import diffusers

    return {
        "torch": torch.__version__,
        "diffusers": diffusers.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
        "device": devices.device_name(case.device),
        "threads": torch.get_num_threads(),
    }


def print_table(result: dict[str, Any]) -> None:
    print(f"{'':40}{'median':>10}{'quartiles':>22}")
    for name, ms in sorted(result["ms"].items()):
        print(f"{name + ', ms':40}{ms['median']:10.1f}{ms['quartile1']:13.1f} {ms['quartile3']:8.1f}")
    labels = {
        "time_ratio_ours_to_diffusers": "step, ours / diffusers'",
        "network_time_ratio": "forward and backward, ours / diffusers'",
        "product_share_of_our_step": "products / our step",
        "product_share_of_our_network": "products / our forward and backward",
        "fused_time_ratio_to_ours": "our step, fused / plain",
        "fused_time_ratio_to_diffusers": "fused step, ours / diffusers'",
        "compiled_time_ratio_to_ours": "our step, compiled / plain",
        "compiled_network_time_ratio_to_ours": "our network, compiled / plain",
        "compiled_time_ratio_to_diffusers_compiled": "compiled step, ours / diffusers'",
        "diffusers_compiled_time_ratio_to_diffusers": "diffusers' step, compiled / plain",
    }
    for name, label in labels.items():
        if name not in result:
            continue
        value = result[name]
        print(f"{label:40}{value['median']:10.3f}{value['quartile1']:13.3f} {value['quartile3']:8.3f}")
    for kind, memory in result.get("memory_bytes", {}).items():
        print(
            f"{'peak memory, MiB: ' + kind:36}{memory['peak'] / 2**20:10.0f}   ({memory['state'] / 2**20:.0f} of state)"
        )
    for kind, value in result.get("memory_ratio", {}).items():
        if kind != "diffusers":
            label, above = f"peak memory, {kind} / diffusers'", result["ratio_above_state"][kind]
            print(f"{label:40}{value:10.3f}   ({above:.3f} without the state)")
    for kind, value in result.get("tflops", {}).items():
        share = f"   (MFU {result['mfu'][kind]:.1%} of {result['peak_tflops']:g})" if "mfu" in result else ""
        print(f"{'TFLOP/s: ' + kind:40}{value:10.3f}{share}")


def main() -> None:
    options = build_parser().parse_args()
    case = case_of(options)
    if options.serve:
        serve(options.serve, case)
        return
    result: dict[str, Any] = {
        "bench": "train_step",
        "size": options.size,
        "latent_hw": case.latent_hw,
        "batch": case.batch,
        "dtype": options.dtype,
        "gradient_checkpointing": case.gradient_checkpointing,
        "dynamo_backend": case.dynamo_backend,
        "fused_backward_pass": case.fused_backward_pass,
        "optimizer_type": None if case.no_update else case.optimizer_type,
        "steps": options.steps,
        "one_at_a_time": options.one_at_a_time,
        **versions(case),
    }
    result |= measure(sys.argv[1:], case, options.steps, options.warmup, options.one_at_a_time)
    print_table(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
