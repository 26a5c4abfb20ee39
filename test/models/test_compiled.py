"""Compiled blocks against plain ones and diffusers' U-Net: outputs, every gradient, and how much is compiled."""

import copy

import pytest
import torch

from library.models import attention
from library.models.compiled import Compiled, compile_blocks, equal_blocks, settle
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.files.key_maps import rename, unet_to_diffusers
from library.models.unet import ResBlock, TransformerBlock, UNet, UNetConfig, size_embedding
from test.models.weights import normal_weights

POOLED = 40
# Twelve blocks, and among the residual ones two kinds, by their inputs; the transformer layers are all equal.
CONFIG = UNetConfig(
    model_channels=32,
    channel_mult=(1, 1),
    num_res_blocks=1,
    transformer_depth=(0, 1),
    transformer_depth_middle=1,
    context_dim=24,
    adm_in_channels=POOLED + 6 * 256,
    num_head_channels=16,
)
SIZES = torch.tensor([[480.0, 640, 0, 96, 512, 640], [1024, 1024, 13, 0, 1024, 1024]])
BUCKETS = [(8, 8), (6, 12), (10, 6), (8, 8)]  # the first one square: sides are no more equal in the next


@pytest.fixture(scope="module")
def plain():
    torch.manual_seed(0)
    return normal_weights(UNet(CONFIG))


@pytest.fixture(scope="module")
def compiled(plain):
    """The same network with compiled blocks, and the record of what is compiled."""
    torch._dynamo.reset()  # it remembers the shapes that other tests met in the same functions, and compiles by them
    network = copy.deepcopy(plain)
    return network, compile_blocks(network, "aot_eager", "sdpa", torch.float32)


def inputs(rows, columns, batch=2):
    torch.manual_seed(rows * 100 + columns)
    vector = torch.cat([torch.randn(batch, POOLED), size_embedding(SIZES[:batch])], dim=1)
    return torch.randn(batch, 4, rows, columns), torch.tensor([3, 977])[:batch], torch.randn(batch, 7, 24), vector


def output_and_gradients(module, given):
    module.zero_grad()
    out = module(*given)
    out.float().square().mean().backward()
    return {"": out.detach(), **{name: one.grad for name, one in module.named_parameters() if one.requires_grad}}


def assert_close(found, expected, tolerance=1e-4):
    """Some gradients are zero but for rounding: they are measured by all gradients together."""
    assert found.keys() == expected.keys()
    rounding = 1e-7 * float(torch.stack([one.norm() for name, one in expected.items() if name]).norm())
    wrong = [
        name
        for name, one in expected.items()
        if not (found[name] - one).norm() <= tolerance * one.norm() + rounding  # catches NaN, too
    ]
    assert not wrong


def test_every_bucket_has_the_plain_outputs_and_gradients_and_nothing_is_compiled_twice(plain, compiled):
    network, record = compiled
    programs = len(equal_blocks(network))
    assert (programs, len(network.blocks())) == (3, 12)
    for checkpointing in (False, True):
        for bucket in BUCKETS:
            given = inputs(*bucket)
            network.enable_gradient_checkpointing(checkpointing)
            assert_close(output_and_gradients(network, given), output_and_gradients(plain, given))
            assert record.graphs == programs
    with torch.no_grad():  # as sample pictures are made: without gradients, of another batch, once for all sizes
        for rows, columns in BUCKETS:
            given = inputs(rows, columns, batch=1)
            torch.testing.assert_close(network(*given), plain(*given), rtol=1e-4, atol=1e-5)
            assert record.graphs == 2 * programs
    (line,) = record.lines()
    assert "12 blocks of the U-Net as 3 programs by aot_eager, 6 graphs compiled, 0 graph breaks" in line
    assert line.endswith("attention in them: sdpa")


def test_compiled_blocks_have_the_outputs_and_gradients_of_diffusers(plain, compiled):
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(CONFIG))
    theirs.load_state_dict(rename(plain.state_dict(), unet_to_diffusers(CONFIG)))
    names = {theirs: ours for ours, theirs in unet_to_diffusers(CONFIG).items()}
    for bucket in BUCKETS[1:3]:
        x, t, context, vector = inputs(*bucket)
        found = output_and_gradients(compiled[0], (x, t, context, vector))
        theirs.zero_grad()
        added = {"text_embeds": vector[:, :POOLED], "time_ids": SIZES}
        expected = theirs(x, t, context, added_cond_kwargs=added).sample
        expected.square().mean().backward()
        gradients = {names.get(name, name): one.grad for name, one in theirs.named_parameters()}
        assert_close(found, {"": expected.detach(), **gradients})


