"""What each way of --sharding holds in memory and takes in time, on 1, 2 and 4 processes that train a small U-Net.

    OMP_NUM_THREADS=1 python bench/sharding.py    # starts torchrun; prints the tables and one JSON line
    OMP_NUM_THREADS=1 python bench/sharding.py --write docs/measurements/sharding.md

Bytes are counted and not sampled: a dispatch mode sees every storage that is made, in C++ by DistributedDataParallel's
reducer, too, and a storage counts with its present size for as long as anything holds it. All but the batch is sorted
into weights, optimizer state and the rest, which is gradients and what the wrappers keep for them. Times are ratios to
`none`: the ways take turns in the same processes, step by step.
"""

import argparse
import gc
import json
import platform
import statistics
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.distributed.fsdp as fsdp
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import collectives
import scaling
import timing
import unet_steps

from library.exit_status import run_script
from library.models.unet import UNet, size_embedding
from library.options.optimizer import SHARDINGS
from library.training.engine import sharding
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer
from library.training.engine.precision import make_accelerator
from third_patch import PATCHES, apply
from third_patch.accelerate_patch import accelerator as accelerate_patch

CASE = unet_steps.Case(
    config=replace(collectives.CONFIG, adm_in_channels=64 + unet_steps.SIZE_WIDTH),
    latent_hw=(8, 8),
    batch=4,  # over all processes
    dtype=torch.float32,
    device=torch.device("cpu"),
    gradient_checkpointing=False,
)
MAX_NORM, LEARNING_RATE = 1.0, 1e-4
RELEASE_S = 0.3  # time in which gloo's threads let go of the tensors of collectives that are over
FIRST_STEPS = 2  # DistributedDataParallel makes its buckets anew in the second
SDXL_PARAMETERS = 3_378_094_596  # that train, docs/scaling.md
OSS_IN_PROPORTION = "oss, buckets in SDXL's proportion"
FSDP_ON_DTENSORS = "fsdp, optimizer on DTensors"
FSDP_KEPT = "fsdp, weights kept after forward"  # 2 of 3 passes of the traffic, and the whole weights until backward


class Network(UNet):
    """A U-Net with the parts that FSDP gathers one by one, as in the trainer."""

    def sharding_units(self) -> list[nn.Module]:
        return scaling.fsdp_units(self)


class OnDTensors(sharding.FullySharded):
    """FSDP2 as its tutorials have it: clipping and optimizer work on DTensors."""

    def __init__(
        self, accelerator: Any, module: nn.Module, groups: Sequence[ParameterGroup], make: Any, schedule: Any
    ) -> None:
        super().__init__(accelerator, module, groups, make, schedule)
        self.named = self._sharded
        group = replace(groups[0], parameters=list(self.named.values()))
        self.bare_optimizer = self.optimizer = make([group])
        self.schedule = schedule(self.optimizer)

    def clip(self, max_norm: float) -> float:
        norm: Any = nn.utils.clip_grad_norm_(self.parameters, max_norm)
        return float(norm.full_tensor())


class Storages(TorchDispatchMode):
    """While active, remembers the storages that are made; they are not kept alive by it."""

    def __init__(self) -> None:
        super().__init__()
        self._seen: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for storage in storages_under(tree_leaves(result)):
            self._seen[storage._cdata] = weakref.ref(storage)
        return result

    def alive(self) -> dict[int, int]:
        """Current bytes of each storage that still exists."""
        gc.collect()
        storages = [reference() for reference in self._seen.values()]
        return {storage._cdata: storage.nbytes() for storage in storages if storage is not None}


def storages_under(values: Iterable[Any]) -> Iterator[torch.UntypedStorage]:
    """The storages of tensors; of a DTensor, which has no real storage, those of its local part."""
    for value in values:
        if isinstance(value, Tensor) and not value.is_meta:
            yield getattr(value, "_local_tensor", value).untyped_storage()


def storages_of(tensors: Iterable[Any]) -> dict[int, int]:
    """Bytes of the tensors' storages, each counted once."""
    return {storage._cdata: storage.nbytes() for storage in storages_under(tensors)}


@dataclass(frozen=True)
class Trained:
    """One way of sharding with its network and this process's share of the batch."""

    parallel: sharding.Replicated
    batch: unet_steps.Inputs

    def forward_backward(self) -> Tensor:
        batch = self.batch
        vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
        prediction_BCHW = self.parallel.module(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)
        loss = F.mse_loss(prediction_BCHW, batch.target_BCHW)
        self.parallel.accelerator.backward(loss)
        return loss.detach()

    def update(self) -> None:
        """Clip, update and clear gradients as the trainer's loop does."""
        self.parallel.clip(MAX_NORM)
        self.parallel.optimizer.step()
        self.parallel.schedule.step()
        self.parallel.zero_grad()


