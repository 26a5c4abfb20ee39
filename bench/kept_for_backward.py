"""What our U-Net and diffusers' keep of a forward pass for its backward, counted to the byte.

    python bench/kept_for_backward.py

The networks run on torch's meta device, where no operator computes, with fused attention, in fp32 and without gradient
checkpointing. Each storage that autograd saves counts once; weights do not. A real step's peak is more: what an
operator needs for a moment, gradients, what an allocator cannot fill. The last line printed is one JSON object.
"""

import json
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from unet_steps import KINDS, MIDDLE, SMALL, Case, make_inputs, make_network

from library.models.unet import UNetConfig
from library.training.memory.meta_run import fused_attention

META = torch.device("meta")
CASES = {
    "small, 16×16, batch 8": (SMALL, (16, 16), 8),
    "middle, 16×24, batch 2": (MIDDLE, (16, 24), 2),
    "middle, 32×32, batch 8": (MIDDLE, (32, 32), 8),
    "SDXL, 64×64, batch 1": (UNetConfig(), (64, 64), 1),
    "SDXL, 128×128, batch 1": (UNetConfig(), (128, 128), 1),
}


def kept_bytes(kind: str, config: UNetConfig, latent_hw: tuple[int, int], batch: int) -> int:
    """Bytes of all storages that the network saves for backward."""
    case = Case(config, latent_hw, batch, torch.float32, META, gradient_checkpointing=False)
    network, predict = make_network(kind, case)
    weights = {parameter.untyped_storage()._cdata for parameter in network.parameters()}
    kept: dict[int, Tensor] = {}  # alive, so that no other storage comes to lie where one was

    def save(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()._cdata
        if storage not in weights:
            kept.setdefault(storage, tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor), fused_attention():
        prediction = predict(make_inputs(case))
    del prediction
    return sum(tensor.untyped_storage().nbytes() for tensor in kept.values())


def main() -> None:
    found: dict[str, Any] = {}
    print("| MiB | ours | diffusers' | ours / diffusers' |\n| --- | --- | --- | --- |")
    for name, case in CASES.items():
        ours, theirs = (kept_bytes(kind, *case) for kind in KINDS)
        found[name] = {"ours": ours, "diffusers": theirs, "ratio": ours / theirs}
        print(f"| {name} | {ours / 2**20:.0f} | {theirs / 2**20:.0f} | {ours / theirs:.2f} |", flush=True)
    print(json.dumps({"bench": "kept_for_backward", "bytes": found}))


if __name__ == "__main__":
    main()