def test_names_stay_and_copies_are_plain(plain, compiled):
    network, _ = compiled
    assert list(network.state_dict()) == list(plain.state_dict())
    assert [name for name, _ in network.named_parameters()] == [name for name, _ in plain.named_parameters()]
    assert all(block.compiled is None for block in copy.deepcopy(network).blocks())
    assert all(block.compiled is not None for block in network.blocks())


def pair_of_blocks(block):
    twin = copy.deepcopy(block)
    twin.compiled = Compiled(type(block), "aot_eager")
    return block, twin


def kept_bytes(block, given):
    """What a block keeps for backward besides its weights and inputs."""
    known = {one.data_ptr() for one in (*block.parameters(), *given)}
    kept = {}

    def pack(tensor):
        if tensor.data_ptr() not in known:
            kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = block(*given)
    assert out.requires_grad
    return sum(kept.values())


def test_no_more_is_kept_for_backward_than_by_plain_blocks():
    """The fused functions compute norms and activations again, so estimates of memory hold for compiled blocks, too."""
    settle()
    block, twin = pair_of_blocks(ResBlock(64, 64, 16))
    given = torch.randn(2, 64, 8, 8).requires_grad_(True), torch.randn(2, 16)
    assert kept_bytes(twin, given) <= 1.05 * kept_bytes(block, given)
    block, twin = pair_of_blocks(TransformerBlock(64, 24, 2))
    given = torch.randn(2, 64, 64).requires_grad_(True), torch.randn(2, 7, 24)
    assert kept_bytes(twin, given) <= 1.05 * kept_bytes(block, given)


def test_frozen_weights_get_no_gradient():
    block, twin = pair_of_blocks(normal_weights(ResBlock(32, 64, 16)))
    for one in (block, twin):
        one.in_layers.requires_grad_(False)
    given = torch.randn(2, 32, 6, 6), torch.randn(2, 16)
    assert_close(output_and_gradients(twin, given), output_and_gradients(block, given))
    assert all(one.grad is None for one in twin.in_layers.parameters())


@pytest.mark.parametrize("kind", ["residual", "transformer"])
def test_under_autocast_they_are_no_further_from_fp32_than_plain_blocks(kind):
    torch.manual_seed(0)
    made = ResBlock(32, 64, 16) if kind == "residual" else TransformerBlock(32, 24, 2)
    x = torch.randn(2, 32, 4, 4) if kind == "residual" else torch.randn(2, 16, 32)
    given = x, torch.randn(2, 16) if kind == "residual" else torch.randn(2, 7, 24)
    block, twin = pair_of_blocks(normal_weights(made))
    exact = output_and_gradients(block, given)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        usual, found = output_and_gradients(block, given), output_and_gradients(twin, given)
    assert found[""].dtype == usual[""].dtype
    for name, true in exact.items():
        errors = [float((one[name].float() - true).norm() / true.norm()) for one in (found, usual)]
        assert errors[0] < 1.5 * errors[1] + 1e-3, name


def test_attention_that_the_device_lacks_is_replaced_with_a_warning(plain, caplog):
    attention.reset_report()
    record = compile_blocks(copy.deepcopy(plain), "eager", "npu", torch.float32)
    assert "attention backend npu is not used" in caplog.text
    assert "attention in them: sdpa" in record.lines()[0]


def test_another_attention_backend_runs_between_the_graphs_and_is_recorded(plain):
    """As Ascend's does: its choice hangs on shapes, and the report counts its calls."""
    network = copy.deepcopy(plain)
    record = compile_blocks(network, "eager", "math", torch.float32)
    attention.reset_report()
    given = inputs(8, 8)
    assert_close(output_and_gradients(network, given), output_and_gradients(plain, given))
    assert attention.report()[0].startswith("attention: math, float32 on cpu, 8 calls")
    assert record.graph_breaks > 0 and "attention between their graphs: math" in record.lines()[0]


@pytest.mark.all
def test_inductor_compiles_once_for_all_buckets(plain):
    network = copy.deepcopy(plain)
    record = compile_blocks(network, "inductor", "sdpa", torch.float32)
    for bucket in BUCKETS:
        given = inputs(*bucket)
        assert_close(output_and_gradients(network, given), output_and_gradients(plain, given))
    assert record.graphs == len(equal_blocks(network))
