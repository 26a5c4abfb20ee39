"""Checks of hccl in two processes: torchrun starts this with a folder, where each process writes what failed."""

import json
import os
import sys
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
import torch_npu  # noqa: F401  makes "npu" and "hccl" known
from torch import nn

from library.exit_status import run_script

RANK, SIZE = int(os.environ["RANK"]), 2
NPU = torch.device("npu", RANK)


def full(value, count=2, dtype=torch.float32):
    return torch.full((count,), float(value), device=NPU, dtype=dtype)


def check_all_reduce():
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.int64):
        tensor = full(RANK + 1, dtype=dtype)
        dist.all_reduce(tensor)
        assert tensor.tolist() == [3, 3]
    work = dist.all_reduce(biggest := full(RANK), op=dist.ReduceOp.MAX, async_op=True)
    work.wait()
    assert biggest.tolist() == [1, 1]
    assert work.get_future().value()[0].device == NPU


def check_broadcast_reduce_and_barrier():
    tensor = full(RANK)
    dist.broadcast(tensor, 1)
    assert tensor.tolist() == [1, 1]
    dist.reduce(tensor, 0)
    assert RANK or tensor.tolist() == [2, 2]
    dist.barrier()


def check_gathering():
    lists = [full(9) for _ in range(SIZE)]
    dist.all_gather(lists, full(RANK))
    assert [part.tolist() for part in lists] == [[0, 0], [1, 1]]
    whole = full(9, 4)
    dist.all_gather_single(whole, full(RANK))
    assert whole.tolist() == [0, 0, 1, 1]
    dist.all_gather_into_tensor(whole.zero_(), full(RANK))
    assert whole.tolist() == [0, 0, 1, 1]
    lists = [full(9) for _ in range(SIZE)] if RANK == 0 else None
    dist.gather(full(RANK), lists)
    assert RANK or lists[1].tolist() == [1, 1]


def check_scattering():
    part, parts = full(9), [full(0), full(1)]
    dist.scatter(part, parts if RANK == 0 else None)
    assert part.tolist() == [RANK, RANK]
    dist.reduce_scatter(part, parts)
    assert part.tolist() == [2 * RANK] * 2
    for scatter in (dist.reduce_scatter_single, dist.reduce_scatter_tensor):
        scatter(part.zero_(), torch.arange(4.0, device=NPU))
        assert part.tolist() == [4 * RANK, 4 * RANK + 2]
    dist.all_to_all_single(part, full(RANK))
    assert part.tolist() == [0, 1]


def check_send_and_receive():
    if RANK == 0:
        dist.send(full(7), 1)
    else:
        dist.recv(received := full(0), 0)
        assert received.tolist() == [7, 7]


def check_objects():
    gathered = [None] * SIZE
    dist.all_gather_object(gathered, {"rank": RANK})
    assert gathered == [{"rank": 0}, {"rank": 1}]
    dist.broadcast_object_list(sent := [f"from {RANK}"], 1)
    assert sent == ["from 1"]


def check_another_group():
    group = dist.new_group([0, 1])
    dist.all_reduce(tensor := full(1), group=group)
    assert tensor.tolist() == [2, 2] and dist.get_backend(group) == "hccl"


def check_cpu_tensors_are_refused():
    for call in (dist.all_reduce, lambda tensor: dist.broadcast(tensor, 0)):
        try:
            call(torch.ones(2))
        except RuntimeError as error:
            assert "cpu" in str(error)
        else:
            raise AssertionError("a CPU tensor went through hccl")


def check_hccl_reduces_neither_fp64_nor_bits():
    flags = torch.ones(2, device=NPU, dtype=torch.bool)
    wide = torch.ones(2, dtype=torch.float64).to(NPU)
    for call, message in (
        (lambda: dist.all_reduce(wide), "Unsupported data type torch.float64"),
        (lambda: dist.all_reduce(flags), "Unsupported data type torch.bool"),
        (lambda: dist.all_reduce(full(1, dtype=torch.int32), op=dist.ReduceOp.BOR), "ReduceOp.BOR with HCCL"),
        (lambda: dist.reduce_scatter_tensor(wide[:1], wide), "Unsupported data type torch.float64"),
    ):
        try:
            call()
        except RuntimeError as error:
            assert message in str(error), error
        else:
            raise AssertionError(message)
    dist.broadcast(wide, 0)  # what is only moved may be of any type


def small_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), nn.GELU(), nn.Linear(16, 2))


