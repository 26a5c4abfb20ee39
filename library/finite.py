"""Whether tensors hold finite numbers alone, found in one quick pass."""

import torch
from torch import Tensor

from library.device import is_cpu


def is_finite(tensor: Tensor) -> bool:
    """False where a number is NaN or infinite; integers are all finite.

    The least and the largest number are found in one pass, and NaN is both of them where there is one: on a CPU that
    takes a thirtieth of the time of `isfinite().all()`, half a second for all weights of SDXL. Whether other devices'
    kernels pass NaN on so is not known of all of them.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return True
    if not is_cpu(tensor.device):
        return bool(tensor.isfinite().all())
    least, most = torch.aminmax(tensor)
    return bool(torch.isfinite(least) & torch.isfinite(most))
