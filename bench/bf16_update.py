"""What an AdamW update of bf16 weights costs, holds and achieves, beside torch's own on fp32 and on bf16 weights.

    OMP_NUM_THREADS=1 python bench/bf16_update.py

Cost: a matrix of SDXL's largest linear layer and 200 vectors are updated, all ways in turn, `--rounds` times; the
median, with the quartiles, in ms for a million parameters. Memory: bytes for a parameter of weight, gradient and state,
and MB that a step takes besides. Achievement: weights as small as a U-Net's (deviation 0.03) are pushed by gradients
with noise for `--steps` steps; how far they come on the way of fp32 weights (1 is all of it), and how far from them
they are then, as a share of that way. The last line printed is one JSON object.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library import device as devices
from library.options.precision import BF16_UPDATES
from library.training.engine.bf16_update import Bf16Update
from library.training.engine.optimizers import ParameterGroup, make_optimizer
from library.training.memory.live_bytes import LiveBytes

PEERS = {"torch AdamW, fp32": torch.float32, "torch AdamW, bf16": torch.bfloat16}
WAYS = [*PEERS, *BF16_UPDATES]
RATES = (1e-4, 1e-5, 1e-6)


def made(way: str, values: list[torch.Tensor], rate: float) -> tuple[list[nn.Parameter], torch.optim.Optimizer]:
    """Parameters of the given values and their AdamW; the values are exact in bf16, so that all ways start alike."""
    parameters = [nn.Parameter(value.to(PEERS.get(way, torch.bfloat16), copy=True)) for value in values]
    bf16 = None if way in PEERS else Bf16Update(way, 0)
    return parameters, make_optimizer("AdamW", [ParameterGroup("unet", parameters, rate)], [], bf16=bf16)


def costs(device: torch.device, rows: int, rounds: int) -> dict[str, dict[str, float]]:
    """Time and memory of an update, by way."""
    values = [torch.randn(rows, 1280, device=device) * 0.03, *(torch.ones(1280, device=device) for _ in range(200))]
    millions = sum(value.numel() for value in values) / 1e6
    runs, found = {}, {}
    for way in WAYS:
        parameters, optimizer = runs[way] = made(way, [value.bfloat16() for value in values], 1e-5)
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer.step()
        states = [value for state in optimizer.state.values() for value in state.values() if torch.is_tensor(value)]
        held = [*parameters, *(parameter.grad for parameter in parameters), *states]
        with LiveBytes() as live:
            optimizer.step()
        found[way] = {
            "bytes_a_parameter": sum(one.numel() * one.element_size() for one in held) / millions / 1e6,
            "besides_mb": live.peak / 1e6,
        }
    times: dict[str, list[float]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way, (_, optimizer) in runs.items():
            devices.synchronize(device)
            began = time.perf_counter()
            optimizer.step()
            devices.synchronize(device)
            times[way].append((time.perf_counter() - began) * 1e3 / millions)
    for way, measured in times.items():
        low, median, high = statistics.quantiles(measured, n=4)
        found[way] |= {"ms_a_million": median, "quartiles": [low, high]}
    return found


def achieved(device: torch.device, rate: float, steps: int) -> dict[str, tuple[float, float]]:
    """The share of fp32's way that each way achieves, and its distance from fp32's end."""
    random = torch.Generator(device).manual_seed(0)
    start = (torch.randn(200_000, device=device, generator=random) * 0.03).bfloat16()
    pull = torch.randn(200_000, device=device, generator=random)
    runs = {way: made(way, [start], rate) for way in WAYS}
    for _ in range(steps):
        gradient = pull + torch.randn(200_000, device=device, generator=random)
        for (parameter,), optimizer in runs.values():
            parameter.grad = gradient.to(parameter.dtype)
            optimizer.step()
    ends = {way: parameters[0].detach().double() for way, (parameters, _) in runs.items()}
    reference = ends[WAYS[0]]
    gone = reference - start.double()
    return {
        way: (float((end - start.double()) @ gone / (gone @ gone)), float((end - reference).norm() / gone.norm()))
        for way, end in ends.items()
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=10240, help="of the matrix of 1280 columns (%(default)s)")
    parser.add_argument("--rounds", type=int, default=9, help="(%(default)s)")
    parser.add_argument("--steps", type=int, default=500, help="(%(default)s)")
    options = parser.parse_args()
    device = devices.default_device()
    found = costs(device, options.rows, options.rounds)
    ends = {rate: achieved(device, rate, options.steps) for rate in RATES}
    columns = [f"way, distance at lr {rate:g}" for rate in RATES]
    print(f"| update | ms a million | quartiles | bytes a parameter | MB besides | {' | '.join(columns)} |")
    print("| --- " * (5 + len(RATES)) + "|")
    for way, one in found.items():
        low, high = one["quartiles"]
        reached = " | ".join("{:.3f}, {:.3f}".format(*ends[rate][way]) for rate in RATES)
        print(
            f"| {way} | {one['ms_a_million']:.2f} | {low:.2f}–{high:.2f} | {one['bytes_a_parameter']:.2f} | "
            f"{one['besides_mb']:.0f} | {reached} |"
        )
    record = {"bench": "bf16_update", "torch": torch.__version__, "device": devices.device_name(device)}
    print(json.dumps({**record, "costs": found, "achieved": {f"{rate:g}": end for rate, end in ends.items()}}))


if __name__ == "__main__":
    main()
