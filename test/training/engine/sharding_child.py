"""What torchrun starts for test_sharding.py: trains a tiny SDXL, U-Net and text encoders, once for each given case.

    torchrun ... sharding_child.py MODEL_FOLDER CASES.json OUTPUT_FOLDER

For each case the main process writes {name}.safetensors (the whole weights) and {name}.json (a line of metrics a step
and one a validation, and the bytes of optimizer state of every process).
"""

import json
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch
from accelerate.utils import gather_object
from safetensors.torch import save_file
from torch import nn

from library.data.order.held_out import ValidationPlan
from library.exit_status import run_script
from library.families import SDXL
from library.models.compiled import compile_blocks
from library.models.denoiser import Denoiser
from library.models.files.read import load_model
from library.models.text import Tokens
from library.signals import Signals
from library.training.cadence import Cadence
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import shard
from library.training.log.metrics import MetricsWriter
from library.training.loop import LoopOptions, Trainer
from library.training.state.states import StateCadence, States
from library.training.state.writer import StateWriter
from library.training.validation import Validator
from third_patch import PATCHES, apply

GLOBAL_BATCH = 12  # 1, 2 or 4 processes with 1 or 3 micro-batches divide it
LATENT_HW = (4, 8)


class NoisePrediction:
    """The loop's task without data set and VAE: every input is a function of the step and the sample's place."""

    def __init__(self, parallel_device):
        self.device, self.saved = parallel_device, {}

    def loss(self, module, batch):
        predicted = self._predict(module, batch.inputs)
        return nn.functional.mse_loss(predicted.float(), batch.target.to(self.device))

    def validation_losses(self, module, batch, seed, numbers):
        """Five samples of their own, in the batches that the plan makes of them."""
        whole = sample(seed)
        places = [*numbers, *[0] * (2 - len(numbers))]
        predicted = self._predict(module, [part[places] for part in whole.inputs])
        losses = (predicted.float() - whole.target[places].to(self.device)).square().mean(dim=(1, 2, 3))
        return losses[: len(numbers)]

    def save(self, stem, module):
        self.saved[stem] = {name: value.detach().cpu().clone() for name, value in module.state_dict().items()}
        return stem

    def preview(self, position, step, module, since=0.0):
        """Computes with the whole module on the main process alone, as a preview does."""
        with torch.no_grad():
            self.saved[position] = self._predict(module, [part[:1] for part in sample(0).inputs]).float().cpu()

    def _predict(self, module, inputs):
        noisy, t, *ids, sizes = (part.to(self.device) for part in inputs)
        return module(noisy, t, Tokens(tuple(ids)), sizes)


def sample(step):
    """The global batch of a step."""
    random = torch.Generator().manual_seed(step)
    ids = torch.randint(3, 300, (2, GLOBAL_BATCH, 1, 77), generator=random)
    return SimpleNamespace(
        inputs=(
            torch.randn(GLOBAL_BATCH, 4, *LATENT_HW, generator=random),
            torch.randint(0, 1000, (GLOBAL_BATCH,), generator=random),
            ids[0],
            ids[1],
            torch.full((GLOBAL_BATCH, 6), 64.0),
        ),
        target=torch.randn(GLOBAL_BATCH, 4, *LATENT_HW, generator=random),
    )


def micro_batches(steps, accumulation, rank, processes):
    """This process's share: places rank, rank + processes ... of each micro-batch."""
    for step in range(steps):
        whole = sample(step)
        size = GLOBAL_BATCH // accumulation
        for micro in range(accumulation):
            part = slice(micro * size + rank, (micro + 1) * size, processes)
            inputs, target = tuple(one[part] for one in whole.inputs), whole.target[part]
            yield SimpleNamespace(step=step, inputs=inputs, target=target, names=["?"], quarantined=[], replaced=0)


class FiveRows:
    """What validation is done on: as many rows, in two buckets."""

    images_SK = np.array([[2, 0], [1, 2]])

    def rows(self, bucket, source, places):
        return places


def validator(task, accelerator, writer):
    plan = ValidationPlan(FiveRows(), 99, 2)
    rank, processes = accelerator.process_index, accelerator.num_processes
    steps = range(rank, -(-plan.batches // processes) * processes, processes)
    batches = [SimpleNamespace(step=step, quarantined=[]) for step in steps]
    return Validator(task.validation_losses, accelerator, plan, batches, Cadence(10), writer, Signals())


class OneEpoch:
    """Epochs do not matter here."""

    def epoch_of_step(self, step):
        return 0

    def steps_before_epoch(self, epoch):
        return 0


def quiet_states(parallel, folder):
    """States of a run that saves none."""
    return States(StateWriter(folder), parallel, {}, StateCadence(), lambda step, metrics: None, str)


def state_bytes(parallel):
    """Bytes of optimizer state that this process holds; a step counter is not counted."""
    values = [value for state in parallel.own_optimizer.state.values() for value in state.values()]
    tensors = [getattr(value, "to_local", lambda value=value: value)() for value in values if value.dim()]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def train(accelerator, model_folder, case, out):
    model = load_model(model_folder, SDXL)
    module = Denoiser(model, [case["text_encoders"]] * 2, case["checkpointing"])
    module.to(accelerator.device)
    te1, te2 = module.trained_encoders
    parts = {"unet": list(module.unet.parameters()), "te1": te1, "te2": te2}
    groups = [ParameterGroup(name, part, 1e-4) for name, part in parts.items() if part]
    steps, warmup = case["steps"], case["warmup"]
    parallel = shard(
        case["sharding"], accelerator, module, groups,
        lambda groups, **construct: make_optimizer("AdamW", groups, ["weight_decay=0.1"], **construct),
        lambda optimizer: make_lr_schedule("linear" if warmup else "constant", optimizer, steps, warmup, 1, 1.0),
    )  # fmt: skip
    if case["compile"]:
        compile_blocks(module.unet, "aot_eager", "sdpa", torch.float32)
    folder = out / case["name"]
    folder.mkdir(exist_ok=True)
    options = LoopOptions(steps, case["accumulation"], GLOBAL_BATCH, case["max_grad_norm"], folder)
    writer = MetricsWriter(folder, None, steps, accelerator.is_main_process)
    task = NoisePrediction(accelerator.device)
    states = quiet_states(parallel, folder)
    validates = validator(task, accelerator, writer)
    trainer = Trainer(task, accelerator, parallel, OneEpoch(), options, writer, states, Signals(), validator=validates)
    rank, processes = accelerator.process_index, accelerator.num_processes
    trainer.train(micro_batches(steps, case["accumulation"], rank, processes))
    trainer._preview(["preview"], steps)
    trainer.save("whole")
    writer.close()
    held = gather_object([state_bytes(parallel)])
    if accelerator.is_main_process:
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        step_lines = [line for line in lines if "loss" in line]
        found = {"steps": step_lines, "validations": [line for line in lines if "loss" not in line]}
        (out / f"{case['name']}.json").write_text(json.dumps({**found, "state_bytes": held}))
        save_file(task.saved["whole"], out / f"{case['name']}.safetensors")
        save_file({"preview": task.saved["preview"]}, out / f"{case['name']}.preview.safetensors")
    accelerator.free_memory()


def main(model_folder, cases, out):
    torch.set_num_threads(1)
    undo = apply(PATCHES)
    accelerator = make_accelerator("no")
    for case in json.loads(Path(cases).read_text()):
        train(accelerator, model_folder, case, Path(out))
    undo()


if __name__ == "__main__":
    run_script(lambda: main(*sys.argv[1:]))
