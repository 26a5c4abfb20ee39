#!/usr/bin/env python
"""Facts about this machine's NPU, and its numbers against the CPU's: two parts of tools/npu_first_run.sh.

python tools/npu_checks.py versions
python tools/npu_checks.py numbers
"""

import argparse
import importlib.metadata
import os
import platform
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from library import device as devices  # noqa: E402
from library.models import attention_trial  # noqa: E402
from library.models.gelu import geglu, gelu  # noqa: E402
from library.training.engine.rounding import check_integers  # noqa: E402

PACKAGES = ("torch", "torch_npu", "torchvision", "numpy", "accelerate", "diffusers", "transformers", "fairscale")
VARIABLES = ("ASCEND_", "HCCL_", "TASK_QUEUE", "COMBINED", "PYTORCH_NPU", "PYTORCH_ALLOC", "TORCH_NPU", "INF_NAN")


def versions() -> Iterator[str]:
    """Lines about the software and the device."""
    yield f"machine: {platform.machine()}, {platform.platform()}"
    yield f"Python: {sys.version.split()[0]}, {sys.executable}"
    for name in PACKAGES:
        try:
            yield f"{name}: {importlib.metadata.version(name)}"
        except importlib.metadata.PackageNotFoundError:
            yield f"{name}: not installed"
    yield from (f"{name}={value}" for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES))
    device = devices.default_device()
    yield f"device: {devices.device_name(device)} ({device})"
    yield f"bf16: {devices.has_bf16(device)}, shows overflow: {devices.shows_overflow(device)}"
    yield f"fused optimizers: {[kind.__name__ for kind in devices.fused_optimizers(device)]}"
    yield f"loss scaler: {type(devices.grad_scaler(device)).__module__}.{type(devices.grad_scaler(device)).__name__}"


def _largest_difference(function: Callable, *tensors: torch.Tensor) -> float:
    """Between the device's result and the CPU's."""
    device = devices.default_device()
    got, want = function(*(one.to(device) for one in tensors)), function(*tensors)
    return (got.float().cpu() - want.float()).abs().max().item()


def numbers() -> Iterator[tuple[str, str | None]]:
    """Each check's name and figures, and what is wrong; None where nothing is."""
    device = devices.default_device()
    x = torch.linspace(-6, 6, 4096).view(8, 512)
    for name, function in (("gelu", gelu), ("geglu", lambda inner: geglu(inner)[0])):
        apart = _largest_difference(function, x)
        wrong = None if apart < 1e-4 else "this is the tanh form, or neither: published weights want the erf form"
        yield f"{name} against the CPU's erf form: {apart:.2g} apart at most", wrong
    apart = _largest_difference(torch.nn.functional.gelu, x)
    yield f"torch's own gelu against the CPU's: {apart:.2g} apart (about 5e-4 is the tanh form; it is not used)", None
    for backend, dtype, head_size, backward in (
        ("npu", torch.float16, 64, True),
        ("npu", torch.bfloat16, 64, True),
        ("sdpa", torch.float16, 64, True),
        ("sdpa", torch.float32, 64, True),
        ("sdpa", torch.float32, 512, False),
    ):
        if dtype == torch.bfloat16 and not devices.has_bf16(device):
            continue
        wrong = attention_trial.failure(backend, device, dtype, head_size, backward)
        yield f"attention by {backend}, {dtype}, heads of {head_size}, against the formula", wrong
    try:
        check_integers(device)
        wrong = None
    except (RuntimeError, ValueError) as error:
        wrong = str(error)
    yield "32-bit integers, on which --full_bf16 rests", wrong


def main(argv: list[str] | None = None) -> int:
    """Print one of the parts; 1 if something is wrong."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("versions", "numbers"))
    if parser.parse_args(argv).part == "versions":
        print("\n".join(versions()))
        return 0
    found = list(numbers())
    for what, wrong in found:
        print(f"{'right' if wrong is None else 'WRONG'}: {what}{'' if wrong is None else f': {wrong}'}")
    return int(any(wrong is not None for _, wrong in found))


if __name__ == "__main__":
    sys.exit(main())
