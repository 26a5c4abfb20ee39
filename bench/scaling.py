"""What SDXL's training moves, holds and computes on many devices, by formula: the tables of docs/scaling.md.

    python bench/scaling.py                          # prints the tables and one JSON line
    python bench/scaling.py --write docs/scaling.md  # puts them between that document's markers

Bytes of a step follow from the parameters' sizes and from how each wrapper cuts them into collectives;
bench/collectives.py counts the same on real processes. FLOPs are torch's counter's over the trainer's own modules on
the meta device. Links and peaks are assumptions, with their sources in docs/scaling.md.
"""

import argparse
import json
import math
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from library.families import SDXL
from library.models.denoiser import Denoiser
from library.models.model import Model
from library.models.text import Tokens
from library.models.unet import UNet
from library.models.vae import encode_images
from third_patch.accelerate_patch.accelerator import ALL_BUCKETS_ELEMENTS, BUCKET_ELEMENTS

MIB, GIB = 2**20, 2**30
FP32 = 4  # bytes; weights, gradients and AdamW's two moments are fp32 in every precision (autocast)
DDP_FIRST_BUCKET, DDP_BUCKET = MIB, 25 * MIB  # torch's defaults
PER_NODE = 8
DEVICES = (8, 64, 512)
METHODS = {"ddp": "DDP", "oss": "OSS + ShardedDDP", "zero1": "ZeroRedundancyOptimizer + DDP", "fsdp": "FSDP2"}


# Collectives of one step


@dataclass(frozen=True)
class Collective:
    """One call: its kind and the bytes of the whole tensor, gathered or to be scattered."""

    kind: str
    bytes: int

    @property
    def passes(self) -> int:
        """How often a byte must travel to or from the others: an all-reduce is a reduce-scatter and an all-gather."""
        return 2 if self.kind == "all_reduce" else 1

    @property
    def has_root(self) -> bool:
        """One rank receives or sends it all."""
        return self.kind in ("reduce", "broadcast")

    def sent(self, devices: int) -> float:
        """Bytes that a rank sends, on average over the ranks, by an algorithm that sends no byte twice."""
        return self.passes * self.bytes * (devices - 1) / devices


@dataclass(frozen=True)
class Trained:
    """Elements of each trained parameter, in order, and of each group that FSDP2 gathers at once, the root's last."""

    numels: tuple[int, ...]
    groups: tuple[int, ...]

    @property
    def total(self) -> int:
        """Number of trained elements."""
        return sum(self.numels)


def fsdp_units(module: Any) -> list[nn.Module]:
    """The modules that the trainer shards, gathers and frees as units; for a U-Net alone, its units."""
    if isinstance(module, UNet):
        return [*module.input_blocks, module.middle_block, *module.output_blocks]
    return module.sharding_units()


def trained_sizes(module: nn.Module) -> Trained:
    """Elements of a module's trained parameters and of its FSDP2 units."""
    units = [[parameter for parameter in unit.parameters() if parameter.requires_grad] for unit in fsdp_units(module)]
    groups = [sum(parameter.numel() for parameter in unit) for unit in units if unit]
    numels = [parameter.numel() for parameter in module.parameters() if parameter.requires_grad]
    return Trained(tuple(numels), (*groups, sum(numels) - sum(groups)))


def shards(numels: Sequence[int], devices: int) -> list[list[int]]:
    """Assign each whole parameter to the rank with the fewest elements so far, as both sharded optimizers do."""
    parts: list[list[int]] = [[] for _ in range(devices)]
    sizes = [0] * devices
    for numel in numels:
        rank = sizes.index(min(sizes))
        parts[rank].append(numel)
        sizes[rank] += numel
    return parts


def optimizer_shards(method: str, trained: Trained, devices: int) -> list[int]:
    """Elements whose optimizer state each rank holds."""
    if method == "ddp":
        return [trained.total] * devices
    if method == "fsdp":
        return [math.ceil(trained.total / devices)] * devices
    numels = trained.numels if method == "oss" else sorted(trained.numels, reverse=True)
    return [sum(part) for part in shards(numels, devices)]


def _ddp(numels: Sequence[int]) -> list[Collective]:
    buckets, limit, filled = [], DDP_FIRST_BUCKET, 0
    for numel in reversed(numels):  # gradients are ready from the last layer on
        filled += numel * FP32
        if filled >= limit:
            buckets.append(filled)
            limit, filled = DDP_BUCKET, 0
    return [Collective("all_reduce", size) for size in (*buckets, filled) if size]


