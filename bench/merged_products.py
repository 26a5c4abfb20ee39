"""One product for layers that share their input, against one each, on the CPU in fp32: keys and values, and QKV.

    OMP_NUM_THREADS=1 python bench/merged_products.py

Keys and values of all cross-attention layers of SDXL's U-Net have the text's states as their input; queries, keys and
values of a self-attention layer the norm's output. Both ways take turns in one process, each with the calls that the
trainer makes (library/models/cpu_kernels.py): output, the input's gradient, the weights' gradient. Merged, the layers'
gradients must first be gathered. The merged gradient of the weights is timed in new memory, as the trainer would have
it, and in memory that is kept (the sum has the former). Beside them the share that these products have of a step's
FLOPs, which is the most that merging could gain. The last line printed is one JSON object.
"""

import argparse
import json
import platform
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import timing
import unet_steps

from library import device as devices
from library.models import cpu_kernels as products
from library.models.unet import Attention, UNet, UNetConfig

RESOLUTIONS_PX = (512, 1024)
IN_SUM = ("output", "gathering", "to input", "to weights")  # parts of a way's sum


@dataclass(frozen=True)
class Layers:
    """Linear layers of one input: x (M, K); weights (N, K), the layers' one below the other; a gradient (M, n) each."""

    x_MK: Tensor
    weight_NK: Tensor
    grads: tuple[Tensor, ...]

    @property
    def weights(self) -> tuple[Tensor, ...]:
        """Each layer's rows, without a copy."""
        return self.weight_NK.split([grad.shape[1] for grad in self.grads])


def make_layers(tokens: int, width: int, outs: Sequence[int]) -> Layers:
    """Layers with random weights; `outs` are their output widths."""
    weight_NK = torch.randn(sum(outs), width).mul_(0.02)
    return Layers(torch.randn(tokens, width), weight_NK, tuple(torch.randn(tokens, out) for out in outs))


def separate(layers: Layers) -> dict[str, Callable[[], Any]]:
    """The parts of a step as the trainer computes them, with a product for each layer."""
    weights = layers.weights

    def to_input() -> Tensor:
        first, *others = zip(layers.grads, weights, strict=True)
        total_MK = products.linear_input_gradient(*first)
        for grad, weight in others:
            total_MK += products.linear_input_gradient(grad, weight)
        return total_MK

    return {
        "output": lambda: [products.linear(layers.x_MK, weight) for weight in weights],
        "to input": to_input,
        "to weights": lambda: [products.linear_weight_gradient(grad, layers.x_MK) for grad in layers.grads],
    }


def merged(layers: Layers) -> dict[str, Callable[[], Any]]:
    """The same parts in one product."""
    grad_MN, kept_NK = torch.cat(layers.grads, dim=1), torch.zeros_like(layers.weight_NK)
    return {
        "output": lambda: products.linear(layers.x_MK, layers.weight_NK),
        "gathering": lambda: torch.cat(layers.grads, dim=1),
        "to input": lambda: products.linear_input_gradient(grad_MN, layers.weight_NK),
        "to weights": lambda: products.linear_weight_gradient(grad_MN, layers.x_MK),
        "to weights, kept memory": lambda: torch.mm(grad_MN.t(), layers.x_MK, out=kept_NK),
    }


def measure(layers: Layers, rounds: int) -> dict[str, dict[str, Any]]:
    """Median and quartiles in ms of each part and of the sum, by way; and of the ratios of neighbours."""
    ways = {"separate": separate(layers), "merged": merged(layers)}
    times: dict[str, dict[str, list[float]]] = {way: {part: [] for part in parts} for way, parts in ways.items()}
    for index in range(rounds + 1):  # the first warms up
        for part in ways["merged"]:
            for way in list(ways)[:: 1 if index % 2 else -1]:
                if part in ways[way]:
                    started = time.perf_counter()
                    result = ways[way][part]()
                    times[way][part].append((time.perf_counter() - started) * 1000)
                    del result
    for parts in times.values():
        parts["sum"] = [sum(one) for one in zip(*(parts[part] for part in IN_SUM if part in parts), strict=True)]
    found: dict[str, dict[str, Any]] = {
        way: {part: timing.spread(values[1:]) for part, values in parts.items()} for way, parts in times.items()
    }
    found["merged / separate"] = {
        part: timing.spread([one / each for one, each in zip(times["merged"][part][1:], values[1:], strict=True)])
        for part, values in times["separate"].items()
    }
    return found


