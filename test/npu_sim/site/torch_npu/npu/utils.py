"""`torch.npu.utils`: what the device can."""

import torch


def is_support_inf_nan() -> bool:
    """False where an overflow leaves the largest number behind: the first generation."""
    return not torch.ops.npu_sim.first_generation()
