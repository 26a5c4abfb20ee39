"""Kernels of a training step on the CPU in fp32, one shape at a time, the choices beside each other in one run.

    OMP_NUM_THREADS=1 python bench/products.py

For 3×3 convolutions: oneDNN's operator against a matrix product over the unfolded pixels, for output, input's gradient
and weights' gradient; and oneDNN asked for the input's gradient alone, and with the bias's. For linear layers: MKL
against oneDNN. The choices take turns; of each the least of the rounds is taken, as other work on the machine can only
add to it. The last line printed is one JSON object. `library/models/cpu_kernels.py` chooses by these figures.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import device as devices
from library.models import cpu_kernels as products

# batch, channels in, channels out, rows, columns: of the middle width of bench/train_step.py, and of SDXL
CONVOLUTIONS = (
    (2, 512, 512, 4, 6),
    (2, 1024, 512, 4, 6),
    (2, 512, 512, 8, 12),
    (1, 640, 640, 16, 16),
    (1, 1280, 1280, 8, 8),
    (1, 1280, 1280, 16, 16),
    (1, 2560, 1280, 16, 16),
    (1, 1280, 1280, 32, 32),
)
# tokens, width in, width out
LINEARS = ((48, 512, 4096), (192, 256, 2048), (256, 1280, 1280), (256, 1280, 10240), (77, 2048, 1280))


def least_ms(choices: dict[str, Callable[[], Any]], rounds: int) -> dict[str, float]:
    """The least time of each choice in ms, over rounds in changing order."""
    times: dict[str, list[float]] = {name: [] for name in choices}
    for index in range(rounds + 1):
        for name in list(choices)[:: 1 if index % 2 else -1]:
            started = time.perf_counter()
            choices[name]()
            times[name].append((time.perf_counter() - started) * 1000)
    return {name: round(min(values[1:]), 3) for name, values in times.items()}


def convolution(shape: tuple[int, int, int, int, int], rounds: int) -> dict[str, float]:
    """Times of one convolution's kernels."""
    batch, channels, out, rows, columns = shape
    x, weight = torch.randn(batch, channels, rows, columns), torch.randn(out, channels, 3, 3)
    grad, bias = torch.randn(batch, out, rows, columns), torch.randn(out)
    grad_OP = grad.transpose(0, 1).flatten(1)

    def onednn(*wanted: bool) -> Any:
        return products._convolution_backward(grad, x, weight, wanted)

    return least_ms(
        {
            "output": lambda: F.conv2d(x, weight, bias, padding=1),
            "output by product": lambda: weight.flatten(1) @ products._unfolded(x),
            "to input": lambda: onednn(True, False, False),
            "to input by product": lambda: products._folded(weight.flatten(1).t() @ grad_OP, x.shape),
            "to input and bias": lambda: onednn(True, False, True),
            "to weights": lambda: onednn(False, True, False),
            "to weights by product": lambda: grad_OP @ products._unfolded(x).t(),
        },
        rounds,
    )


def linear(shape: tuple[int, int, int], rounds: int) -> dict[str, float]:
    """Times of one linear layer's kernels."""
    tokens, width, out = shape
    x, weight, bias, grad = (torch.randn(*size) for size in ((tokens, width), (out, width), (out,), (tokens, out)))
    onednn = torch.ops.mkldnn._linear_pointwise
    return least_ms(
        {
            "output": lambda: F.linear(x, weight, bias),
            "output by oneDNN": lambda: onednn(x, weight, bias, "none", [], ""),
            "to input": lambda: grad @ weight,
            "to input by oneDNN": lambda: onednn(grad, weight.t(), None, "none", [], ""),
        },
        rounds,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each choice is taken")
    rounds = parser.parse_args().rounds
    devices.keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    found: dict[str, Any] = {"bench": "products", "torch": torch.__version__, "machine": platform.machine()}
    found |= {"threads": torch.get_num_threads(), "intel": devices.cpu_is_intels(), "ms": {}}
    for shapes, measure in ((CONVOLUTIONS, convolution), (LINEARS, linear)):
        for shape in shapes:
            name = f"{measure.__name__} {'x'.join(map(str, shape))}"
            found["ms"][name] = measure(shape, rounds)  # type: ignore[operator]
            print(name, *(f"{what}: {ms:.2f}" for what, ms in found["ms"][name].items()), sep="  ")
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