def oss_reduces(numels: Sequence[int], trained: Trained, devices: int) -> tuple[int, list[int]]:
    """Elements of one rank's bucket, as many small gradients as fit, smallest first, and of those reduced alone."""
    limit = min(BUCKET_ELEMENTS, ALL_BUCKETS_ELEMENTS // devices, trained.total)
    bucket, alone = 0, []
    for numel in sorted(numels):
        if bucket + numel < limit:
            bucket += numel
        else:
            alone.append(numel)
    return bucket, alone


def _oss(trained: Trained, devices: int) -> list[Collective]:
    calls, parts = [], [part for part in shards(trained.numels, devices) if part]
    for part in parts:
        bucket, alone = oss_reduces(part, trained, devices)
        calls += [Collective("reduce", numel * FP32) for numel in (bucket, *alone) if numel]
    return calls + [Collective("broadcast", sum(part) * FP32) for part in parts]


def collectives(method: str, trained: Trained, devices: int, gathered_bytes: int = FP32) -> list[Collective]:
    """The collectives of a step without accumulation, except of scalars (gradient norm, overflow).

    Args:
        gathered_bytes: bytes of an element that FSDP2 gathers, 2 if its mixed precision is fp16 or bf16.
    """
    if method == "ddp":
        return _ddp(trained.numels)
    if method == "oss":
        return _oss(trained, devices)
    if method == "zero1":
        owned = optimizer_shards(method, trained, devices)
        return _ddp(trained.numels) + [Collective("broadcast", size * FP32) for size in owned if size]
    *groups, root = trained.groups
    gathered = [*groups, *groups, root]  # in forward and again in backward; the root's stay gathered in between
    calls = [Collective("all_gather", size * gathered_bytes) for size in gathered if size]
    return calls + [Collective("reduce_scatter", size * FP32) for size in trained.groups if size]


def sent(calls: Sequence[Collective], devices: int) -> float:
    """Bytes that a rank sends in a step."""
    return sum(call.sent(devices) for call in calls)


# Time


@dataclass(frozen=True)
class Links:
    """Assumed bandwidths of a device in one direction, in GB/s, and latency of a message, in microseconds."""

    name: str
    inside: float
    between: float
    latency_inside: float = 5.0
    latency_between: float = 15.0


LINKS = (Links("Ascend 910B", 196, 25), Links("A100", 300, 25))


@dataclass(frozen=True)
class Seconds:
    """Lower bounds of a step's communication, if nothing is hidden behind computing."""

    bandwidth: float  # all NICs of a node at work at once
    one_root: float  # the same, where a reduce or broadcast between nodes leaves by its root's NIC alone
    latency: float  # trees: as many messages one after the other as the logarithm says

    @property
    def bound(self) -> str:
        """The larger of the two bounds: bandwidth or latency."""
        return "latency" if self.latency > self.bandwidth else "bandwidth"


def seconds(calls: Sequence[Collective], devices: int, links: Links) -> Seconds:
    """Lower bounds of a hierarchical collective: inside nodes, each device's part between nodes, inside nodes."""
    local = min(devices, PER_NODE)
    nodes = devices // local
    inside = between = between_one_root = hops = 0.0
    for call in calls:
        volume = call.passes * call.bytes
        inside += volume * (local - 1) / local
        share = volume * (nodes - 1) / nodes
        between += share / local
        between_one_root += share if call.has_root else share / local
        trees = math.ceil(math.log2(local)) * links.latency_inside + math.ceil(math.log2(nodes)) * links.latency_between
        hops += call.passes * trees
    fixed = inside / (links.inside * 1e9)
    return Seconds(
        fixed + between / (links.between * 1e9), fixed + between_one_root / (links.between * 1e9), hops * 1e-6
    )


# Memory


def state_bytes(method: str, trained: Trained, devices: int) -> dict[str, int]:
    """Bytes of fp32 weights, gradients and AdamW's moments at the update, on the rank that holds the most.

    OSS keeps the buckets of all ranks; a gradient that is reduced alone stays with its owner only.
    """
    gradients = weights = trained.total
    if method == "fsdp":
        gradients = weights = math.ceil(trained.total / devices)
    elif method == "oss":
        reduces = [oss_reduces(part, trained, devices) for part in shards(trained.numels, devices)]
        gradients = sum(bucket for bucket, _ in reduces) + max(sum(alone) for _, alone in reduces)
    moments = 2 * max(optimizer_shards(method, trained, devices))
    return {"weights": FP32 * weights, "gradients": FP32 * gradients, "moments": FP32 * moments}


# FLOPs


def sdxl() -> Model:
    """SDXL's networks at full size on the meta device."""
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def text(width: int, layers: int, activation: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=width // 64,
            projection_dim=1280, hidden_act=activation,
        )  # fmt: skip

    with torch.device("meta"):
        vae = AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
            block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        )  # fmt: skip
        encoders = CLIPTextModel(text(768, 12, "quick_gelu")), CLIPTextModelWithProjection(text(1280, 32, "gelu"))
        # No tokenizers: token ids are made here.
        return Model(SDXL, UNet(), vae, encoders, (), dict(SDXL.scheduler))


