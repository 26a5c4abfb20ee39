"""Bytes that tensors hold on a device."""

import torch

from torch_npu.npu._device import _resolve

TOTAL_BYTES = 64 * 2**30


def memory_allocated(device=None) -> int:
    return torch.ops.npu_sim.memory_allocated(_resolve(device))


def max_memory_allocated(device=None) -> int:
    return torch.ops.npu_sim.max_memory_allocated(_resolve(device))


def reset_peak_memory_stats(device=None) -> None:
    torch.ops.npu_sim.reset_peak(_resolve(device))


reset_max_memory_allocated = reset_peak_memory_stats
memory_reserved = memory_allocated  # nothing is cached
max_memory_reserved = max_memory_allocated


def memory_stats(device=None) -> dict[str, int]:
    return {
        "allocated_bytes.all.current": memory_allocated(device),
        "allocated_bytes.all.peak": max_memory_allocated(device),
        "reserved_bytes.all.current": memory_reserved(device),
        "reserved_bytes.all.peak": max_memory_reserved(device),
    }


def mem_get_info(device=None) -> tuple[int, int]:
    """Free and total bytes."""
    return TOTAL_BYTES - memory_allocated(device), TOTAL_BYTES


def empty_cache() -> None:
    pass


def set_per_process_memory_fraction(fraction: float, device=None) -> None:
    _resolve(device)
