"""Mixed precision: one Accelerator that means the same on every device."""

import logging
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from library import device as devices
from library.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(mixed_precision: str, ddp_timeout: timedelta = timedelta(minutes=30)) -> Accelerator:
    """An Accelerator on this process's device, with autocast and, for fp16, loss scaling.

    accelerate turns fp16 off without a word on the CPU; here it is on there, too (slow, but the same arithmetic), so
    that what is tried on a small machine is what runs on the large one.

    Args:
        ddp_timeout: how long a collective waits for the other processes.

    Raises:
        InputError: the device cannot compute in this precision.
    """
    device = devices.default_device()
    devices.prepare(device)
    _check(device, mixed_precision)
    handlers = [
        InitProcessGroupKwargs(timeout=devices.collective_timeout(device, ddp_timeout)),
        # Gradients lie in the buckets that travel, and not beside them once more.
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=devices.is_cpu(device), kwargs_handlers=handlers)
    except ValueError as error:
        if f"{mixed_precision} mixed precision" not in str(error):
            raise
        raise InputError(f"--mixed_precision={mixed_precision} does not go with this device: {error}") from error
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates; a variable of `accelerate launch` must not, too
    if devices.is_cpu(device) and mixed_precision != "no":
        logger.warning(
            "mixed precision %s on the CPU is emulated and hundreds of times slower than fp32", mixed_precision
        )
    if mixed_precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = devices.grad_scaler(device)
    return accelerator


def _check(device: torch.device, mixed_precision: str) -> None:
    """Raise InputError where the device cannot compute so; a warning where it is none that the project supports."""
    if not devices.is_before_910b1(device):
        return
    name = devices.device_name(device)
    if mixed_precision == "bf16":
        raise InputError(f"--mixed_precision=bf16: {name} does not compute in bf16; use --mixed_precision=fp16")
    logger.warning(
        "%s is older than the Ascend 910B1, the first that this project supports: it has no fused attention, no fused "
        "optimizer and no bf16, computes fp32 products from fp16 numbers, and shows an overflow as 65504 (loss scaling "
        "reads the device's flag for it). Train with --mixed_precision=fp16, and judge the results",
        name,
    )
