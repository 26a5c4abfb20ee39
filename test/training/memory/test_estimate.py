"""The memory estimate against the storages of a real step, counted while it runs."""

import copy
import itertools
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.models.denoiser import Denoiser
from library.models.text import Tokens
from library.models.unet import UNet, UNetConfig
from library.models.vae import encode_images
from library.training.engine.bf16_update import Bf16Update
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.meta_copy import without_data
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import KINDS, shard
from library.training.memory.estimate import estimate
from library.training.memory.live_bytes import LiveBytes
from library.training.memory.resident import Training, held_bytes

BATCH = 4
ROOT = Path(__file__).resolve().parents[3]


def conditioned(sdxl, gradient_checkpointing):
    unet, vae, encoders = (copy.deepcopy(part) for part in (sdxl.unet, sdxl.vae, sdxl.text_encoders))
    model = replace(sdxl, unet=unet, vae=vae, text_encoders=encoders)
    return Denoiser(model, (True, False), gradient_checkpointing=gradient_checkpointing)


def encode(shapes):
    return encode_images(shapes, torch.empty(BATCH, 32, 32, 3, dtype=torch.uint8, device="meta"))


ADAMW = ("AdamW", [])
ADAFACTOR = ("AdaFactor", ["relative_step=False", "scale_parameter=False"])


def predict(sdxl, module, side=16, optimizer=ADAMW, **training):
    make = partial(make_optimizer, optimizer[0], arguments=optimizer[1])
    return estimate(module, sdxl.vae, torch.float32, loss_on("meta", side), encode, Training(make, **training))


def loss_on(device, side=16):
    def loss(module):
        ids = torch.zeros(BATCH, 1, 77, dtype=torch.int64, device=device)
        noisy = torch.zeros(BATCH, 4, side, side, device=device)
        return module(
            noisy, torch.zeros(BATCH, device=device), Tokens((ids, ids)), torch.zeros(BATCH, 6, device=device)
        ).mean()

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


@pytest.mark.parametrize(
    ("optimizer", "fused", "gradient_checkpointing"),
    [
        (ADAMW, False, False),
        (ADAFACTOR, True, True),
        *(
            pytest.param(*one, marks=pytest.mark.all)
            for one in itertools.product((ADAMW, ADAFACTOR), (False, True), (False, True))
        ),
    ],
)
def test_the_estimate_is_what_a_whole_step_of_the_trainer_holds(sdxl, gradient_checkpointing, optimizer, fused):
    """Forward, backward, update: counted with each optimizer and pass, with the states of an earlier step."""
    AcceleratorState._reset_state(reset_partial_state=True)
    module = conditioned(sdxl, gradient_checkpointing)
    predicted = predict(sdxl, module, 32, optimizer, fused_backward=fused)
    groups = [ParameterGroup("unet", [one for one in module.parameters() if one.requires_grad], 1e-3)]
    parallel = (partial(FusedBackward, max_grad_norm=0.0) if fused else partial(shard, "none"))(
        make_accelerator("no"), module, groups,
        lambda groups: make_optimizer(optimizer[0], groups, optimizer[1]),
        lambda optimizer: make_lr_schedule("constant", optimizer, 9, 0, 1, 1.0),
    )  # fmt: skip

    def step():
        parallel.backward(loss_on("cpu", 32)(parallel.module))
        parallel.clip(0.0)
        parallel.optimizer.step()
        parallel.zero_grad()

    step()
    states = [value for state in parallel.own_optimizer.state.values() for value in state.values()]
    with LiveBytes() as live:
        live.hold([*module.parameters(), *module.buffers(), *(value for value in states if torch.is_tensor(value))])
        step()
    vae_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sdxl.vae.state_dict().values())
    expected = predicted.weights - vae_bytes + predicted.optimizer + max(predicted.backward, predicted.update)
    assert expected == pytest.approx(live.peak, rel=0.1)


def test_gradients_of_earlier_passes_are_there_while_a_later_one_runs(sdxl):
    module = conditioned(sdxl, gradient_checkpointing=False)
    first, later = predict(sdxl, module), predict(sdxl, module, passes=2)
    vae_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sdxl.vae.state_dict().values())
    for passes, predicted in ((1, first), (2, later)):
        module.zero_grad()
        with LiveBytes() as live:
            live.hold([*module.parameters(), *module.buffers()])
            for _ in range(passes):
                loss_on("cpu")(module).backward()
        assert predicted.weights - vae_bytes + predicted.backward == pytest.approx(live.peak, rel=0.02)
    gradients = sum(one.numel() * one.element_size() for one in module.parameters() if one.requires_grad)
    assert later.encoding == first.encoding + gradients


def test_a_compiled_block_hands_over_all_its_gradients_at_once(sdxl):
    module = conditioned(sdxl, gradient_checkpointing=True)
    blocks = [list(block.parameters()) for block in module.unet.blocks()]
    plain, compiled = (predict(sdxl, module, fused_backward=True, compiled=of) for of in ((), blocks))
    sizes = [[weight.numel() * weight.element_size() for weight in block] for block in blocks]
    assert compiled.backward - plain.backward == max(sum(block) - max(block) for block in sizes)
    assert predict(sdxl, module, compiled=blocks) == predict(sdxl, module)