def attention_layers(config: UNetConfig) -> tuple[list[Attention], list[Attention]]:
    """SDXL's self- and cross-attention layers on the meta device."""
    with torch.device("meta"):
        layers = [module for module in UNet(config).modules() if isinstance(module, Attention)]
    of_text = [layer.to_k.in_features != layer.to_q.in_features for layer in layers]
    both = list(zip(layers, of_text, strict=True))
    return [layer for layer, text in both if not text], [layer for layer, text in both if text]


def shares(px: int) -> dict[str, float]:
    """The products' share of a step's FLOPs of SDXL at a square resolution, with trained text encoders."""
    config = UNetConfig()
    own, of_text = attention_layers(config)
    side = px // 8
    pixels = {config.model_channels * 2**level: (side // 2**level) ** 2 for level in range(len(config.channel_mult))}
    keys_and_values = sum(2 * 2 * unet_steps.TEXT_TOKENS * layer.to_k.weight.numel() for layer in of_text)
    qkv = sum(3 * 2 * pixels[layer.to_q.in_features] * layer.to_q.weight.numel() for layer in own)
    case = unet_steps.Case(config, (side, side), 1, torch.float32, torch.device("meta"), False)
    step = unet_steps.model_flops(case)
    return {"keys and values": 3 * keys_and_values / step, "QKV": 3 * qkv / step, "step_tflop": step / 1e12}


def cases() -> dict[str, tuple[int, int, list[int]]]:
    """Tokens, input width and output widths of SDXL's layers, by name."""
    config = UNetConfig()
    of_text = attention_layers(config)[1]
    outs = [out for layer in of_text for out in (layer.to_k.out_features, layer.to_v.out_features)]
    found = {}
    for px in RESOLUTIONS_PX:
        for level in (1, 2):  # those with transformer layers
            width, tokens = config.model_channels * 2**level, (px // 8 // 2**level) ** 2
            found[f"QKV of a layer, {width} channels, {px} px"] = (tokens, width, [width] * 3)
    # One image: the fewer the tokens, the more one product could gain.
    found[f"keys and values of {len(of_text)} layers"] = (unet_steps.TEXT_TOKENS, config.context_dim, outs)
    return found


def show(name: str, found: dict[str, dict[str, Any]]) -> None:
    """Print a table row for each way and part."""
    for way, parts in found.items():
        for part, one in parts.items():
            spread = f"{one['median']:10.3f} ({one['quartile1']:.3f}–{one['quartile3']:.3f})"
            print(f"{name:42}{way:20}{part:26}{spread}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="times that each way is taken, at least 2")
    rounds = parser.parse_args().rounds
    devices.keep_freed_memory(torch.device("cpu"))
    torch.manual_seed(0)
    found: dict[str, Any] = {"bench": "merged_products", "torch": torch.__version__, "machine": platform.machine()}
    found |= {"threads": torch.get_num_threads(), "intel": devices.cpu_is_intels(), "ms": {}}
    found["share_of_step"] = {str(px): shares(px) for px in RESOLUTIONS_PX}
    for px, share in found["share_of_step"].items():
        print(f"{px} px:", *(f"{name} {value:.4f}" for name, value in share.items()))
    for name, shape in cases().items():
        found["ms"][name] = measure(make_layers(*shape), rounds)
        show(name, found["ms"][name])
    print(json.dumps(found))


if __name__ == "__main__":
    with torch.no_grad():
        main()
