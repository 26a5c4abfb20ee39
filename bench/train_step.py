"""Time and memory of one training step of our U-Net against diffusers' U-Net, same sizes and weights, interleaved.

    python bench/train_step.py --size small --steps 20
    python bench/train_step.py --size full --batch 4 --dtype bf16 --device cuda --gradient_checkpointing --one_at_a_time
    bash bench/gpu.sh    # the whole of SDXL's U-Net in bf16 and fp16, compiled and plain, on a GPU with 80 GB

A step is: forward, mean squared error, backward, clipping of the gradients' norm to 1, AdamW. Ours takes the optimizer
and the allocator's settings as the trainer makes them, diffusers' takes torch.optim.AdamW as in its
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
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import device as devices
from library.models.compiled import compile_blocks
from library.models.diffusers_config import unet_config_to_diffusers
from library.models.key_maps import rename, unet_to_diffusers
from library.models.unet import UNet, UNetConfig, size_embedding
from library.training.fused_backward import FusedBackward
from library.training.optimizers import ParameterGroup, make_optimizer

SIZE_WIDTH = 6 * 256
TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 1), transformer_depth=(0, 1), transformer_depth_middle=1, context_dim=64,
    adm_in_channels=64 + SIZE_WIDTH,
)  # fmt: skip
SMALL = UNetConfig(
    model_channels=64,
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    context_dim=192,
    adm_in_channels=128 + SIZE_WIDTH,
)
MIDDLE = UNetConfig(
    model_channels=128,
    transformer_depth=(0, 2, 4),
    transformer_depth_middle=4,
    context_dim=768,
    adm_in_channels=512 + SIZE_WIDTH,
)
# configuration, latent rows and columns, batch
SIZES = {
    "tiny": (TINY, (8, 8), 1),
    "small": (SMALL, (16, 16), 8),
    "middle": (MIDDLE, (32, 32), 2),
    "full": (UNetConfig(), (128, 128), 1),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_TOKENS = 77
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
KINDS = ("ours", "diffusers")
FUSED = "ours fused"
COMPILED = ("ours compiled", "diffusers compiled")
# Dense TFLOP/s of fp16 and bf16, as NVIDIA's data sheets have them, by a part of the device's name.
PEAK_TFLOPS = {"A100": 312.0, "H100 80GB HBM3": 989.4, "H100 PCIe": 756.0, "H200": 989.4, "L40S": 362.05}


@dataclass(frozen=True)
class Case:
    """What is measured."""

    config: UNetConfig
    latent_hw: tuple[int, int]
    batch: int
    dtype: torch.dtype
    device: torch.device
    gradient_checkpointing: bool
    dynamo_backend: str | None = None  # compiled networks are measured, too
    fused_backward_pass: bool = False  # and ours with the optimizer in backward

    @property
    def kinds(self) -> tuple[str, ...]:
        """The networks that take steps in turns."""
        fused = (FUSED,) if self.fused_backward_pass else ()
        return (*KINDS, *fused, *(() if self.dynamo_backend is None else COMPILED))


@dataclass(frozen=True)
class Inputs:
    """One batch: noised latents, timesteps, text states, pooled text, sizes, and the target."""

    x_BCHW: Tensor
    t_B: Tensor
    context_BTX: Tensor
    pooled_BP: Tensor
    sizes_B6: Tensor
    target_BCHW: Tensor


def make_inputs(case: Case) -> Inputs:
    """The same random batch every time."""
    torch.manual_seed(1)
    batch, (rows, columns) = case.batch, case.latent_hw
    latents = (batch, case.config.in_channels, rows, columns)
    tensors = (
        torch.randn(latents),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, TEXT_TOKENS, case.config.context_dim),
        torch.randn(batch, (case.config.adm_in_channels or SIZE_WIDTH) - SIZE_WIDTH),
        torch.randint(0, 2048, (batch, 6)).float(),
        torch.randn(latents),
    )
    return Inputs(*(tensor.to(case.device) for tensor in tensors))


def weights(case: Case) -> dict[str, Tensor]:
    """Random weights by Stability's names; no layer is zero, as after training."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in UNet(case.config).state_dict().items()}
    generator = torch.Generator(case.device).manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator, device=case.device).mul_(0.02) for name, shape in shapes.items()
    }


def model_flops(case: Case) -> int:
    """Floating-point operations of a step by its mathematics: backward is two forwards."""
    with torch.device("meta"):
        network, batch = UNet(case.config), make_inputs(replace(case, device=torch.device("meta")))
        vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)
    return 3 * counter.get_total_flops()


@dataclass(frozen=True)
class TrainStep:
    """A network and the two halves of a step; called, it takes the whole and returns the loss."""

    network: nn.Module
    forward_backward: Callable[[], Tensor]
    update: Callable[[], None]

    def __call__(self) -> Tensor:
        loss = self.forward_backward()
        self.update()
        return loss


def update_after(
    parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer
) -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    """Backward alone, and the rest of a step: clipping the norm of all gradients, the optimizer's step."""

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        optimizer.zero_grad()

    return Tensor.backward, update


