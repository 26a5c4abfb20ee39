"""The only module that knows Ascend NPUs, NVIDIA GPUs and the CPU apart.

`torch_npu` is imported here and nowhere else, inside functions, so that everything else runs where it is not installed.
"""

import ctypes
import functools
import importlib.util
import os
import resource
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError

# Seconds by which the process group waits longer than HCCL, so that HCCL's error, which names the cause, comes first.
_SECONDS_AFTER_HCCL = 60
_MOST_SECONDS_OF_FIRST_910 = 17340  # of HCCL_EXEC_TIMEOUT there; later devices take any number

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # malloc.h's names of glibc's parameters


@functools.lru_cache(maxsize=1)
def torch_npu() -> ModuleType | None:
    """The torch_npu package, imported once; None where it is not installed.

    Raises:
        InputError: it is installed but cannot be imported (usually CANN's environment is not set).
    """
    if importlib.util.find_spec("torch_npu") is None:
        return None
    try:
        return importlib.import_module("torch_npu")
    except Exception as error:
        raise InputError(
            f"torch_npu is installed but cannot be imported ({error}). Source CANN's set_env.sh first "
            "(test/env_npu.sh does it), or uninstall torch_npu to train on another device."
        ) from error


def torch_npu_of(device: torch.device) -> Any:
    """torch_npu for a device that is an Ascend NPU, None for any other."""
    return torch_npu() if is_npu(device) else None


def npu_available() -> bool:
    """True if an Ascend NPU can be used."""
    return torch_npu() is not None and bool(torch.npu.is_available())  # type: ignore[attr-defined]


def default_device() -> torch.device:
    """The device of this process: npu:LOCAL_RANK, cuda:LOCAL_RANK or cpu, in this order of preference.

    Raises:
        InputError: more processes than devices.
    """
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    for kind, available in (("npu", npu_available), ("cuda", torch.cuda.is_available)):
        if available():
            count = getattr(torch, kind).device_count()
            if local_rank >= count:
                raise InputError(
                    f"process {local_rank} of this machine finds no device of its own, {count} of kind {kind} can be "
                    f"seen; start at most {count} processes (--nproc_per_node), or let more be seen "
                    "(ASCEND_RT_VISIBLE_DEVICES, CUDA_VISIBLE_DEVICES)"
                )
            return torch.device(kind, local_rank)
    return torch.device("cpu")


def _module(device: torch.device) -> ModuleType | None:
    """`torch.cuda` or `torch.npu`; None for the CPU."""
    return None if device.type == "cpu" else getattr(torch, device.type)


def is_cpu(device: torch.device) -> bool:
    """True for the CPU, where half precision is emulated and memory is the process's own."""
    return device.type == "cpu"


@functools.lru_cache(maxsize=1)
def cpu_is_intels() -> bool:
    """True if the processor is Intel's, for which MKL is made; False if the system does not tell the maker."""
    try:
        facts = Path("/proc/cpuinfo").read_text(errors="replace")
    except OSError:
        return False
    return "GenuineIntel" in facts


def is_npu(device: torch.device) -> bool:
    """True for an Ascend NPU."""
    return device.type == "npu"


def has_bf16(device: torch.device) -> bool:
    """True if the device computes in bf16; False for an Ascend before 910B1, and for nothing else that trains here."""
    return not is_npu(device) or bool(torch.npu.is_bf16_supported())  # type: ignore[attr-defined]


def is_before_910b1(device: torch.device) -> bool:
    """True for an Ascend of the first generation (910A, 910ProB; "Ascend910B" alone is one, too).

    It has no fused attention for training, no fused optimizer, no bf16, and computes fp32 products from fp16 numbers.
    """
    return not has_bf16(device)


def has_fused_attention(device: torch.device) -> bool:
    """False if every attention backend of the device keeps the matrix of scores in memory."""
    return not is_before_910b1(device)


def has_fused_geglu(device: torch.device) -> bool:
    """True if the feed-forward's gated unit is one operator: torch_npu's npu_geglu, on Ascend 910B1 and later.

    The first Ascend 910 is not among the devices for which its kernel is documented.
    """
    return is_npu(device) and not is_before_910b1(device)


