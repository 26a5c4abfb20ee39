"""What the wrappers of several processes really move in a step, counted, beside the formulas of bench/scaling.py.

    python bench/collectives.py                          # 2 and 4 gloo processes; prints the tables and one JSON line
    python bench/collectives.py --write docs/scaling.md  # puts them between that document's markers

Two counts: of the collectives that reach torch's dispatcher, by kind and bytes, and of the bytes that the kernel sent
on the loopback device, over which the processes talk. For the second they run in a network namespace of their own where
one can be made (`unshare -rn`); otherwise whatever else uses the loopback is counted, too. gloo moves more bytes than
the best algorithm for some collectives; how many is measured for each collective alone, and from that the bytes of a
step are predicted. What each rank's optimizer holds is counted as well.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))

import scaling

from library.exit_status import run_script
from library.models.unet import UNet, UNetConfig

CONFIG = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1), transformer_depth_middle=1,
    context_dim=64, adm_in_channels=None,
)  # fmt: skip
LATENT, TOKENS = 8, 7
STEPS, FIRST_COUNTED = 4, 2  # DDP makes its buckets anew after the first step
ALONE_BYTES = 8 * 2**20
KINDS = {
    "allreduce_": "all_reduce",
    "reduce_": "reduce",
    "broadcast_": "broadcast",
    "_allgather_base_": "all_gather",
    "_reduce_scatter_base_": "reduce_scatter",
}


class CollectiveCounter(TorchDispatchMode):
    """Records each collective that runs: its kind and the bytes of its largest tensor, which is the whole one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[scaling.Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "c10d":
            kind = KINDS.get(func._schema.name.partition("::")[2], func._schema.name)
            sizes = [leaf.numel() * leaf.element_size() for leaf in tree_leaves(args) if isinstance(leaf, Tensor)]
            self.calls.append(scaling.Collective(kind, max(sizes, default=0)))
        return func(*args, **(kwargs or {}))


def loopback_bytes() -> int:
    """Bytes that the kernel has sent on `lo` in this network namespace."""
    for line in Path("/proc/self/net/dev").read_text().splitlines():
        name, _, figures = line.partition(":")
        if name.strip() == "lo":
            return int(figures.split()[8])
    raise RuntimeError("no loopback device in /proc/self/net/dev")


def make_step(method: str) -> tuple[Any, Callable[[], None]]:
    """The optimizer of a small U-Net in its wrapper, and the step."""
    torch.manual_seed(0)
    module: nn.Module = UNet(CONFIG)
    optimizer: Any
    if method == "oss":
        from fairscale.nn.data_parallel import ShardedDataParallel
        from fairscale.optim import OSS

        optimizer = OSS(module.parameters(), torch.optim.AdamW)
        module = ShardedDataParallel(module, optimizer)
    elif method == "fsdp":
        from torch.distributed.fsdp import fully_shard

        for unit in scaling.fsdp_units(module):
            fully_shard(unit)
        fully_shard(module)
        optimizer = torch.optim.AdamW(module.parameters())
    else:
        from torch.distributed.optim import ZeroRedundancyOptimizer
        from torch.nn.parallel import DistributedDataParallel

        if method == "zero1":
            optimizer = ZeroRedundancyOptimizer(module.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True)
        else:
            optimizer = torch.optim.AdamW(module.parameters())
        module = DistributedDataParallel(module)
    inputs = torch.randn(1, 4, LATENT, LATENT), torch.zeros(1), torch.randn(1, TOKENS, CONFIG.context_dim)

    def step() -> None:
        module(*inputs).square().mean().backward()
        optimizer.step()
        module.zero_grad()  # the wrapper's: OSS's own would take the gradients out of ShardedDDP's buckets

    return optimizer, step


def moments_held(optimizer: Any) -> list[int]:
    """Bytes of AdamW's two moments on each rank."""
    local = getattr(optimizer, "optim", optimizer)  # OSS and ZeroRedundancyOptimizer keep AdamW for their shard in it
    tensors = [state[name] for state in local.state.values() for name in ("exp_avg", "exp_avg_sq")]
    shards = [getattr(tensor, "_local_tensor", tensor) for tensor in tensors]
    ranks: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(ranks, sum(shard.numel() * shard.element_size() for shard in shards))
    return ranks


def counted(run: Callable[[], None]) -> tuple[list[scaling.Collective], int]:
    """The collectives of a run and the bytes on the loopback while it ran, on all processes."""
    dist.barrier()
    before = loopback_bytes()
    with CollectiveCounter() as counter:
        run()
    dist.barrier()
    return counter.calls, loopback_bytes() - before


def alone(kind: str) -> float:
    """Bytes that gloo's processes send for one collective, as a multiple of what the best algorithm sends."""
    devices = dist.get_world_size()
    whole = torch.zeros(ALONE_BYTES // 4)
    part = torch.zeros(whole.numel() // devices)
    run: dict[str, Callable[[], Any]] = {
        "all_reduce": lambda: dist.all_reduce(whole),
        "reduce": lambda: dist.reduce(whole, 0),
        "broadcast": lambda: dist.broadcast(whole, 0),
        "all_gather": lambda: dist.all_gather_into_tensor(whole, part),
        "reduce_scatter": lambda: dist.reduce_scatter_tensor(part, whole),
    }
    sent = statistics.median(counted(run[kind])[1] for _ in range(3))
    return sent / (devices * scaling.Collective(kind, ALONE_BYTES).sent(devices))


def measure_here() -> dict[str, Any]:
    """Measure in one of the processes: each collective alone, then each method's steps."""
    devices = dist.get_world_size()
    factors = {kind: alone(kind) for kind in KINDS.values()}
    methods = {}
    for method in scaling.METHODS:
        optimizer, step = make_step(method)
        runs = [counted(step) for _ in range(STEPS)][FIRST_COUNTED:]
        calls = runs[-1][0]
        methods[method] = {
            "payload": totals(calls),
            "calls": dict(Counter(call.kind for call in calls)),
            "predicted": round(sum(devices * call.sent(devices) * factors[call.kind] for call in calls)),
            "loopback": statistics.median(sent for _, sent in runs),
            "moments": moments_held(optimizer),
        }
    return {"processes": devices, "factors": factors, "methods": methods}


def totals(calls: Sequence[scaling.Collective]) -> dict[str, int]:
    """Bytes by kind of collective."""
    found: Counter[str] = Counter()
    for call in calls:
        found[call.kind] += call.bytes
    return dict(found)


def trained() -> scaling.Trained:
    """Parameter sizes of the small U-Net that trains."""
    with torch.device("meta"):
        return scaling.trained_sizes(UNet(CONFIG))


def own_namespace() -> list[str]:
    """The start of a command that runs in its own network namespace with a loopback; [] if none can be made."""
    if shutil.which("unshare") is None or shutil.which("ip") is None:
        return []
    command = ["unshare", "-rn", "sh", "-c", 'ip link set lo up && exec "$@"', "sh"]
    return command if subprocess.run([*command, "true"], capture_output=True).returncode == 0 else []


def measure(processes: int) -> dict[str, Any]:
    """Start the processes; returns the first process's figures and whether they had their own loopback."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    namespace = own_namespace()
    command = [
        *namespace, sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={processes}",
        "--master_addr=127.0.0.1", f"--master_port={port}", __file__, "--inside",
    ]  # fmt: skip
    variables = {**os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    done = subprocess.run(command, env=variables, capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{processes} processes failed:\n{done.stderr[-4000:]}")
    return {"own_loopback": bool(namespace), **json.loads(done.stdout.splitlines()[-1])}


def tables(results: Sequence[dict[str, Any]]) -> dict[str, str]:
    """The document's tables by name."""
    alone_rows = [[kind, *(f"{result['factors'][kind]:.3f}" for result in results)] for kind in results[0]["factors"]]
    head = [f"{result['processes']} processes" for result in results]
    rows, held = [], []
    for result in results:
        devices = result["processes"]
        for method, name in scaling.METHODS.items():
            calls, seen = scaling.collectives(method, trained(), devices), result["methods"][method]
            formula, number = totals(calls), dict(Counter(call.kind for call in calls))
            kinds = ", ".join(f"{kind} {size / 1e6:.3f} in {number[kind]}" for kind, size in formula.items())
            same = seen["payload"] == formula and seen["calls"] == number
            best, sent, predicted = devices * scaling.sent(calls, devices), seen["loopback"], seen["predicted"]
            rows.append([
                f"{devices}", name, kinds, "equal" if same else f"{seen['payload']} in {seen['calls']}",
                f"{best / 1e6:.2f}", f"{predicted / 1e6:.2f}", f"{sent / 1e6:.2f} ({sent / predicted - 1:+.1%})",
            ])  # fmt: skip
            shards = scaling.optimizer_shards(method, trained(), devices)
            cells = [", ".join(f"{size / 1e6:.3f}" for size in sizes) for sizes in (
                [2 * scaling.FP32 * shard for shard in shards], seen["moments"])]  # fmt: skip
            held.append([f"{devices}", name, *cells])
    columns = ["n", "Method", "formula: MB in calls", "counted", "best algorithm", "gloo, from its factors", "on `lo`"]
    return {
        "alone": scaling.table(["Collective, alone", *head], alone_rows),
        "steps": scaling.table(columns, rows),
        "moments": scaling.table(["n", "Method", "formula: moments of each rank, MB", "counted"], held),
    }


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--write", type=Path, help="the document whose tables are replaced")
    parser.add_argument("--inside", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.inside:
        dist.init_process_group("gloo")
        result = measure_here()
        if dist.get_rank() == 0:
            print(json.dumps(result), flush=True)
        return
    results = [measure(processes) for processes in options.processes]
    texts = tables(results)
    if options.write:
        document = scaling.with_tables(options.write.read_text(encoding="utf-8"), texts)
        options.write.write_text(document, encoding="utf-8")
    print(*texts.values(), sep="\n\n")
    if not all(result["own_loopback"] for result in results):
        print("no network namespace could be made: other programs' loopback traffic is in the figures", file=sys.stderr)
    print(json.dumps({"bench": "collectives", "parameters": trained().total, "results": results}))


if __name__ == "__main__":
    run_script(main)
