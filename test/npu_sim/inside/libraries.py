"""Checks of what accelerate and the device module see, in a child process (test/test_npu_sim.py starts them)."""

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from library import device as devices


@pytest.fixture
def accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)
    return Accelerator(mixed_precision="fp16")


def test_the_device_module_finds_the_npu():
    npu = devices.default_device()
    assert npu == torch.device("npu", 0) and devices.npu_available() and devices.is_npu(npu) and not devices.is_cpu(npu)
    held = torch.zeros(1000, device=npu)
    assert devices.peak_memory_bytes(npu) >= held.nbytes
    assert "Ascend" in devices.device_name(npu)
    assert devices.initial_loss_scale(npu) == 2**7
    devices.synchronize(npu)


def test_accelerate_picks_the_npu_and_scales_losses_on_it(accelerator):
    assert accelerator.device.type == "npu"
    assert type(accelerator.scaler) is torch.npu.amp.GradScaler
    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(4, 16), torch.nn.LayerNorm(16), torch.nn.Linear(16, 1))
    data = torch.utils.data.TensorDataset(inputs := torch.randn(32, 4), inputs.sum(1, keepdim=True))
    module, optimizer, loader = accelerator.prepare(
        module, torch.optim.AdamW(module.parameters(), 0.02), torch.utils.data.DataLoader(data, 8)
    )
    losses = []
    for _ in range(10):
        for x, y in loader:
            assert x.device.type == "npu"
            with accelerator.autocast():
                loss = torch.nn.functional.mse_loss(module(x), y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0] / 2


def test_an_overflow_skips_the_step_and_halves_the_scale(accelerator):
    module = torch.nn.Linear(2, 1, bias=False)
    module, optimizer = accelerator.prepare(module, torch.optim.SGD(module.parameters(), 0.1))
    before, scale = module.weight.detach().clone(), accelerator.scaler.get_scale()
    accelerator.backward(module(torch.ones(1, 2, device=accelerator.device)).sum() * float("inf"))
    optimizer.step()
    assert torch.equal(module.weight, before)
    assert optimizer.step_was_skipped
    assert accelerator.scaler.get_scale() == scale / 2


def test_state_of_training_is_saved_and_loaded(accelerator, tmp_path):
    module = torch.nn.Linear(2, 1)
    module, optimizer = accelerator.prepare(module, torch.optim.AdamW(module.parameters()))
    accelerator.backward(module(torch.ones(1, 2, device=accelerator.device)).sum())
    optimizer.step()
    saved = module.weight.detach().clone()
    accelerator.save_state(str(tmp_path))
    torch.nn.init.zeros_(module.weight)
    accelerator.load_state(str(tmp_path))
    assert torch.equal(module.weight, saved)
