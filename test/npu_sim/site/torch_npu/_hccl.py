"""The hccl process group: collectives of npu tensors through gloo, which sees their memory as CPU tensors."""

from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import _create_work_from_future


def register() -> None:
    """Make `init_process_group("hccl")` known, as torch_npu does on import."""
    if dist.is_available():
        dist.Backend.register_backend("hccl", _create, devices=["npu"])


def _create(store: dist.Store, rank: int, size: int, timeout: timedelta) -> "HcclGroup":
    return HcclGroup(dist.PrefixStore("hccl", store), rank, size, timeout)


def _tensors(value) -> list[Tensor]:
    """All tensors in nested lists, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, list | tuple):
        return [tensor for part in value for tensor in _tensors(part)]
    return []


def _aliases(value):
    """The same with CPU aliases for npu tensors."""
    if isinstance(value, Tensor):
        if value.device.type != "npu":
            raise RuntimeError(
                f"No backend type associated with device type {value.device.type} (hccl takes npu tensors)"
            )
        if not value.is_contiguous():
            raise RuntimeError("Tensors must be contiguous")
        with torch.no_grad():
            return torch.ops.npu_sim.cpu_alias(value.detach())
    if isinstance(value, list | tuple):
        return [_aliases(part) for part in value]
    return value


# What HCCL reduces, and how; what it moves may be of any type.
_REDUCED = {torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.float32, torch.bfloat16}


def _check_reduction(name: str, tensors: list[Tensor], options: Any) -> None:
    for tensor in tensors:
        if tensor.dtype not in _REDUCED:
            raise RuntimeError(f"HCCL {name}: Unsupported data type {tensor.dtype}")
    for operation in ("BAND", "BOR", "BXOR"):
        if options is not None and options.reduceOp == getattr(dist.ReduceOp, operation):
            raise RuntimeError(f"Cannot use ReduceOp.{operation} with HCCL")


def _done(outputs: list[Tensor]) -> dist.Work:
    devices = list({tensor.device for tensor in outputs})
    future = torch.futures.Future(devices=devices)
    future.set_result(outputs)
    return _create_work_from_future(future)


def _collective(name: str):
    """A method that runs gloo's of that name; the first argument holds what comes out."""

    def run(self: "HcclGroup", *arguments, **options) -> dist.Work:
        if "reduce" in name:
            given = [*arguments[1:], *options.values()]
            _check_reduction(
                name, _tensors(arguments[0]), next((one for one in given if hasattr(one, "reduceOp")), None)
            )
        work = getattr(self.inner, name)(*map(_aliases, arguments), **options)
        if work is not None:
            work.wait()
        return _done(_tensors(arguments[0]) if arguments else [])

    run.__name__ = name
    return run


class HcclGroup(dist.ProcessGroup):
    """What torch.distributed talks to; each call returns when its result is there."""

    def __init__(self, store: dist.Store, rank: int, size: int, timeout: timedelta) -> None:
        super().__init__(rank, size)
        gloo = dist.ProcessGroupGloo(store, rank, size, timeout)
        self.gloo = gloo
        # Under a ProcessGroup of its own gloo has every name that ProcessGroup has.
        self.inner = dist.ProcessGroup(dist.PrefixStore("inner", store), rank, size)
        self.inner._register_backend(torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO, gloo)
        self.inner._set_default_backend(dist.ProcessGroup.BackendType.GLOO)
        # Object collectives ask a group for its devices and their backends.
        self._register_backend(torch.device("npu"), dist.ProcessGroup.BackendType.CUSTOM, gloo)

    def getBackendName(self) -> str:
        return "hccl"

    def barrier(self, *_, **__) -> dist.Work:
        self.inner.barrier().wait()
        return _done([])

    def reduce_scatter(self, outputs, inputs, *options, **named) -> dist.Work:
        """gloo has none for lists: sum everything everywhere, keep one's own part."""
        opts = options[0] if options else named.get("opts", dist.ReduceScatterOptions())
        for output, parts in zip(outputs, inputs, strict=True):
            self._reduce_scatter(output, torch.cat([part.reshape(-1) for part in parts]), opts)
        return _done(_tensors(outputs))

    def reduce_scatter_single(self, output, whole, *options, **named) -> dist.Work:
        opts = options[0] if options else named.get("opts", dist.ReduceScatterOptions())
        self._reduce_scatter(output, whole.reshape(-1).clone(), opts)
        return _done([output])

    _reduce_scatter_base = reduce_scatter_single

    def _reduce_scatter(self, output: Tensor, flat: Tensor, opts: dist.ReduceScatterOptions) -> None:
        _check_reduction("reduce_scatter", [flat], opts)
        reduce = dist.AllreduceOptions()
        reduce.reduceOp = opts.reduceOp
        self.inner.allreduce([_aliases(flat)], reduce).wait()
        with torch.no_grad():
            output.copy_(flat.chunk(self.size())[self.rank()].view_as(output))


for _name in (
    "allreduce", "allreduce_coalesced", "broadcast", "reduce", "allgather", "all_gather_single", "_allgather_base",
    "allgather_coalesced", "all_gather_single_coalesced", "allgather_into_tensor_coalesced", "gather", "scatter",
    "all_to_all_single", "alltoall_base", "alltoall", "send", "recv", "recv_anysource",
):  # fmt: skip
    if hasattr(dist.ProcessGroup, _name):
        setattr(HcclGroup, _name, _collective(_name))