def update_within(
    network: nn.Module, groups: list[ParameterGroup], device: torch.device
) -> tuple[Callable[[Tensor], None], Callable[[], None]]:
    """Backward with clipping and step in it, by the trainer's own class, and what is left after it: the total norm."""
    parallel = FusedBackward(
        Accelerator(cpu=devices.is_cpu(device)),
        network,
        groups,
        lambda groups: make_optimizer("AdamW", groups, []),
        lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
        MAX_GRAD_NORM,
    )

    def update() -> None:
        parallel.clip(MAX_GRAD_NORM)
        parallel.zero_grad()

    return parallel.backward, update


def make_step(kind: str, case: Case) -> TrainStep:
    """Ours or diffusers' network with its optimizer, ready to train; its blocks compiled if the kind says so."""
    forward: Callable[[Inputs], Tensor]
    if kind.startswith("ours"):
        with torch.device("meta"):
            ours = UNet(case.config)
        ours.load_state_dict(weights(case), assign=True)
        network: nn.Module = ours.requires_grad_(True).to(case.device)
        ours.enable_gradient_checkpointing(case.gradient_checkpointing)
        if kind in COMPILED:
            compile_blocks(ours, str(case.dynamo_backend), "sdpa", case.dtype)
        groups = [ParameterGroup("unet", list(network.parameters()), LEARNING_RATE)]
        if kind == FUSED:
            backward, update = update_within(network, groups, case.device)
        else:
            backward, update = update_after(list(network.parameters()), make_optimizer("AdamW", groups, []))

        def forward(batch: Inputs) -> Tensor:
            vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
            return ours(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)
    else:
        from diffusers import UNet2DConditionModel

        theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(case.config))
        theirs.load_state_dict(rename(weights(case), unet_to_diffusers(case.config)))
        if case.gradient_checkpointing:
            theirs.enable_gradient_checkpointing()
        network = theirs.train().to(case.device)
        if kind in COMPILED:
            theirs.compile_repeated_blocks(backend=case.dynamo_backend)
        parameters = list(network.parameters())
        optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)
        backward, update = update_after(parameters, optimizer)

        def forward(batch: Inputs) -> Tensor:
            added = {"text_embeds": batch.pooled_BP, "time_ids": batch.sizes_B6}
            return theirs(batch.x_BCHW, batch.t_B, batch.context_BTX, added_cond_kwargs=added).sample

    batch = make_inputs(case)

    def forward_backward() -> Tensor:
        with torch.autocast(case.device.type, dtype=case.dtype, enabled=case.dtype != torch.float32):
            prediction = forward(batch)
        loss = F.mse_loss(prediction.float(), batch.target_BCHW)
        backward(loss)
        return loss.detach()

    return TrainStep(network, forward_backward, update)


# Matrix arithmetic alone

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.baddbmm.default}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _PRODUCTS.add(torch.ops.mkldnn._linear_pointwise.default)
_CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class ProductRecorder(TorchDispatchMode):
    """Counts every matrix product, convolution and attention kernel that runs, by its tensors' shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, str]] = Counter()
        self.arguments: dict[tuple[Any, str], tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS or func in _CONVOLUTIONS:
            shapes = tree_map_only(Tensor, lambda t: _Shape(tuple(t.shape), t.stride(), t.dtype), args)
            key = (func, repr(shapes))
            self.calls[key] += 1
            self.arguments[key] = shapes
        return result


def product_replay(recorder: ProductRecorder, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that runs what was recorded, on random tensors, without the biases; and the number of calls in it."""
    pool: dict[_Shape, Tensor] = {}

    def tensor(shape: _Shape) -> Tensor:
        if shape not in pool:
            length = 1 + sum((size - 1) * stride for size, stride in zip(shape.size, shape.stride, strict=True))
            pool[shape] = torch.randn(length, device=device).to(shape.dtype).as_strided(shape.size, shape.stride)
        return pool[shape]

    work: list[tuple[Any, tuple[Any, ...], int]] = []
    for key, count in recorder.calls.items():
        func, arguments = key[0], list(tree_map_only(_Shape, tensor, recorder.arguments[key]))
        if func is _ATEN.addmm.default:
            func, arguments = _ATEN.mm.default, arguments[1:3]
        elif func is _ATEN.convolution.default:
            arguments[2] = None
        elif func is _ATEN.convolution_backward.default:
            arguments[3], arguments[10] = None, [*arguments[10][:2], False]
        work.append((func, tuple(arguments), count))

    def replay() -> None:
        for func, arguments, count in work:
            for _ in range(count):
                func(*arguments)

    return replay, sum(recorder.calls.values())


# Measuring