def shows_overflow(device: torch.device) -> bool:
    """False if an overflow leaves the largest number behind instead of infinity: the first Ascend 910 saturates.

    A later one does where INF_NAN_MODE_FORCE_DISABLE=1 asks for it. An overflow is then a flag of the device, which
    torch_npu's own GradScaler reads.
    """
    return not is_npu(device) or bool(torch.npu.utils.is_support_inf_nan())  # type: ignore[attr-defined]


def fused_optimizers(device: torch.device) -> tuple[type[torch.optim.Optimizer], ...]:
    """The optimizers of torch whose `fused` form has a kernel on the device.

    torch_npu 2.14 has one for AdamW, which needs CANN's ApplyAdamWV2 of Ascend 910B1 and later. Its Adam falls back to
    the CPU, with a warning once: every weight would travel there and back in each step.
    """
    if not is_npu(device):
        return (torch.optim.Adam, torch.optim.AdamW)
    return () if is_before_910b1(device) else (torch.optim.AdamW,)


def prepare(device: torch.device) -> None:
    """Settings of a device before anything runs on it; only the first Ascend 910 needs one.

    By default it compiles an operator anew for each shape, minutes for a convolution, and buckets have many shapes.
    """
    if is_before_910b1(device):
        torch.npu.set_compile_mode(jit_compile=False)  # type: ignore[attr-defined]


def collective_timeout(device: torch.device, asked: timedelta) -> timedelta:
    """How long the process group shall wait, so that a collective may take the time that was asked for.

    On Ascend a collective ends after HCCL_EXEC_TIMEOUT, 1836 s where nothing sets it, whatever the process group was
    told. It is set to what was asked unless the environment has it, and the process group waits a little longer, so
    that HCCL's error comes before torch_npu's watchdog. To be called before the process group is made.

    Raises:
        InputError: HCCL_EXEC_TIMEOUT is set and no number of seconds.
    """
    if not is_npu(device):
        return asked
    seconds = int(asked.total_seconds())
    if is_before_910b1(device):
        seconds = min(seconds, _MOST_SECONDS_OF_FIRST_910)
    given = os.environ.setdefault("HCCL_EXEC_TIMEOUT", str(seconds))
    try:
        of_hccl = float(given)  # CANN 9 takes parts of a second
    except ValueError as error:
        raise InputError(
            f"HCCL_EXEC_TIMEOUT={given} in the environment is no number of seconds; correct or unset it"
        ) from error
    longest = max(asked.total_seconds(), of_hccl)  # 0 stands for no limit of HCCL's
    return timedelta(seconds=longest + _SECONDS_AFTER_HCCL)


def without_autocast(device_type: str) -> AbstractContextManager:
    """A context in which autocast is off for that type of device."""
    return torch.autocast(device_type, enabled=False) if has_autocast(device_type) else nullcontext()


def has_autocast(device_type: str) -> bool:
    """True if autocast is on for that type of device; the meta device has no autocast."""
    return torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type)


def synchronize(device: torch.device) -> None:
    """Wait until all work launched on the device is done; on the CPU nothing happens."""
    module = _module(device)
    if module is not None:
        module.synchronize(device)


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """A copy on the device, made without waiting for the device's pending work; on the CPU the tensor itself.

    A plain `.to` from memory that is not pinned returns only when the device has finished all earlier work.
    """
    return tensor if is_cpu(device) else tensor.pin_memory().to(device, non_blocking=True)