def flops(run: Callable[[], Any]) -> int:
    """FLOPs of matrix products, convolutions and attention: 2 for each multiplication with addition."""
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops()


@dataclass(frozen=True)
class StepFlops:
    """FLOPs of an image at a square resolution: `model` is the mathematics, `run` includes recomputation."""

    unet_forward: int
    text_forward: int
    vae_encoding: int
    model: int
    run: int


def step_flops(model: Model, resolution_px: int = 1024) -> StepFlops:
    """FLOPs of the trainer's modules with both text encoders trained, for an image and 77 text tokens."""
    side = resolution_px // 8
    with torch.device("meta"):
        noisy_BCHW, t_B, sizes_B6 = torch.empty(1, 4, side, side), torch.empty(1), torch.empty(1, 6)
        ids_BK77 = torch.zeros(1, 1, 77, dtype=torch.long)
        image_BHWC = torch.empty(1, resolution_px, resolution_px, 3, dtype=torch.uint8)
    plain = Denoiser(model, (True, True), gradient_checkpointing=False)

    def predict(module: nn.Module) -> Tensor:
        return module(noisy_BCHW, t_B, Tokens((ids_BK77, ids_BK77)), sizes_B6)

    text = flops(lambda: plain.conditions(Tokens((ids_BK77, ids_BK77)), sizes_B6))
    vae = flops(lambda: encode_images(model.vae, image_BHWC))
    with FlopCounterMode(display=False) as counter:
        prediction = predict(plain)
        forward = counter.get_total_flops()
        prediction.sum().backward()
    both = counter.get_total_flops()
    checkpointing = Denoiser(model, (True, True), gradient_checkpointing=True)
    recomputed = flops(lambda: predict(checkpointing).sum().backward())
    return StepFlops(forward - text, text, vae, vae + both, vae + recomputed)


# The earlier system's published figures: images/s of 8 devices, batch 4, fp16, 1024 px
PUBLISHED = {"8 × NPU-910": 10.4, "8 × A100-class": 20.2}
# fp16 TFLOP/s that a maker or a maker's file gives; sources in docs/scaling.md
PEAKS = {
    "8 × NPU-910": {"Ascend 910 (2019)": 256.0, "Ascend 910B4": 280.0, "Ascend 910B2C": 24 * 16**3 * 2 * 1.8e9 / 1e12},
    "8 × A100-class": {"A100": 312.0},
}


def utilisation(
    images_per_second: float, devices: int, flops_per_image: float, peak_tflops: float
) -> tuple[float, float]:
    """TFLOP/s of a device, and their share of the peak."""
    reached = images_per_second / devices * flops_per_image / 1e12
    return reached, reached / peak_tflops


# Tables


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cases(trained: Trained) -> list[tuple[str, str, int]]:
    """(name, method, bytes gathered) of each row."""
    rows = [(name, method, FP32) for method, name in METHODS.items()]
    return [*rows, ("FSDP2, gathered in fp16", "fsdp", 2)]


def parameters_table(model: Model, module: Denoiser) -> str:
    """Parameters of each network, and the trained ones."""
    parts = {
        "U-Net": (model.unet, list(module.unet.parameters())),
        "text encoder 1 (CLIP-L)": (model.text_encoders[0], module.trained_encoders[0]),
        "text encoder 2 (OpenCLIP bigG)": (model.text_encoders[1], module.trained_encoders[1]),
    }
    rows = []
    for name, (network, trained) in parts.items():
        counts = [sum(parameter.numel() for parameter in part) for part in (list(network.parameters()), trained)]
        rows.append([name, *(f"{count:,}" for count in counts), f"{FP32 * counts[1] / 1e9:.2f}"])
    total = trained_sizes(module).total
    rows.append(["all that trains", "", f"{total:,}", f"{FP32 * total / 1e9:.2f}"])
    return table(["Network", "parameters", "trained", "fp32 gradients, GB"], rows)


