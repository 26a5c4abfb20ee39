"""`torch.npu`: devices, memory figures, streams and random state of the simulated NPU."""

import torch

from torch_npu.npu import amp, random, utils
from torch_npu.npu._device import _resolve, _utils, device, device_of  # noqa: F401  _utils is for torch.load
from torch_npu.npu.memory import (
    empty_cache,
    max_memory_allocated,
    max_memory_reserved,
    mem_get_info,
    memory_allocated,
    memory_reserved,
    memory_stats,
    reset_max_memory_allocated,
    reset_peak_memory_stats,
    set_per_process_memory_fraction,
)
from torch_npu.npu.random import (
    get_rng_state,
    get_rng_state_all,
    initial_seed,
    manual_seed,
    manual_seed_all,
    seed,
    seed_all,
    set_rng_state,
    set_rng_state_all,
)

_initialized = True


def init() -> None:
    """Nothing to start."""


def is_initialized() -> bool:
    return True


def _is_in_bad_fork() -> bool:
    return False


def is_available() -> bool:
    return device_count() > 0


def device_count() -> int:
    return torch.ops.npu_sim.device_count()


def current_device() -> int:
    return torch.ops.npu_sim.current_device()


def set_device(device) -> None:
    torch.ops.npu_sim.set_device(_resolve(device))


def synchronize(device=None) -> None:
    """Everything is done when it returns; only the device is checked."""
    _resolve(device)


def get_device_name(device=None) -> str:
    _resolve(device)
    return torch.ops.npu_sim.device_name()


class _Properties:
    def __init__(self, name: str, total_memory: int) -> None:
        self.name, self.total_memory = name, total_memory


def get_device_properties(device=None) -> _Properties:
    return _Properties(get_device_name(device), mem_get_info(device)[1])


def get_device_capability(device=None) -> None:
    """Ascend has none; torch_npu returns None."""


def is_bf16_supported(including_emulation: bool = False) -> bool:
    return not torch.ops.npu_sim.first_generation()


def get_amp_supported_dtype() -> list[torch.dtype]:
    return [torch.float16, *([torch.bfloat16] if is_bf16_supported() else []), torch.float32]


_jit_compile = {"asked": True}


def set_compile_mode(jit_compile: bool = False) -> None:
    """Whether operators are compiled for each shape; the first generation does by default."""
    _jit_compile["asked"] = jit_compile


def is_jit_compile_false() -> bool:
    return not (_jit_compile["asked"] and torch.ops.npu_sim.first_generation())


class Stream(torch.Stream):
    """A stream; work on it is done when it is launched."""

    def __new__(cls, device=None, priority=0, **kwargs):
        return super().__new__(cls, device=torch.device("npu", _resolve(device)), priority=priority)


def Event(enable_timing=False, blocking=False, interprocess=False) -> torch.Event:
    """A point in time; whatever came before it is done. (torch compares events of its own class only.)"""
    return torch.Event(device="npu", enable_timing=enable_timing, blocking=blocking)


class stream:  # noqa: N801  torch's name
    """`with torch.npu.stream(s):`"""

    def __init__(self, stream) -> None:
        self.stream = stream

    def __enter__(self):
        return self.stream

    def __exit__(self, *_) -> None:
        pass


def current_stream(device=None) -> Stream:
    return Stream(device)


default_stream = current_stream


def set_stream(stream) -> None:
    pass


__all__ = [
    "Event",
    "Stream",
    "amp",
    "current_device",
    "current_stream",
    "default_stream",
    "device",
    "device_count",
    "device_of",
    "empty_cache",
    "get_amp_supported_dtype",
    "get_device_capability",
    "get_device_name",
    "get_device_properties",
    "get_rng_state",
    "get_rng_state_all",
    "init",
    "initial_seed",
    "is_available",
    "is_bf16_supported",
    "is_initialized",
    "is_jit_compile_false",
    "manual_seed",
    "manual_seed_all",
    "max_memory_allocated",
    "max_memory_reserved",
    "mem_get_info",
    "memory_allocated",
    "memory_reserved",
    "memory_stats",
    "random",
    "reset_max_memory_allocated",
    "reset_peak_memory_stats",
    "seed",
    "seed_all",
    "set_compile_mode",
    "set_device",
    "set_per_process_memory_fraction",
    "set_rng_state",
    "set_rng_state_all",
    "set_stream",
    "stream",
    "synchronize",
    "utils",
]  # fmt: skip