def share_of_batch() -> unet_steps.Inputs:
    """This process's indices in the global batch, as the trainer assigns them."""
    rank, processes = dist.get_rank(), dist.get_world_size()
    return unet_steps.Inputs(
        *(tensor[rank::processes].clone() for tensor in vars(unet_steps.make_inputs(CASE)).values())
    )


def make(kind: str, batch: unet_steps.Inputs) -> Trained:
    """The way of sharding as the trainer builds it; the weights are the same for all."""
    with torch.device("meta"):
        network = Network(CASE.config)
    network.load_state_dict(unet_steps.weights(CASE), assign=True)
    accelerator = make_accelerator("no")
    network.requires_grad_(True).to(accelerator.device)
    parameters = list(network.parameters())
    elements = [accelerate_patch.BUCKET_ELEMENTS, accelerate_patch.ALL_BUCKETS_ELEMENTS]
    if kind == OSS_IN_PROPORTION:
        elements = [size * sum(p.numel() for p in parameters) // SDXL_PARAMETERS for size in elements]
    arguments: tuple[Any, ...] = (
        accelerator,
        network,
        [ParameterGroup("unet", parameters, LEARNING_RATE)],
        lambda groups, **construct: make_optimizer("AdamW", groups, [], **construct),
        lambda optimizer: make_lr_schedule("constant", optimizer, 1000, 0, 1, 1.0),
    )
    kept = partial(fsdp.fully_shard, reshard_after_forward=False if kind == FSDP_KEPT else None)
    with (
        mock.patch.multiple(accelerate_patch, BUCKET_ELEMENTS=elements[0], ALL_BUCKETS_ELEMENTS=elements[1]),
        mock.patch.object(fsdp, "fully_shard", kept),
    ):
        if kind == FSDP_ON_DTENSORS:
            return Trained(OnDTensors(*arguments), batch)
        return Trained(sharding.shard(kind.partition(",")[0], *arguments), batch)


# Measuring, in one of the processes


def memory(trained: Trained, storages: Storages) -> dict[str, int]:
    """Bytes held at rest, after the backward of a step, and after a backward under `no_sync`."""
    parallel = trained.parallel

    def rest() -> int:
        named = storages_of([*weights, *state])
        time.sleep(RELEASE_S)
        alive = storages.alive()
        missed = named.keys() - alive.keys()
        if missed:
            raise RuntimeError(f"{len(missed)} storages of weights and optimizer state were not seen being made")
        others = alive.keys() - named.keys() - storages_of(vars(trained.batch).values()).keys()
        return sum(alive[key] for key in others)

    for _ in range(FIRST_STEPS):
        trained.forward_backward()
        trained.update()
    weights = list(parallel.bare_module.parameters())
    state = [value for values in parallel.own_optimizer.state.values() for value in values.values()]
    result = {"weights": sum(storages_of(weights).values()), "state": sum(storages_of(state).values()), "rest": rest()}
    trained.forward_backward()
    result["backward"] = rest()
    trained.update()
    with parallel.no_sync() if dist.get_world_size() > 1 else nullcontext():
        trained.forward_backward()
    result["accumulating"] = rest()
    trained.forward_backward()
    trained.update()
    return result


def losses_and_seconds(
    all_trained: dict[str, Trained], steps: int, warmup: int
) -> tuple[dict[str, list[float]], dict[str, dict[str, list[float]]]]:
    """Each way's losses, and the times of its step and of the part after backward, in turns in changing order."""
    losses: dict[str, list[float]] = {kind: [] for kind in all_trained}
    seconds: dict[str, dict[str, list[float]]] = {
        part: {kind: [] for kind in all_trained} for part in ("step", "update")
    }
    for index in range(warmup + steps):
        for kind in list(all_trained)[:: 1 if index % 2 else -1]:
            dist.barrier()
            began = time.perf_counter()
            loss = all_trained[kind].forward_backward()
            between = time.perf_counter()
            all_trained[kind].update()
            ended = time.perf_counter()
            losses[kind].append(float(loss))
            if index >= warmup:
                seconds["step"][kind].append(ended - began)
                seconds["update"][kind].append(ended - between)
    return losses, seconds


def gathered(value: Any) -> list[Any]:
    """The values of all processes."""
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, value)
    return ranks