class CopyStream:
    """Copies between the CPU and a device on a separate stream, while the device computes."""

    def __init__(self, device: torch.device) -> None:
        """Make the stream; `device` must not be the CPU."""
        module = _module(device)
        assert module is not None
        self._device, self._module = device, module
        self._stream = module.Stream(device=device)

    def to_device(self, tensors: Sequence[Tensor]) -> tuple[list[Tensor], Any]:
        """Start copies of pinned tensors on the separate stream; returns the copies and the event for `wait`."""
        with self._module.stream(self._stream):
            copies = [tensor.to(self._device, non_blocking=True) for tensor in tensors]
            come = self._module.Event()
            come.record(self._stream)
        return copies, come

    def wait(self, come: Any, copies: Sequence[Tensor]) -> None:
        """Make work that is launched from now on wait for the copies, and keep their memory until that work is done."""
        computing = self._module.current_stream(self._device)
        computing.wait_event(come)
        for copy in copies:
            copy.record_stream(computing)

    def to_host(self, tensor: Tensor) -> tuple[Tensor, Any]:
        """Start a copy to pinned CPU memory after all earlier work; returns the copy and the event to wait for."""
        copy = torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=True).copy_(tensor, non_blocking=True)
        come = self._module.Event()
        come.record(self._module.current_stream(self._device))
        return copy, come


@contextmanager
def autocast_cache_off() -> Iterator[None]:
    """A context in which autocast casts a weight at every use and keeps no copy."""
    before = torch.is_autocast_cache_enabled()
    torch.set_autocast_cache_enabled(False)
    try:
        yield
    finally:
        torch.set_autocast_cache_enabled(before)


def release_memory(device: torch.device) -> None:
    """Return the allocator's unused memory to the device; on the CPU nothing happens."""
    module = _module(device)
    if module is not None:
        module.empty_cache()


def peak_memory_bytes(device: torch.device) -> int:
    """Peak memory so far in bytes: of tensors on an accelerator, of the process's resident set on the CPU."""
    module = _module(device)
    if module is None:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # Linux counts in KiB
    return int(module.max_memory_allocated(device))


def keep_freed_memory(device: torch.device) -> None:
    """On the CPU, make the process keep freed blocks of up to 32 MiB for the next step.

    By default glibc returns them to the system, and each step spends some 3 % of forward and backward on getting the
    pages again (docs/measurements/train_step.md). With another C library nothing happens.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if is_cpu(device) and mallopt is not None:
        mallopt(_M_MMAP_THRESHOLD, 32 * 2**20)  # the most that every glibc takes
        mallopt(_M_TRIM_THRESHOLD, -1)


def device_name(device: torch.device) -> str:
    """The device's name for reports, for example 'NVIDIA H200', 'Ascend910B', 'CPU'."""
    module = _module(device)
    return "CPU" if module is None else str(module.get_device_name(device))


def initial_loss_scale(device: torch.device) -> float:
    """The initial fp16 loss scale: 2^7 on Ascend, where 2^16 overflows many times, and torch's 2^16 elsewhere."""
    return 2.0**7 if is_npu(device) else 2.0**16


def step_profiler(device: torch.device, folder: Path, name: str, steps: int) -> Any:
    """A profiler of so many steps, with `start`, `step` after each and `stop`, which writes a trace into the folder.

    torch_npu's on Ascend, which writes NAME_…_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json, torch's elsewhere,
    which writes NAME.….pt.trace.json. Both are in Chrome's format; the latter TensorBoard's plugin opens, too.
    """
    profiler: Any = torch.profiler if torch_npu_of(device) is None else importlib.import_module("torch_npu.profiler")
    return profiler.profile(
        activities=profiler.supported_activities(),
        schedule=profiler.schedule(wait=0, warmup=0, active=steps, repeat=1),
        on_trace_ready=profiler.tensorboard_trace_handler(str(folder), worker_name=name),
        record_shapes=True,
    )


def grad_scaler(device: torch.device) -> Any:
    """The GradScaler of a device: torch's, and torch_npu's where an overflow leaves no infinity behind.

    torch_npu's reads the device's overflow flag, which the first Ascend 910 needs. On later ones torch's is better: it
    waits for the device twice less in a step, and it decides by the tensor that processes agree on.
    """
    scale = initial_loss_scale(device)
    if not shows_overflow(device):
        return torch.npu.amp.GradScaler(init_scale=scale)  # type: ignore[attr-defined]
    return torch.amp.GradScaler(device.type, init_scale=scale)
