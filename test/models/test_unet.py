"""The U-Net against diffusers' of the same weights: outputs, every gradient, odd sizes, checkpointing; its options."""

import pytest
import torch
import torch.nn.functional as F

from library.errors import InputError
from library.models import attention
from library.models.files.key_maps import unet_to_diffusers
from library.models.unet import UNet, UNetConfig, size_embedding
from test.models.unets import CONFIGS, POOLED, SD2_LIKE, SDXL_LIKE, diffusers_unet, our_unet, relative


@pytest.fixture(scope="module", params=CONFIGS)
def pair(request):
    """Our network and diffusers', of the same weights, none of them zero."""
    ours = our_unet(CONFIGS[request.param])
    return ours, diffusers_unet(ours.config, ours)


def conditions(config, rows, columns):
    """Latents, timesteps, text states, pooled text, sizes; those with gradients ask for them."""
    torch.manual_seed(1)
    latents = torch.randn(2, 4, rows, columns, requires_grad=True)
    context = torch.randn(2, 7, config.context_dim, requires_grad=True)
    pooled = torch.randn(2, POOLED, requires_grad=True)
    sizes = torch.tensor([[480.0, 640, 0, 96, 512, 640], [1024, 1024, 13, 0, 1024, 1024]])
    return latents, torch.tensor([3, 977]), context, pooled, sizes


def ours_and_gradients(network, inputs, target):
    latents, t, context, pooled, sizes = inputs
    vector = None if network.config.adm_in_channels is None else torch.cat([pooled, size_embedding(sizes)], dim=1)
    out = network(latents, t, context, vector)
    wanted = dict(network.named_parameters()) | {"latents": latents, "context": context}
    if vector is not None:
        wanted["pooled"] = pooled
    return out, gradients(out, wanted, target)


def gradients(out, wanted, target):
    found = torch.autograd.grad(F.mse_loss(out, target), list(wanted.values()))
    return dict(zip(wanted, found, strict=True))


@pytest.mark.parametrize(("rows", "columns"), [(8, 8), (9, 13), (4, 10)])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_outputs_and_all_gradients_are_those_of_diffusers(pair, rows, columns, checkpointing):
    ours, theirs = pair
    inputs = conditions(ours.config, rows, columns)
    latents, t, context, pooled, sizes = inputs
    target = torch.randn(2, 4, rows, columns)
    expected = theirs(latents, t, context, added_cond_kwargs={"text_embeds": pooled, "time_ids": sizes}).sample
    names = unet_to_diffusers(ours.config)
    wanted = dict(theirs.named_parameters()) | {"latents": latents, "context": context}
    if ours.config.adm_in_channels is not None:
        wanted["pooled"] = pooled
    expected_gradients = gradients(expected, wanted, target)

    ours.enable_gradient_checkpointing(checkpointing)
    found, found_gradients = ours_and_gradients(ours, inputs, target)

    assert relative(found, expected) < 1e-4
    assert len(found_gradients) == len(expected_gradients)
    # What a norm of one channel a group removes again has gradient zero, and what is computed of it is rounding.
    rounding = 1e-7 * float(torch.stack([one.norm() for one in expected_gradients.values()]).norm())
    wrong = []
    for name, gradient in found_gradients.items():
        wanted = expected_gradients[names.get(name, name)]
        assert gradient.shape == wanted.shape
        if (gradient - wanted).norm() > 1e-4 * wanted.norm() + rounding:
            wrong.append(name)
    assert not wrong


