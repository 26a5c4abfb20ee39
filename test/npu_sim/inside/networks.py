"""Branches of a network module train beside a frozen U-Net; test_npu_sim_pretrain.py notes the operators."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[2] / "models"))
from low_rank import put_low_rank_on

from library.models.unet import UNet, UNetConfig

TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1), transformer_depth_middle=1,
    context_dim=64, adm_in_channels=64 + 6 * 256,
)  # fmt: skip


def test_low_rank_branches_train():
    torch.manual_seed(0)
    unet = UNet(TINY)
    paths = [name for name, layer in unet.named_modules() if isinstance(layer, torch.nn.Linear | torch.nn.Conv2d)][::3]
    branches = torch.nn.ModuleList(put_low_rank_on(unet, paths).values())
    unet.to("npu")
    branches.to("npu")
    optimizer = torch.optim.AdamW(branches.parameters(), lr=1e-3, fused=True)
    for dtype in (torch.float32, torch.float16):
        with torch.autocast("npu", dtype=dtype, enabled=dtype != torch.float32):
            noisy = torch.randn(2, 4, 8, 8, device="npu")
            text, vector = torch.randn(2, 77, 64, device="npu"), torch.randn(2, 64 + 6 * 256, device="npu")
            loss = unet(noisy, torch.ones(2, device="npu"), text, vector).float().square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert all(branch.calls for branch in branches) and torch.isfinite(loss)
