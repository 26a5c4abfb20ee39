"""The memory estimate against the device's own counters, in a child process (test/test_npu_sim.py starts it)."""

import copy
from functools import partial

import pytest
import torch
from torch import nn

from library.models.unet import UNet, UNetConfig
from library.training.engine.optimizers import make_optimizer
from library.training.memory.estimate import estimate
from library.training.memory.resident import Training

NPU = torch.device("npu", 0)
TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 2), transformer_depth_middle=2,
    context_dim=64, adm_in_channels=64 + 6 * 256,
)  # fmt: skip


class Network(nn.Module):
    """A U-Net as the estimator takes what trains."""

    def __init__(self, checkpointing):
        super().__init__()
        self.unet = UNet(TINY)
        self.unet.enable_gradient_checkpointing(checkpointing)
        self.unet.set_attention_backend("math")  # the simulated device writes attention out

    def sharding_units(self):
        return []

    def forward(self, device, dtype, batch, side):
        def made(*shape, dtype=torch.float32):
            return torch.zeros(*shape, device=device, dtype=dtype)

        text_BTX, vector_BV = made(batch, 77, 64, dtype=dtype), made(batch, 64 + 6 * 256, dtype=dtype)
        return self.unet(made(batch, 4, side, side), made(batch), text_BTX, vector_BV).float().mean()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("checkpointing", "batch", "side"), [(True, 1, 8), (True, 2, 32), (False, 1, 8)])
def test_forward_and_backward_hold_what_is_estimated(dtype, checkpointing, batch, side):
    """Under autocast its half copies are among it: those that it keeps for the pass, and those that backward needs."""
    network, no_vae = Network(checkpointing), nn.Identity()
    training = Training(partial(make_optimizer, "SGD", arguments=[]), fused_geglu=True)
    predicted = estimate(
        network, no_vae, dtype, lambda shapes: shapes("meta", dtype, batch, side), lambda shapes: None, training
    )
    network = copy.deepcopy(network).to(NPU)
    before = torch.npu.memory_allocated()
    torch.npu.reset_peak_memory_stats()
    with torch.autocast("npu", dtype=dtype, enabled=dtype != torch.float32):
        loss = network(NPU, dtype, batch, side)
    loss.backward()
    assert predicted.backward == pytest.approx(torch.npu.max_memory_allocated() - before, rel=0.01)