def trained(wrap, rows, make_optimizer=lambda model: torch.optim.AdamW(model.parameters(), lr=0.01)):
    """Parameters after three steps on the given rows of one fixed batch."""
    model = small_model().to(NPU)
    model = wrap(model)
    optimizer = make_optimizer(model)
    torch.manual_seed(1)
    batch = torch.randn(8, 8)
    for _ in range(3):
        model(batch[rows].to(NPU)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [getattr(p, "full_tensor", p.detach)() for p in model.parameters()]


MINE = slice(RANK * 4, RANK * 4 + 4)


def check_ddp_in_two_processes_is_one_process():
    single = trained(lambda model: model, slice(0, 8))
    double = trained(lambda model: nn.parallel.DistributedDataParallel(model, device_ids=[RANK]), MINE)
    torch.testing.assert_close(double, single, rtol=1e-5, atol=1e-7)


def check_ddp_without_synchronisation_while_accumulating():
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 1, bias=False).to(NPU), device_ids=[RANK])
    with model.no_sync():
        model(full(RANK + 1)[None]).sum().backward()
    assert model.module.weight.grad.tolist() == [[RANK + 1] * 2]
    model(full(RANK + 1)[None]).sum().backward()
    assert model.module.weight.grad.tolist() == [[3, 3]]


def check_zero_redundancy_optimizer_is_one_process():
    from torch.distributed.optim import ZeroRedundancyOptimizer

    single = trained(lambda model: model, slice(0, 8))
    sharded = trained(
        lambda model: nn.parallel.DistributedDataParallel(model, device_ids=[RANK]),
        MINE,
        lambda model: ZeroRedundancyOptimizer(model.parameters(), torch.optim.AdamW, lr=0.01),
    )
    torch.testing.assert_close(sharded, single, rtol=1e-5, atol=1e-7)


def check_fairscale_is_one_process():
    from fairscale.nn.data_parallel import ShardedDataParallel
    from fairscale.optim.oss import OSS

    made = []

    class Sharded:
        """fairscale's pair as one optimizer; gradients are zeroed through the module, or its buckets lose them."""

        def __init__(self, module):
            self.module, self.step = module, made[-1].step

        def zero_grad(self):
            self.module.zero_grad()

    def wrap(model):
        made.append(OSS(model.parameters(), torch.optim.AdamW, lr=0.01))
        return ShardedDataParallel(model, made[-1])

    single = trained(lambda model: model, slice(0, 8))
    torch.testing.assert_close(trained(wrap, MINE, Sharded), single, rtol=1e-5, atol=1e-7)


def check_fsdp_is_one_process():
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("npu", (SIZE,))
    single = trained(lambda model: model, slice(0, 8))
    sharded = trained(lambda model: fully_shard(model, mesh=mesh), MINE)
    torch.testing.assert_close(sharded, single, rtol=1e-5, atol=1e-7)


def moved_after_oss_was_made(patches):
    """A model on the CPU, OSS over it, and only then accelerate moves it: its parameters after three steps."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from fairscale.optim.oss import OSS

    from third_patch import apply

    undo = apply(patches)
    try:
        accelerator = Accelerator()
        model = small_model()
        optimizer = OSS(model.parameters(), torch.optim.AdamW, lr=0.01)
        wrapped, optimizer = accelerator.prepare(model, optimizer)
        torch.manual_seed(1)
        batch = torch.randn(8, 8)
        for _ in range(3):
            accelerator.backward(wrapped(batch[MINE].to(NPU)).square().mean())
            optimizer.step()
            optimizer.zero_grad()
        return [parameter.detach() for parameter in model.parameters()]
    finally:
        undo()
        AcceleratorState._reset_state()


def check_oss_follows_a_module_that_is_moved_to_the_npu():
    from third_patch import PATCHES

    single = trained(lambda model: model, slice(0, 8))
    torch.testing.assert_close(moved_after_oss_was_made(PATCHES), single, rtol=1e-5, atol=1e-7)
    without = [patch for patch in PATCHES if not patch.target.endswith("refresh_trainable")]
    try:
        moved_after_oss_was_made(without)
    except (RuntimeError, AssertionError) as error:
        assert "npu" in str(error) and "cpu" in str(error)
    else:
        raise AssertionError("fairscale follows by itself: the patch can go")


def check_accelerate_finds_the_process_group():
    from accelerate import Accelerator

    accelerator = Accelerator(mixed_precision="fp16")
    assert accelerator.device == NPU and accelerator.num_processes == SIZE
    assert accelerator.state.backend == "hccl" and accelerator.distributed_type == "MULTI_NPU"
    assert accelerator.gather(full(RANK, 1)).tolist() == [0, 1]
    assert accelerator.reduce(full(RANK, 1), "mean").tolist() == [0.5]
    model, optimizer = accelerator.prepare(model := small_model(), torch.optim.AdamW(model.parameters()))
    assert isinstance(model, nn.parallel.DistributedDataParallel)
    with accelerator.autocast():
        loss = model(torch.ones(2, 8, device=NPU)).square().mean()
    accelerator.backward(loss)
    optimizer.step()


def main(folder: str) -> None:
    """Run all checks in order; write {check: traceback or None}."""
    warnings.simplefilter("ignore")
    torch.npu.set_device(RANK)
    dist.init_process_group("hccl")
    failures = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                failures[name] = None
            except Exception:
                failures[name] = traceback.format_exc()
            (Path(folder) / f"{RANK}.json").write_text(json.dumps(failures))


if __name__ == "__main__":
    run_script(lambda: main(sys.argv[1]))
