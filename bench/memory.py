"""Device memory of a step of SDXL's full size by configuration, as --dry_run's estimator works it out on shapes.

    python bench/memory.py

Batch 1 a device, the U-Net trains, the frozen text encoders and the VAE lie beside it in the precision of the run. The
table is Markdown, in GB (10^9 bytes); the last line printed is one JSON object.
test/training/memory/test_estimate.py holds the estimator to real steps; docs/measurements/full_size.md has a real
step of this size.
"""

import importlib.util
import json
import sys
from dataclasses import asdict, dataclass, field, fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

from scaling import sdxl

from library.models.denoiser import Denoiser
from library.models.model import Model
from library.models.text import Tokens
from library.models.vae import encode_images
from library.options.precision import BF16_UPDATES
from library.training.engine.bf16_update import Bf16Update
from library.training.engine.meta_copy import without_data
from library.training.engine.optimizers import make_optimizer
from library.training.engine.precision import DTYPES
from library.training.engine.swap_schedule import choose_blocks
from library.training.memory.estimate import MemoryEstimate, estimate
from library.training.memory.resident import Training

ADAFACTOR = ["relative_step=False", "scale_parameter=False"]


@dataclass(frozen=True)
class Configuration:
    """The settings of a table row."""

    side_px: int
    precision: str
    optimizer: str = "AdamW"
    arguments: list[str] = field(default_factory=list)
    checkpointing: bool = True
    fused: bool = False
    average: bool = False
    sharding: str = "none"
    processes: int = 1
    update: str | None = None  # of bf16 weights
    swap: int = 0

    @property
    def name(self) -> str:
        """The configuration's name, in the words of the flags."""
        parts = [
            f"{self.side_px} px, {self.precision}: {self.optimizer}",
            f"full_bf16 ({self.update})" if self.update else "",
            "gradient_checkpointing" if self.checkpointing else "",
            "fused_backward_pass" if self.fused else "",
            "use_ema" if self.average else "",
            f"blocks_to_swap {self.swap}" if self.swap else "",
            f"{self.sharding} over {self.processes}" if self.processes > 1 else "",
        ]
        return ", ".join(filter(None, parts))


def configurations() -> list[Configuration]:
    """The configurations between which a user chooses."""
    bf16, factored = partial(Configuration, 1024, "bf16"), {"optimizer": "AdaFactor", "arguments": ADAFACTOR}
    rows = [bf16(checkpointing=False), bf16(), bf16(fused=True), bf16(**factored), bf16(**factored, fused=True)]
    if importlib.util.find_spec("bitsandbytes"):
        rows += [bf16("AdamW8bit"), bf16("AdamW8bit", fused=True)]
    full = partial(bf16, update=BF16_UPDATES[0])
    rows += [full(), bf16(update="kahan"), full(fused=True), full(**factored, fused=True), full(average=True)]
    rows += [full(sharding=kind, processes=8) for kind in ("oss", "fsdp")]
    rows += [bf16(average=True), bf16(average=True, sharding="oss", processes=8)]
    rows += [bf16(sharding=kind, processes=8) for kind in ("none", "oss", "zero1", "fsdp")]
    rows += [bf16(swap=swap, fused=fused) for swap in (20, 40) for fused in (False, True)]
    rows += [bf16(swap=87, fused=True), bf16(**factored, swap=40, fused=True)]
    return rows + [Configuration(side, "no", **factored, fused=True) for side in (256, 512)]


def predict(model: Model, configuration: Configuration) -> MemoryEstimate:
    """The estimate of a configuration; only the model's shapes are used."""
    return estimate(*parts_of(model, configuration))


def parts_of(model: Model, configuration: Configuration) -> tuple[Any, ...]:
    """The estimator's arguments for a configuration."""
    half, batch = DTYPES[configuration.precision], 1
    module = Denoiser(model)
    module.unet.enable_gradient_checkpointing(configuration.checkpointing)
    for index, encoder in enumerate(module.text_encoders):
        module.text_encoders[index] = without_data(encoder, half)
    if configuration.update:
        module.unet = without_data(module.unet, half)
    noisy_BCHW = torch.empty(batch, 4, configuration.side_px // 8, configuration.side_px // 8, device="meta")
    ids_BK77 = torch.zeros(batch, 1, 77, dtype=torch.int64, device="meta")
    images_BHWC = torch.empty(batch, configuration.side_px, configuration.side_px, 3, dtype=torch.uint8, device="meta")

    def step(shapes: Any) -> Tensor:
        t_B, size_ids_B6 = torch.zeros(batch, device="meta"), torch.zeros(batch, 6, device="meta")
        return shapes(noisy_BCHW, t_B, Tokens((ids_BK77, ids_BK77)), size_ids_B6).float().mean()

    def encode(shapes: nn.Module) -> Tensor:
        return encode_images(shapes, images_BHWC)

    bf16 = Bf16Update(configuration.update, 0) if configuration.update else None
    make = partial(make_optimizer, configuration.optimizer, arguments=configuration.arguments, bf16=bf16)
    blocks = module.unet.blocks()
    sizes = [sum(weight.nbytes for weight in block.parameters()) for block in blocks]
    swapped = [list(blocks[number].parameters()) for number in choose_blocks(sizes, configuration.swap)]
    training = Training(
        make, configuration.sharding, configuration.processes, configuration.fused, configuration.average, swapped
    )
    return module, without_data(model.vae, half), half, step, encode, training


def row(configuration: Configuration, predicted: MemoryEstimate) -> str:
    """A row of the table."""
    sizes = (*asdict(predicted).values(), predicted.total)
    return f"| {configuration.name} | {' | '.join(f'{size / 1e9:.2f}' for size in sizes)} |"


def main() -> None:
    model = sdxl()
    columns = [*(name.name for name in fields(MemoryEstimate)), "peak of a step"]
    print(f"| batch 1 a device | {' | '.join(columns)} |\n|{' --- |' * (len(columns) + 1)}")
    found = {}
    for configuration in configurations():
        predicted = predict(model, configuration)
        found[configuration.name] = {**asdict(predicted), "total": predicted.total}
        print(row(configuration, predicted), flush=True)
    print(json.dumps({"bench": "memory", "torch": torch.__version__, "bytes": found}))


if __name__ == "__main__":
    main()
