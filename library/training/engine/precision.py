"""Mixed precision: one Accelerator that means the same on every device."""

import logging
from datetime import timedelta

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedDataParallelKwargs, GradScalerKwargs, InitProcessGroupKwargs

from library import device as devices
from library.errors import InputError

logger = logging.getLogger(__name__)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
SAVE_DTYPES = {None: None, "float": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def make_accelerator(mixed_precision: str, ddp_timeout: timedelta = timedelta(minutes=30)) -> Accelerator:
    """An Accelerator on this process's device, with autocast and, for fp16, loss scaling.

    accelerate turns fp16 off without a word on the CPU; here it is on there, too (slow, but the same arithmetic), so
    that what is tried on a small machine is what runs on the large one.

    Raises:
        InputError: the device cannot compute in this precision.
    """
    device = devices.default_device()
    initial_scale = devices.initial_loss_scale(device)
    handlers = [
        GradScalerKwargs(init_scale=initial_scale),
        InitProcessGroupKwargs(timeout=ddp_timeout),
        # Gradients lie in the buckets that travel, and not beside them once more.
        DistributedDataParallelKwargs(gradient_as_bucket_view=True),
    ]
    try:
        accelerator = Accelerator(mixed_precision=mixed_precision, cpu=devices.is_cpu(device), kwargs_handlers=handlers)
    except ValueError as error:
        if mixed_precision not in str(error):
            raise
        raise InputError(f"--mixed_precision={mixed_precision} does not go with this device: {error}") from error
    accelerator.gradient_accumulation_steps = 1  # the loop accumulates; a variable of `accelerate launch` must not, too
    if devices.is_cpu(device) and mixed_precision != "no":
        logger.warning(
            "mixed precision %s on the CPU is emulated and hundreds of times slower than fp32", mixed_precision
        )
    if devices.is_cpu(device) and mixed_precision == "fp16":
        accelerator.native_amp = True
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=initial_scale)
    return accelerator