def measure_here(steps: int, warmup: int) -> dict[str, Any]:
    """Memory of every way in its largest process; with steps also losses and times of the ways that users choose."""
    batch = share_of_batch()
    kinds = [*SHARDINGS, OSS_IN_PROPORTION, FSDP_KEPT, FSDP_ON_DTENSORS] if dist.get_world_size() > 1 else ["none"]
    held, all_trained = {}, {}
    for kind in kinds:
        with Storages() as storages:
            trained = make(kind, batch)
            ranks = gathered(memory(trained, storages))
        if kind in (*SHARDINGS, OSS_IN_PROPORTION):
            held[kind] = {name: max(rank[name] for rank in ranks) for name in ranks[0]}
        if kind != OSS_IN_PROPORTION:
            all_trained[kind] = trained
    result: dict[str, Any] = {"processes": dist.get_world_size(), "bytes": held}
    if steps:
        losses, seconds = losses_and_seconds(all_trained, steps, warmup)
        result |= {"losses": over_ranks(losses, statistics.fmean)}
        result |= {part: over_ranks(times, max) for part, times in seconds.items()}
    return result


def over_ranks(values: dict[str, list[float]], together: Callable[[Any], float]) -> dict[str, list[float]]:
    """Each way's value of each step, over all processes."""
    ranks = gathered(values)
    return {kind: [together(step) for step in zip(*(rank[kind] for rank in ranks), strict=True)] for kind in values}


# The program


def measure(processes: int, steps: int, warmup: int) -> dict[str, Any]:
    """Measure in separate processes: several under torchrun, a single one without it, as the trainer starts."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"] if processes > 1 else []
    arguments = [__file__, "--inside", f"--steps={steps}", f"--warmup={warmup}"]
    done = subprocess.run([sys.executable, *torchrun, *arguments], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the run on {processes} processes failed, see above")
    return json.loads(done.stdout.splitlines()[-1])


def ratios(one: list[float], other: list[float]) -> str:
    """Median and quartiles of the ratios of neighbouring steps."""
    spread = timing.spread([a / b for a, b in zip(one, other, strict=True)])
    return f"{spread['median']:.2f} ({spread['quartile1']:.2f}–{spread['quartile3']:.2f})"


def tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The document's tables, by their markers; without steps, memory alone."""
    memory_rows, time_rows, update_rows = [], [], []
    for result in results:
        for kind, held in result["bytes"].items():
            whole = result["bytes"]["none"]["state"]
            bytes_of = (held["weights"], held["rest"], held["backward"], held["accumulating"])
            weights, *rest = (f"{size / 1e6:.3f}" for size in bytes_of)
            state = f"{held['state'] / 1e6:.3f} ({held['state'] / whole:.1%})"
            at_rest = f"{(held['weights'] + held['state'] + held['rest']) / 1e6:.3f}"
            memory_rows.append([str(result["processes"]), kind, weights, state, *rest, at_rest])
        if result["processes"] == 1 or "step" not in result:
            continue
        for kind, times in result["step"].items():
            pairs = zip(result["losses"][kind], result["losses"]["none"], strict=True)
            difference = max(abs(a / b - 1) for a, b in pairs)
            time_rows.append([
                str(result["processes"]), kind, ratios(times, result["step"]["none"]),
                ratios(result["update"][kind], result["update"]["none"]), f"{difference:.0e}",
            ])  # fmt: skip
        update_rows.append([
            str(result["processes"]), ratios(result["update"][FSDP_ON_DTENSORS], result["update"]["fsdp"])
        ])  # fmt: skip
    columns = ["n", "--sharding", "weights", "optimizer state (of the whole)"]
    columns += ["gradients at rest", "after backward", "accumulating", "all at rest"]
    made = {"memory": scaling.table(columns, memory_rows)}
    if time_rows:
        columns = ["n", "--sharding", "step / `none`", "clip, optimizer / `none`", "loss, largest difference"]
        made["time"] = scaling.table(columns, time_rows)
        made["dtensors"] = scaling.table(["n", "clip, optimizer: DTensors / bare shards"], update_rows)
    return made


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2, 4], help=f"that divide {CASE.batch}")
    parser.add_argument("--steps", type=int, default=30, help="measured steps of each, at least 2; 0: memory alone")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--write", type=Path, help="the document whose tables are replaced")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    if options.inside:
        undo = apply(PATCHES)
        make_accelerator("no")  # starts the process group of several processes
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        result = measure_here(options.steps, options.warmup)
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        dist.destroy_process_group()
        undo()
        return
    results = [measure(processes, options.steps, options.warmup) for processes in options.processes]
    texts = tables(results)
    if options.write:
        document = scaling.with_tables(options.write.read_text(encoding="utf-8"), texts)
        options.write.write_text(document, encoding="utf-8")
    print(*texts.values(), sep="\n\n")
    parameters = sum(parameter.numel() for parameter in UNet(CASE.config).parameters())
    head = {"bench": "sharding", "torch": torch.__version__, "python": platform.python_version()}
    print(json.dumps({**head, "parameters": parameters, "results": results}))


if __name__ == "__main__":
    run_script(main)
