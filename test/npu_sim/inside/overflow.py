"""An fp16 overflow on one of two simulated NPUs, by every way of sharding; test/test_npu_sim.py starts two processes.

The profile of the device decides which scaler there is: torch's, or torch_npu's own on the first generation.
"""

import json
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "training" / "engine"))
import processes_child as child

from library import device as devices
from library.exit_status import run_script
from library.training.engine.loss_scale import ScalerState
from library.training.engine.precision import make_accelerator


class _InfiniteLastRow(torch.autograd.Function):
    """As it is; of the gradient the last column is infinite, and so the last row of the layer's weight's."""

    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        grad = grad.clone()
        grad[:, -1] = torch.inf
        return grad


class InOneShare(child.Regression):
    """In the fourth step, tried first, a gradient is infinite that one process alone owns a share of."""

    def loss(self, module, batch):
        bare = getattr(module, "module", module)
        if batch.step != 3 or getattr(self, "done", False):
            return super().loss(module, batch)
        self.done = True
        if not isinstance(bare[0].weight, DTensor):  # oss: a parameter has one owner
            bare[0].weight.register_hook(lambda gradient: gradient * self.factor() * self.factor())
            return super().loss(module, batch)
        hook = bare[0].register_forward_hook(lambda *given: _InfiniteLastRow.apply(given[-1]))
        loss = super().loss(module, batch)
        hook.remove()
        return loss

    def factor(self) -> float:
        """So much that two of it overflow fp32; from the third call on 1."""
        self.calls = getattr(self, "calls", 0) + 1
        return 1e38 if self.calls <= 2 else 1.0


def check_an_overflow_in_one_processs_share(kind: str) -> None:
    """The step is repeated on both at half the scale, and the weights stay the same on both."""
    _, calm = child.train(kind, precision="fp16")
    regression, child.Regression = child.Regression, InOneShare
    try:
        weights, lines = child.train(kind, precision="fp16")
    finally:
        child.Regression = regression
    assert child.same_on_both(weights), kind
    more = [line["overflows"] - before["overflows"] for line, before in zip(lines, calm, strict=True)]
    assert more == [0, 0, 0, 1, 0, 0, 0, 0], (kind, more)
    assert lines[-1]["loss_scale"] == calm[-1]["loss_scale"] / 2, kind


def main() -> None:
    """Compare runs with an overflow on either process with a calm one; write what was seen."""
    (child.OUT / f"rank{child.RANK}").mkdir(exist_ok=True)
    npu = devices.default_device()
    saturates = not devices.shows_overflow(npu)
    scaler = make_accelerator("fp16").scaler
    assert type(scaler) is (torch.npu.amp.GradScaler if saturates else torch.amp.GradScaler)
    ours = ScalerState(scaler)
    scaler.scale(torch.ones(1, device=npu))
    ours.load_state_dict({**torch.amp.GradScaler("cpu", init_scale=4.0).state_dict(), "_growth_tracker": 7})
    assert scaler.get_scale() == 4.0 and "dynamic" not in ours.state_dict()
    child.check_an_overflow_on_one_process_repeats_the_step_on_both()
    for kind in ("oss", "fsdp"):
        check_an_overflow_in_one_processs_share(kind)
    found = {"device": devices.device_name(npu), "world": dist.get_world_size()}
    (child.OUT / f"overflow{child.RANK}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    run_script(main)
