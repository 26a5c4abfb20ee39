"""Which device is meant."""

from types import SimpleNamespace

import torch


def _resolve(device=None) -> int:
    """The index of a device given as None (the current one), number, name or torch.device.

    Raises:
        ValueError: it is another kind of device.
        RuntimeError: there is no such device.
    """
    if device is None:
        return torch.ops.npu_sim.current_device()
    if isinstance(device, str):
        device = torch.device(device)
    if isinstance(device, torch.device):
        if device.type != "npu":
            raise ValueError(f"Expected a npu device, but got: {device}")
        device = torch.ops.npu_sim.current_device() if device.index is None else device.index
    if not 0 <= device < torch.ops.npu_sim.device_count():
        raise RuntimeError(f"Invalid NPU device ID {device}, there are {torch.ops.npu_sim.device_count()}")
    return int(device)


# torch's serialization looks here.
_utils = SimpleNamespace(_get_device_index=lambda device, optional=False, allow_cpu=False: _resolve(device))


class device:  # noqa: N801  torch's name
    """`with torch.npu.device(1):`"""

    def __init__(self, device) -> None:
        self.index = None if device is None or device == -1 else _resolve(device)

    def __enter__(self) -> None:
        self.before = torch.ops.npu_sim.current_device()
        if self.index is not None:
            torch.ops.npu_sim.set_device(self.index)

    def __exit__(self, *_) -> None:
        torch.ops.npu_sim.set_device(self.before)


class device_of(device):  # noqa: N801  torch's name
    """The device of a tensor; of a CPU tensor, none."""

    def __init__(self, tensor) -> None:
        super().__init__(tensor.device if tensor.device.type == "npu" else None)