def traffic_table(trained: Trained) -> str:
    """GB that a rank sends in a step, and the number of collectives."""
    rows = []
    for name, method, gathered in _cases(trained):
        cells = []
        for devices in DEVICES:
            calls = collectives(method, trained, devices, gathered)
            cells.append(f"{sent(calls, devices) / 1e9:.2f} in {len(calls)}")
        kinds = Counter(call.kind for call in collectives(method, trained, DEVICES[0], gathered))
        rows.append([name, ", ".join(kinds), *cells])
    return table(["Method", "collectives", *(f"{devices} devices" for devices in DEVICES)], rows)


def time_table(trained: Trained, links: Links) -> str:
    """Seconds of communication a step: by bandwidth, by latency, and with single roots between nodes."""
    rows = []
    for name, method, gathered in _cases(trained):
        cells = []
        for devices in DEVICES:
            found = seconds(collectives(method, trained, devices, gathered), devices, links)
            roots = f", by one root {found.one_root:.2f}" if found.one_root > 1.005 * found.bandwidth else ""
            cells.append(f"{found.bandwidth:.3f} / {found.latency:.3f}{roots}: {found.bound}")
        rows.append([name, *cells])
    return table([links.name, *(f"{devices} devices" for devices in DEVICES)], rows)


def memory_table(trained: Trained) -> str:
    """GiB of weights, gradients and moments on the rank that holds the most."""
    rows = []
    for method, name in METHODS.items():
        cells = []
        for devices in DEVICES:
            held = state_bytes(method, trained, devices)
            cells.append(f"{held['moments'] / GIB:.3f} ({sum(held.values()) / GIB:.2f})")
        rows.append([name, *cells])
    ideal = [f"{2 * FP32 * trained.total / devices / GIB:.3f}" for devices in DEVICES]
    return table(["AdamW's moments (with weights and gradients)", *(f"{n} devices" for n in DEVICES)], [
        *rows, ["one n-th of the moments", *ideal]
    ])  # fmt: skip


def flops_table(found: StepFlops) -> str:
    """TFLOP of an image by part of the step."""
    rows = {
        "U-Net, forward": found.unet_forward,
        "text encoders, forward": found.text_forward,
        "VAE, encoding": found.vae_encoding,
        "step: VAE, forward and backward": found.model,
        "step with gradient checkpointing": found.run,
    }
    return table(["One image at 1024 px", "TFLOP"], [[name, f"{count / 1e12:.2f}"] for name, count in rows.items()])


def published_table(found: StepFlops) -> str:
    """Published images/s as TFLOP/s and utilisation."""
    rows = []
    for name, images in PUBLISHED.items():
        for device, peak in PEAKS[name].items():
            model, model_share = utilisation(images, PER_NODE, found.model, peak)
            run, run_share = utilisation(images, PER_NODE, found.run, peak)
            rows.append([
                name, f"{images}", f"{4 * PER_NODE / images:.2f}", f"{device}, {peak:.0f}",
                f"{model:.1f} ({model_share:.0%})", f"{run:.1f} ({run_share:.0%})",
            ])  # fmt: skip
    head = ["Published", "images/s", "s a step", "peak, TFLOP/s", "model TFLOP/s a device", "with recomputation"]
    return table(head, rows)


def tables(model: Model, found: StepFlops) -> dict[str, str]:
    """The document's tables by name."""
    module = Denoiser(model, (True, True), gradient_checkpointing=False)
    trained = trained_sizes(module)
    times = "\n\n".join(time_table(trained, links) for links in LINKS)
    return {
        "parameters": parameters_table(model, module),
        "traffic": traffic_table(trained),
        "time": times,
        "memory": memory_table(trained),
        "flops": flops_table(found),
        "published": published_table(found),
    }


def with_tables(document: str, found: dict[str, str]) -> str:
    """The document with each table between its markers. Raises ValueError if a marker is missing."""
    for name, text in found.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        document, count = pattern.subn(lambda match, text=text: f"{match[1]}\n{text}\n\n{match[2]}", document)
        if count != 1:
            raise ValueError(f"{count} places for the table {name!r}, not 1")
    return document


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path, help="the document whose tables are replaced")
    options = parser.parse_args(argv)
    model = sdxl()
    found = step_flops(model)
    texts = tables(model, found)
    if options.write:
        options.write.write_text(with_tables(options.write.read_text(encoding="utf-8"), texts), encoding="utf-8")
    print(*texts.values(), sep="\n\n")
    trained = trained_sizes(Denoiser(model, (True, True), gradient_checkpointing=False))
    moved = {
        name: {devices: round(sent(collectives(method, trained, devices, gathered), devices)) for devices in DEVICES}
        for name, method, gathered in _cases(trained)
    }
    result = {"bench": "scaling", "trained": trained.total, "bytes_sent_a_rank": moved, "flops_an_image": vars(found)}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
