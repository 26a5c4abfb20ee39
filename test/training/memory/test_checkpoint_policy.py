"""Selective checkpointing: what is chosen holds the limit in a real step, and changes no gradient."""

import copy
from dataclasses import replace
from functools import partial

import pytest
import torch

from library.errors import InputError
from library.models.denoiser import Denoiser
from library.models.text import Tokens
from library.models.unet import ResBlock, TransformerBlock
from library.models.vae import encode_images
from library.training.engine.optimizers import make_optimizer
from library.training.memory.checkpoint_policy import BlockCost, block_costs, checkpoint_order, choose_checkpoints
from library.training.memory.estimate import estimator
from library.training.memory.live_bytes import LiveBytes
from library.training.memory.resident import Training

BATCH, SIDE = 4, 16


def conditioned(sdxl):
    unet, vae, encoders = (copy.deepcopy(part) for part in (sdxl.unet, sdxl.vae, sdxl.text_encoders))
    model = replace(sdxl, unet=unet, vae=vae, text_encoders=encoders)
    return Denoiser(model, (False, False), gradient_checkpointing=True)


def loss_on(device, module):
    ids = torch.zeros(BATCH, 1, 77, dtype=torch.int64, device=device)
    noisy = torch.linspace(-1, 1, BATCH * 4 * SIDE * SIDE).reshape(BATCH, 4, SIDE, SIDE).to(device)
    sizes = torch.zeros(BATCH, 6, device=device)
    return module(noisy, torch.zeros(BATCH, device=device), Tokens((ids, ids)), sizes).square().mean()


def predict(sdxl, module):
    def encode(shapes):
        return encode_images(shapes, torch.empty(BATCH, 32, 32, 3, dtype=torch.uint8, device="meta"))

    training = Training(partial(make_optimizer, "SGD", arguments=[]))
    return estimator(module, sdxl.vae, torch.float32, partial(loss_on, "meta"), encode, training)


def gradients(module):
    module.zero_grad()
    loss_on("cpu", module).backward()
    return [parameter.grad for parameter in module.parameters() if parameter.requires_grad]


def choose(module, predicted, limit):
    return choose_checkpoints(module, torch.float32, partial(loss_on, "meta"), predicted, limit)


def held_in_a_real_step(module):
    """Bytes beyond the weights."""
    module.zero_grad()
    with LiveBytes() as live:
        live.hold([*module.parameters(), *module.buffers()])
        weights = live.bytes
        loss_on("cpu", module).backward()
    return live.peak - weights


def test_the_fewest_blocks_are_chosen_that_a_real_step_needs_for_the_limit(sdxl):
    module = conditioned(sdxl)
    predicted = predict(sdxl, module)
    peaks = []
    for enabled in (True, False):
        module.unet.enable_gradient_checkpointing(enabled)
        peaks.append(predicted().total)
    full, plain = peaks
    limit = (full + plain) / 2
    (line,) = choose(module, predicted, limit)
    chosen = [number for number, block in enumerate(module.unet.blocks()) if block.checkpointing]
    order = checkpoint_order(block_costs(module, torch.float32, partial(loss_on, "meta")))
    assert f"auto, {len(chosen)} of {len(order)} blocks" in line
    assert 0 < len(chosen) < len(order) and set(chosen) == set(order[: len(chosen)])
    assert predicted().total <= limit
    assert held_in_a_real_step(module) == pytest.approx(predicted().backward, rel=0.1)
    module.unet.checkpoint_blocks(order[: len(chosen) - 1])
    assert predicted().total > limit


def test_gradients_are_those_without_checkpointing_whatever_is_chosen(sdxl):
    module = conditioned(sdxl)
    for parameter in module.unet.parameters():  # a new model's branches end in zeros, behind which nothing differs
        torch.nn.init.normal_(parameter, std=0.05)
    module.unet.enable_gradient_checkpointing(False)
    expected = gradients(module)
    assert all(gradient.abs().max() > 0 for gradient in expected[:4])
    blocks = range(len(module.unet.blocks()))
    for chosen in (blocks, blocks[::2], blocks[:1], blocks[-1:]):
        module.unet.checkpoint_blocks(chosen)
        assert all(map(torch.equal, gradients(module), expected))


def test_a_limit_that_nothing_meets_is_an_error_that_says_what_a_step_takes(sdxl):
    module = conditioned(sdxl)
    predicted = predict(sdxl, module)
    least = predicted().total
    with pytest.raises(InputError, match=rf"--checkpoint_memory_gb=.* takes {least / 2**30:.3f} GiB; raise it"):
        choose(module, predicted, least - 1)


def test_the_least_arithmetic_per_byte_comes_first_and_what_keeps_nothing_last():
    costs = [BlockCost(50, 10), BlockCost(1, 0), BlockCost(30, 10), BlockCost(60, 20), BlockCost(500, -3)]
    assert checkpoint_order(costs) == [2, 3, 0, 1, 4]


def test_costs_are_the_products_of_a_block_and_what_it_saves_for_backward(sdxl):
    """Products counted by hand; bytes as torch's own hooks see them saved by the real block."""
    module = conditioned(sdxl)
    costs = block_costs(module, torch.float32, partial(loss_on, "meta"))
    module.unet.enable_gradient_checkpointing(False)
    seen, handles = {}, []
    for number, block in enumerate(module.unet.blocks()):
        handles.append(block.register_forward_pre_hook(lambda _, given, number=number: seen.update({number: given})))
    loss_on("cpu", module)
    for handle in handles:
        handle.remove()
    for number, block in enumerate(module.unet.blocks()):
        x, other = (tensor.detach() for tensor in seen[number])
        kept = {}

        def keep(tensor, kept=kept):
            kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = block(x.requires_grad_(), other)
        for outside in (x, other, out, *block.parameters()):
            kept.pop(outside.untyped_storage().data_ptr(), None)
        assert costs[number].kept_bytes == pytest.approx(sum(kept.values()), rel=0.01, abs=2048 * BATCH)
        assert costs[number].flops == products(block, x, other, out)


def products(block, x, other, out):
    if isinstance(block, ResBlock):
        pixels, channels = out.shape[0] * out.shape[2:].numel(), out.shape[1]
        wide = 9 * (x.shape[1] + channels) * channels + (x.shape[1] * channels) * (x.shape[1] != channels)
        return 2 * pixels * wide + 2 * len(x) * other.shape[1] * channels
    assert isinstance(block, TransformerBlock)
    tokens, channels = x.shape[1:]
    words, width = other.shape[1:]
    linear = tokens * (4 + 2 + 12) * channels**2 + 2 * words * width * channels
    scores = 2 * tokens * (tokens + words) * channels
    return 2 * len(x) * (linear + scores)