def test_checkpointing_keeps_less_for_backward_and_can_be_switched_off(pair):
    ours, _ = pair
    inputs = conditions(ours.config, 8, 8)

    def kept_bytes(enabled):
        parameters = {parameter.data_ptr() for parameter in ours.parameters()}
        kept = {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                kept[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        ours.enable_gradient_checkpointing(enabled)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            latents, t, context, pooled, sizes = inputs
            vector = None if ours.config.adm_in_channels is None else torch.cat([pooled, size_embedding(sizes)], dim=1)
            out = ours(latents, t, context, vector)
        assert out.requires_grad
        return sum(kept.values())

    assert kept_bytes(True) < 0.6 * kept_bytes(False)


@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_the_chosen_attention_backend_runs_in_every_layer(pair, backend):
    ours, _ = pair
    inputs = conditions(ours.config, 8, 8)
    target = torch.zeros(2, 4, 8, 8)
    ours.enable_gradient_checkpointing(False)
    expected, _ = ours_and_gradients(ours, inputs, target)
    attention.reset_report()
    ours.set_attention_backend(backend)
    try:
        found, _ = ours_and_gradients(ours, inputs, target)
    finally:
        ours.set_attention_backend("sdpa")
    layers = sum(name.endswith("norm1.weight") for name in ours.state_dict())
    (line,) = attention.report()
    assert line.startswith(f"attention: {backend}, float32 on cpu, {2 * layers} calls ")
    assert relative(found, expected) < 1e-5


def test_an_unknown_backend_is_refused(pair):
    with pytest.raises(ValueError, match="no attention backend 'flash9'"):
        pair[0].set_attention_backend("flash9")


def test_half_precision_weights_follow_fp32(pair):
    """bfloat16 holds 8 bits, and the network's depth costs some: a few per cent off, not garbage."""
    ours, _ = pair
    ours.enable_gradient_checkpointing(False)
    latents, t, context, pooled, sizes = (tensor.detach() for tensor in conditions(ours.config, 4, 4))
    vector = None if ours.config.adm_in_channels is None else torch.cat([pooled, size_embedding(sizes)], dim=1)
    half = UNet(ours.config)
    half.load_state_dict(ours.state_dict())
    half.bfloat16()
    with torch.no_grad():
        expected = ours(latents, t, context, vector)
        found = half(latents.bfloat16(), t, context.bfloat16(), vector)
    assert found.dtype == torch.bfloat16
    assert relative(found.float(), expected) < 0.1


def test_a_new_network_predicts_zero_and_learns():
    """Branches start at zero, as in Stability's code; the first gradients must still reach the last layer."""
    torch.manual_seed(0)
    network = UNet(SD2_LIKE)
    latents, t, context, _, _ = conditions(SD2_LIKE, 4, 4)
    out = network(latents, t, context)
    assert not out.any()
    F.mse_loss(out, torch.ones_like(out)).backward()
    assert network.out[2].bias.grad.abs().min() > 0


def test_size_embedding_is_the_formula():
    """cos(v / 10000^(i/128)) for i = 0 .. 127, then sines, for each size in turn."""
    sizes = torch.tensor([[512.0, 640, 0, 3, 512, 1024]])
    found = size_embedding(sizes)
    assert found.shape == (1, 1536)
    assert found[0, 2 * 256 : 2 * 256 + 128].eq(1).all() and not found[0, 2 * 256 + 128 : 3 * 256].any()
    angle = torch.tensor(3 / 10000 ** (5 / 128), dtype=torch.float64)
    assert found[0, 3 * 256 + 5].item() == pytest.approx(angle.cos().item(), abs=1e-6)
    assert found[0, 3 * 256 + 128 + 5].item() == pytest.approx(angle.sin().item(), abs=1e-6)


def test_names_and_number_of_parameters_are_those_of_sdxl_base():
    """2,567,463,684 parameters in 1,680 tensors: the published U-Net's."""
    with torch.device("meta"):
        tensors = UNet().state_dict()
    assert (len(tensors), sum(tensor.numel() for tensor in tensors.values())) == (1680, 2_567_463_684)
    some = {
        "input_blocks.0.0.weight": (320, 4, 3, 3),
        "input_blocks.3.0.op.weight": (320, 320, 3, 3),
        "input_blocks.8.1.transformer_blocks.9.attn2.to_k.weight": (1280, 2048),
        "middle_block.1.transformer_blocks.9.ff.net.0.proj.weight": (10240, 1280),
        "output_blocks.2.2.conv.weight": (1280, 1280, 3, 3),
        "output_blocks.8.0.skip_connection.weight": (320, 640, 1, 1),
        "label_emb.0.0.weight": (1280, 2816),
        "out.2.bias": (4,),
    }
    assert {name: tuple(tensors[name].shape) for name in some} == some


def test_vector_conditions_are_demanded_exactly_where_the_network_has_them():
    with torch.device("meta"):
        without, with_vector = UNet(SD2_LIKE), UNet(SDXL_LIKE)
        latents, t, context = torch.zeros(1, 4, 4, 4), torch.zeros(1), torch.zeros(1, 3, 48)
        with pytest.raises(ValueError, match="vector conditions"):
            with_vector(latents, t, context)
        with pytest.raises(ValueError, match="vector conditions"):
            without(latents, t, context, torch.zeros(1, 8))


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({"transformer_depth": (0, 1)}, "one entry a level"),
        ({"model_channels": 48}, "48 channels are not a multiple of 32"),
        ({"model_channels": 32, "transformer_depth": (1, 0, 0)}, "32 channels cannot be split into heads of 64"),
        ({"num_heads": 7}, "cannot be split into 7 heads"),
        ({"transformer_depth_middle": 0}, "at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, words):
    with pytest.raises(InputError, match=words):
        UNetConfig(**sizes)
