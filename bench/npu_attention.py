"""Fused attention against the plain one over all shapes of SDXL's buckets, forward and backward, interleaved.

    python bench/npu_attention.py                                  # on an Ascend NPU: npu against sdpa
    python bench/npu_attention.py --device cuda --dtype bf16       # elsewhere: sdpa against math

Shapes: the self-attention of both transformer levels at every bucket's size, and their cross-attention to 77, 152 and
227 text tokens. On the NPU this is what --enable_npu_flash_attention changes (library/models/attention.py, `npu` in
place of `sdpa`); a shape whose ratio is over 1 loses by it. `difference` is the largest relative difference between the
two in the output and the three gradients. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import device as devices
from library.data.order.buckets import bucket_list
from library.models.attention import BACKENDS
from library.models.unet import UNetConfig
from library.options.buckets import BucketOptions

DTYPES = {"fp16": torch.float16, "bf16": torch.bfloat16, "fp32": torch.float32}
TEXT_TOKENS = (77, 152, 227)
LATENT_PX = 8


@dataclass(frozen=True, order=True)
class Shape:
    """The shape of an attention: query and key tokens, heads, head size."""

    queries: int
    keys: int
    heads: int
    head_size: int

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys} ({self.heads}x{self.head_size})"


def shapes(resolution_px: int, config: UNetConfig, text_tokens: Sequence[int] = TEXT_TOKENS) -> list[Shape]:
    """The attention shapes of the U-Net in the buckets of a square resolution.

    Sides go from its half to its double in sixteenths of it, as the launchers have them at 1024. A level has half the
    rows and columns, rounded up, of that above.
    """
    step = max(LATENT_PX, resolution_px // 16)
    options = BucketOptions((resolution_px, resolution_px), True, resolution_px // 2, 2 * resolution_px, step)
    found = set()
    for width_px, height_px in bucket_list(options).tolist():
        columns, rows = width_px // LATENT_PX, height_px // LATENT_PX
        for level, channels in enumerate(config.level_channels):
            if level:
                columns, rows = -(-columns // 2), -(-rows // 2)
            if config.transformer_depth[level]:
                heads, tokens = config.heads(channels), columns * rows
                found |= {Shape(tokens, keys, heads, channels // heads) for keys in (tokens, *text_tokens)}
    return sorted(found)


def backends(device: torch.device) -> tuple[str, str]:
    """The measured backend and the backend with which it is compared."""
    return ("npu", "sdpa") if devices.is_npu(device) else ("sdpa", "math")


@dataclass(frozen=True)
class Measured:
    """Median times in ms of forward and backward together, median ratio, and how far the results differ."""

    shape: Shape
    ms: dict[str, float]
    ratio: float
    difference: float


def measure(
    shape: Shape, pair: tuple[str, str], batch: int, dtype: torch.dtype, device: torch.device, steps: int
) -> Measured:
    """Time both backends in turns, in changing order, on the same tensors; the first turn is not counted."""
    torch.manual_seed(0)
    lengths = (shape.queries, shape.keys, shape.keys)
    sizes = [(batch, length, shape.heads, shape.head_size) for length in lengths]
    inputs = [torch.randn(size).to(device, dtype).requires_grad_() for size in sizes]
    above = torch.randn(sizes[0]).to(device, dtype)

    def run(backend: str) -> list[Tensor]:
        out = BACKENDS[backend].run(*inputs)
        return [out.detach(), *torch.autograd.grad(out, inputs, above)]

    times: dict[str, list[float]] = {backend: [] for backend in pair}
    results: dict[str, list[Tensor]] = {}
    for turn in range(steps + 1):
        for backend in pair[:: 1 if turn % 2 else -1]:
            devices.synchronize(device)
            started = time.perf_counter()
            results[backend] = run(backend)
            devices.synchronize(device)
            if turn:
                times[backend].append((time.perf_counter() - started) * 1000)
    differences = [
        float((one.float() - other.float()).norm() / other.float().norm())
        for one, other in zip(*(results[backend] for backend in pair), strict=True)
    ]
    ratios = [one / other for one, other in zip(*(times[backend] for backend in pair), strict=True)]
    medians = {backend: statistics.median(values) for backend, values in times.items()}
    return Measured(shape, medians, statistics.median(ratios), max(differences))


def print_table(measured: Sequence[Measured], pair: tuple[str, str]) -> None:
    names = [f"{backend}, ms" for backend in pair]
    print(f"{'query x key (heads x size)':30}{names[0]:>12}{names[1]:>12}{'ratio':>8}{'difference':>12}")
    for result in measured:
        times = "".join(f"{result.ms[backend]:12.3f}" for backend in pair)
        mark = "  loses" if result.ratio > 1 else ""
        print(f"{result.shape!s:30}{times}{result.ratio:8.2f}{result.difference:12.1e}{mark}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=1024, help="of the buckets, in px")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--dtype", choices=DTYPES, default="fp16")
    parser.add_argument("--device", help="default is what the trainer would take")
    parser.add_argument("--steps", type=int, default=10, help="measured turns of each shape")
    parser.add_argument("--every", type=int, default=1, help="only each n-th number of query tokens")
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    options = build_parser().parse_args(argv)
    device = torch.device(options.device) if options.device else devices.default_device()
    pair, dtype = backends(device), DTYPES[options.dtype]
    probe = torch.zeros(1, 1, 1, 64, device=device, dtype=dtype)
    refusal = BACKENDS[pair[0]].refusal(probe, probe, probe)
    if refusal is not None:
        sys.exit(f"attention backend {pair[0]}: {refusal}")
    found = shapes(options.resolution, UNetConfig())
    chosen = set(sorted({shape.queries for shape in found})[:: options.every])
    measured = [
        measure(shape, pair, options.batch, dtype, device, options.steps) for shape in found if shape.queries in chosen
    ]
    print_table(measured, pair)
    result: dict[str, Any] = {
        "bench": "npu_attention",
        "measured": pair[0],
        "against": pair[1],
        "device": devices.device_name(device),
        "torch": torch.__version__,
        "dtype": options.dtype,
        "batch": options.batch,
        "resolution": options.resolution,
        "steps": options.steps,
        "shapes": len(measured),
        "median_ratio": statistics.median(result.ratio for result in measured),
        "largest_difference": max(result.difference for result in measured),
        "loses": {str(result.shape): round(result.ratio, 3) for result in measured if result.ratio > 1},
        "ms": {str(result.shape): {name: round(value, 4) for name, value in result.ms.items()} for result in measured},
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
