"""`torch.npu.amp`: loss scaling and autocast."""

import torch
import torch.distributed as dist

from torch_npu.npu import utils


class GradScaler(torch.amp.GradScaler):
    """As torch_npu 2.14's: whether a step is skipped and the scale falls is a flag of its own, not a tensor.

    It waits for the device where torch's does not. Processes agree on the flag only where the device saturates. Its
    state has a key more than torch's, without which it loads none.
    """

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
        self._dynamic, self._has_overflow, self._clear_overflow_flag = dynamic, False, False

    def scale(self, outputs):
        if not utils.is_support_inf_nan() and self._dynamic and not self._clear_overflow_flag:
            torch.ops.npu_sim.overflowed(True)  # what came before the step is forgotten
        self._clear_overflow_flag = True
        return super().scale(outputs)

    def _unscale_grads_(self, optimizer, inv_scale, found_inf, allow_fp16):
        gradients = {}
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    gradients.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        if torch.float16 in gradients and not allow_fp16:
            raise TypeError("Attempting to unscale FP16 gradients.")
        for some in gradients.values():
            if not self._dynamic:
                for gradient in some:
                    gradient.mul_(inv_scale)
                continue
            torch._amp_foreach_non_finite_check_and_unscale_(some, found_inf, inv_scale)
            self._has_overflow = self._has_overflow or found_inf.item() > 0
        if not utils.is_support_inf_nan() and self._dynamic and dist.is_initialized():
            everywhere = torch.full((1,), float(self._has_overflow), device=found_inf.device)
            dist.all_reduce(everywhere)
            self._has_overflow = everywhere.item() > 0
        if self._has_overflow:
            found_inf.add_(1)
        return {found_inf.device: found_inf}

    def _maybe_opt_step(self, optimizer, optimizer_state, *args, **kwargs):
        found = sum(value.item() for value in optimizer_state["found_inf_per_device"].values())
        if self._dynamic and (found or self._has_overflow):
            print("Gradient overflow. Skipping step")
            return None
        return optimizer.step(*args, **kwargs)

    def step(self, optimizer, *args, **kwargs):
        if getattr(optimizer, "_step_supports_amp_scaling", False):
            return optimizer.step(*args, **dict(kwargs, grad_scaler=self))
        return super().step(optimizer, *args, **kwargs)

    def update(self, new_scale=None) -> None:
        scale, tracker = self._check_scale_growth_tracker("update")
        if new_scale is not None:
            scale.fill_(new_scale)
        elif self._dynamic and self._has_overflow:
            scale.mul_(self._backoff_factor)
            tracker.zero_()
            print(f"Loss scaler reducing loss scale to {scale.item()}")
        elif self._dynamic:
            tracker.add_(1)
            if tracker.item() == self._growth_interval:
                scale.mul_(self._growth_factor)
                tracker.zero_()
                print(f"Loss scaler increasing loss scale to {scale.item()}")
        self._per_optimizer_states.clear()
        self._has_overflow = self._clear_overflow_flag = False

    def state_dict(self):
        return {**super().state_dict(), "dynamic": self._dynamic}

    def load_state_dict(self, state_dict) -> None:
        super().load_state_dict(state_dict)
        self._dynamic = state_dict["dynamic"]


class autocast(torch.amp.autocast):  # noqa: N801  torch's name
    """torch.autocast("npu")."""

    def __init__(self, enabled=True, dtype=torch.float16, cache_enabled=True) -> None:
        super().__init__("npu", dtype=dtype, enabled=enabled, cache_enabled=cache_enabled)


__all__ = ["GradScaler", "autocast"]