def timed_ms(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of one run, in ms, with all that it launched on the device; and what it returned."""
    devices.synchronize(device)
    started = time.perf_counter()
    result = run()
    devices.synchronize(device)
    return (time.perf_counter() - started) * 1000, result


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartile1": low, "quartile3": high}


def parts_of_step(kind: str, case: Case) -> dict[str, Callable[[], Any]]:
    """What one process times: a step's halves by name, or the matrix arithmetic of ours."""
    if not kind.startswith("diffusers"):
        devices.keep_freed_memory(case.device)
    step = make_step("ours" if kind == "products" else kind, case)
    if kind == FUSED:
        return {f"{kind}: all but the norm": step.forward_backward, f"{kind}: norm": step.update}
    if kind != "products":
        return {f"{kind}: forward, backward": step.forward_backward, f"{kind}: clip, AdamW": step.update}
    with ProductRecorder() as recorder:
        step()
    return {"products": product_replay(recorder, case.device)[0]}


def serve(kind: str, case: Case) -> None:
    """Be one process of the measurement: a line of JSON for each line of input."""
    on_cpu = devices.is_cpu(case.device)
    if on_cpu:  # a first step of little size imports, and allocates, what is not this step's
        plain = kind if kind == FUSED else "diffusers" if kind.startswith("diffusers") else "ours"
        make_step(plain, replace(case, config=TINY, latent_hw=(8, 8), batch=1))()
    before = _resident_bytes() if on_cpu else 0
    parts = parts_of_step(kind, case)
    for line in sys.stdin:
        if line.strip() == "memory":
            answer: dict[str, Any] = {"peak": devices.peak_memory_bytes(case.device) - before}
        else:
            answer = {"ms": {}, "loss": None}
            for name, run in parts.items():
                answer["ms"][name], result = timed_ms(run, case.device)
                answer["loss"] = float(result) if isinstance(result, Tensor) else answer["loss"]
        print(json.dumps(answer), flush=True)


class Process:
    """One of the processes that take turns."""

    def __init__(self, kind: str, arguments: list[str]) -> None:
        command = [sys.executable, __file__, *arguments, f"--serve={kind}"]
        self._child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: str) -> dict[str, Any]:
        """The answer to "step" or "memory"."""
        assert self._child.stdin is not None and self._child.stdout is not None
        print(question, file=self._child.stdin, flush=True)
        return json.loads(self._child.stdout.readline())

    def close(self) -> None:
        self._child.communicate()


@dataclass
class Measured:
    """What the processes said: the loss of each first step, times in ms by part, peaks in bytes."""

    losses: dict[str, float] = field(default_factory=dict)
    times: dict[str, list[float]] = field(default_factory=dict)
    peaks: dict[str, int] = field(default_factory=dict)

    def begin(self, kind: str, process: Process) -> None:
        """The first step, which is not timed."""
        self.losses[kind] = process.ask("step")["loss"]

    def step(self, kind: str, process: Process, counts: bool = True) -> None:
        """One more."""
        parts = process.ask("step")["ms"]
        if counts:
            for name, value in (parts | {kind: sum(parts.values())}).items():
                self.times.setdefault(name, []).append(value)

    def end(self, kind: str, process: Process) -> None:
        """Ask for its memory."""
        self.peaks[kind] = process.ask("memory")["peak"]


def in_turns(arguments: list[str], kinds: Sequence[str], steps: int, warmup: int) -> Measured:
    """One step of each kind after the other, in changing order."""
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
    """All steps of a kind, then those of the next, and again in the opposite order: half of them each time."""
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
    """Both steps, their halves, and the matrix arithmetic."""
    take = one_at_a_time if apart else in_turns
    measured = take(arguments, (*case.kinds, "products"), steps, warmup)
    with torch.device("meta"):
        state = sum(parameter.numel() * parameter.element_size() for parameter in UNet(case.config).parameters()) * 4
    peaks, losses = ({kind: of[kind] for kind in case.kinds} for of in (measured.peaks, measured.losses))
    found = figures(losses, measured.times)
    return found | memory_figures(peaks, state) | speed_figures(case, found["ms"])


def memory_figures(peaks: dict[str, int], state: int) -> dict[str, Any]:
    """Peaks in bytes, each over diffusers', and ours over diffusers' without weights, gradients and moments."""
    states = {kind: state * 3 // 4 if kind == FUSED else state for kind in peaks}  # without the gradients
    return {
        "memory_bytes": {kind: {"peak": peak, "state": states[kind]} for kind, peak in peaks.items()},
        "memory_ratio": {kind: peak / peaks["diffusers"] for kind, peak in peaks.items()},
        "activation_ratio_ours_to_diffusers": (peaks["ours"] - state) / (peaks["diffusers"] - state),
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
    )


def versions(case: Case) -> dict[str, Any]:
    """What the figures depend on."""
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
            label = f"peak memory, {kind} / diffusers'"
            print(f"{label:40}{value:10.3f}")
    if "activation_ratio_ours_to_diffusers" in result:
        print(f"{'ours without the state':40}{result['activation_ratio_ours_to_diffusers']:10.3f}")
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
        "steps": options.steps,
        "one_at_a_time": options.one_at_a_time,
        **versions(case),
    }
    result |= measure(sys.argv[1:], case, options.steps, options.warmup, options.one_at_a_time)
    print_table(result)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