@pytest.mark.parametrize(
    ("optimizer", "how", "fused"),
    [(ADAMW, "stochastic", False), (ADAMW, "kahan", False), (ADAFACTOR, "stochastic", True)],
)
def test_the_estimate_is_what_a_whole_step_with_bf16_weights_holds(sdxl, optimizer, how, fused):
    AcceleratorState._reset_state(reset_partial_state=True)
    module = conditioned(sdxl, True)
    module.cast_frozen(torch.bfloat16)
    module.cast_trained(torch.bfloat16)
    make = partial(make_optimizer, optimizer[0], arguments=optimizer[1], bf16=Bf16Update(how, 0))
    training = Training(make, fused_backward=fused, averages=True)

    def loss(device):
        ids = torch.zeros(BATCH, 1, 77, dtype=torch.int64, device=device)
        noisy = torch.zeros(BATCH, 4, 16, 16, device=device, dtype=torch.bfloat16)
        t, sizes = torch.zeros(BATCH, device=device), torch.zeros(BATCH, 6, device=device)
        return lambda module: module(noisy, t, Tokens((ids, ids)), sizes).float().mean()

    predicted = estimate(module, sdxl.vae, torch.bfloat16, loss("meta"), encode, training)
    groups = [ParameterGroup("unet", [one for one in module.parameters() if one.requires_grad], 1e-3)]
    parallel = (partial(FusedBackward, max_grad_norm=0.0) if fused else partial(shard, "none"))(
        make_accelerator("bf16"), module, groups, make,
        lambda optimizer: make_lr_schedule("constant", optimizer, 9, 0, 1, 1.0),
    )  # fmt: skip
    parallel.keep_averages(0.9)

    def step():
        parallel.backward(loss("cpu")(parallel.module))
        parallel.clip(0.0)
        parallel.optimizer.step()
        parallel.averages.update()
        parallel.zero_grad()

    step()
    states = [value for state in parallel.own_optimizer.state.values() for value in state.values()]
    held = [*(value for value in states if torch.is_tensor(value)), *parallel.averages.averages.values()]
    with LiveBytes() as live:
        live.hold([*module.parameters(), *module.buffers(), *held])
        step()
    vae_bytes = sum(tensor.numel() * tensor.element_size() for tensor in sdxl.vae.state_dict().values())
    assert predicted.total - vae_bytes == pytest.approx(live.peak, rel=0.1)
    trained = sum(parameter.numel() for parameter in groups[0].parameters)
    assert predicted.averages == 4 * trained
    if optimizer == ADAMW:
        assert predicted.optimizer == pytest.approx((6 if how == "kahan" else 4) * trained, rel=0.01)


MEASURED = {  # the network that docs/measurements/sharding.md is about
    "model_channels": 64, "channel_mult": (1, 2), "num_res_blocks": 1, "transformer_depth": (0, 1),
    "transformer_depth_middle": 1, "context_dim": 64, "adm_in_channels": 64 + 6 * 256,
}  # fmt: skip


def measured_rows():
    """processes, sharding and MB of weights, state, gradients at rest and after backward, as the page has them."""
    page = (ROOT / "docs" / "measurements" / "sharding.md").read_text(encoding="utf-8")
    table = page.partition("<!-- memory -->")[2].partition("<!-- end -->")[0]
    for line in table.splitlines():
        processes, kind, *figures = [cell.strip() for cell in line.split("|")[1:-1]] or ["", ""]
        if kind in KINDS:
            yield int(processes), kind, [float(figure.split()[0]) for figure in figures[:4]]


@pytest.mark.parametrize(("processes", "kind", "measured"), list(measured_rows()))
def test_shares_are_those_measured_in_real_processes(processes, kind, measured):
    """docs/measurements/sharding.md, which its benchmark's test holds to what processes hold."""
    unet = UNet(UNetConfig(**MEASURED))
    assert sum(parameter.numel() for parameter in unet.parameters()) == 4_394_180
    make = partial(make_optimizer, "AdamW", arguments=[])
    held = held_bytes(list(unet.parameters()), [[]], Training(make, kind, processes))
    found = held.weights, held.optimizer, held.gradients_at_rest, held.gradients
    assert [size / 1e6 for size in found] == pytest.approx(measured, rel=0.01, abs=0.01)


def test_a_process_with_others_holds_less_with_each_way_of_sharding(sdxl):
    module = conditioned(sdxl, False)
    none, oss, zero1, fsdp = (predict(sdxl, module, sharding=kind, processes=8) for kind in KINDS)
    assert fsdp.total < zero1.total < none.total and oss.total < none.total
    assert zero1.optimizer < none.optimizer / 6
    alone = predict(sdxl, module)
    assert predict(sdxl, module, sharding="fsdp") == alone  # one process has nothing to share


def test_encoding_is_what_the_vae_really_holds(sdxl):
    predicted = predict(sdxl, conditioned(sdxl, False))
    with LiveBytes() as live:
        encode_images(sdxl.vae, torch.zeros(BATCH, 32, 32, 3, dtype=torch.uint8))
    assert predicted.encoding == pytest.approx(live.peak, rel=0.1)


def test_checkpointing_is_seen_to_save_and_adamw_to_cost_two_states(sdxl):
    plain, checkpointed = (predict(sdxl, conditioned(sdxl, on), side=64) for on in (False, True))
    assert checkpointed.backward < 0.8 * plain.backward
    trained = [p for p in conditioned(sdxl, False).parameters() if p.requires_grad]
    assert plain.optimizer == pytest.approx(2 * 4 * sum(parameter.numel() for parameter in trained), rel=1e-3)
    assert plain.total == plain.weights + plain.optimizer + plain.backward > plain.update
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
