"""The memory estimate against the storages of a real step, counted while it runs."""

import copy

import pytest
import torch
from torch import nn

from library.models.conditioned_unet import ConditionedUNet
from library.models.sdxl import SDXLModel
from library.models.vae import encode_images
from library.training.memory import LiveBytes, estimate, without_data

BATCH = 4


def conditioned(sdxl, gradient_checkpointing):
    parts = (copy.deepcopy(part) for part in (sdxl.unet, sdxl.vae, sdxl.text_encoder1, sdxl.text_encoder2))
    model = SDXLModel(*parts, sdxl.tokenizer1, sdxl.tokenizer2)
    return ConditionedUNet(model, train_te1=True, train_te2=False, gradient_checkpointing=gradient_checkpointing)


def encode(shapes):
    return encode_images(shapes, torch.empty(BATCH, 32, 32, 3, dtype=torch.uint8, device="meta"))


def predict(sdxl, module, side=16):
    return estimate(module, sdxl.vae, torch.float32, loss_on("meta", side), encode)


def loss_on(device, side=16):
    def loss(module):
        ids = torch.zeros(BATCH, 1, 77, dtype=torch.int64, device=device)
        noisy = torch.zeros(BATCH, 4, side, side, device=device)
        return module(noisy, torch.zeros(BATCH, device=device), ids, ids, torch.zeros(BATCH, 6, device=device)).mean()

    return loss


@pytest.mark.parametrize("gradient_checkpointing", [False, True])
def test_the_estimate_is_what_a_real_step_holds(sdxl, gradient_checkpointing):
    module = conditioned(sdxl, gradient_checkpointing)
    predicted = predict(sdxl, module)
    vae_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sdxl.vae.state_dict().values())
    with LiveBytes() as live:
        live.hold([*module.parameters(), *module.buffers()])
        loss_on("cpu")(module).backward()
    assert predicted.weights - vae_bytes + predicted.backward == pytest.approx(live.peak, rel=0.1)


def test_encoding_is_what_the_vae_really_holds(sdxl):
    predicted = predict(sdxl, conditioned(sdxl, False))
    with LiveBytes() as live:
        encode_images(sdxl.vae, torch.zeros(BATCH, 32, 32, 3, dtype=torch.uint8))
    assert predicted.encoding == pytest.approx(live.peak, rel=0.1)


def test_checkpointing_is_seen_to_save_and_adamw_to_cost_two_states(sdxl):
    plain, checkpointed = (predict(sdxl, conditioned(sdxl, on), side=64) for on in (False, True))
    assert checkpointed.backward < 0.8 * plain.backward
    trained = [p for p in conditioned(sdxl, False).parameters() if p.requires_grad]
    assert plain.optimizer == 2 * 4 * sum(parameter.numel() for parameter in trained)
    assert plain.total == plain.weights + plain.optimizer + plain.backward
    assert "GiB" in plain.lines()[0]


def test_a_copy_without_data_has_the_shapes_and_leaves_the_original_alone():
    original = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    original[0].weight.requires_grad_(False)
    shapes = without_data(original, torch.float16)
    assert {name: tensor.shape for name, tensor in shapes.state_dict().items()} == {
        name: tensor.shape for name, tensor in original.state_dict().items()
    }
    assert all(tensor.is_meta for tensor in shapes.state_dict().values())
    assert not shapes[0].weight.requires_grad and shapes[0].bias.requires_grad
    assert shapes[0].weight.dtype == torch.float16 and shapes[1].num_batches_tracked.dtype == torch.int64
    assert not original[0].weight.is_meta and original[0].weight.dtype == torch.float32


def test_freed_storages_are_no_longer_counted_and_views_count_once():
    with LiveBytes() as live:
        first = torch.zeros(1000)
        view = first[10:]
        second = torch.zeros(500)
        assert live.bytes == 6000
        del second, view
        assert live.bytes == 4000
        del first
    assert (live.bytes, live.peak) == (0, 6000)
