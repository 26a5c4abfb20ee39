"""`torch.npu.amp`: loss scaling and autocast."""

import torch


class GradScaler(torch.amp.GradScaler):
    """torch's, on the NPU. `dynamic` False keeps the scale."""

    def __init__(
        self,
        init_scale=2.0**16,
        growth_factor=2.0,
        backoff_factor=0.5,
        growth_interval=2000,
        dynamic=True,
        enabled=True,
    ) -> None:
        super().__init__("npu", init_scale, growth_factor, backoff_factor, growth_interval, enabled)
        self._dynamic = dynamic

    def update(self, new_scale=None) -> None:
        if self._dynamic:
            return super().update(new_scale)
        kept = self.get_scale()
        return super().update(kept if new_scale is None else new_scale)


class autocast(torch.amp.autocast):  # noqa: N801  torch's name
    """torch.autocast("npu")."""

    def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True) -> None:
        super().__init__("npu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


__all__ = ["GradScaler", "autocast"]
