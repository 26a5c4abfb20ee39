"""LyCORIS and peft on our U-Net: every layer that they choose is called and trains, by the names of users' files."""

import copy
import logging

import pytest
import torch
from torch import nn

from library.models.network_view import text_encoder_view, unet_view
from library.models.unet import UNet
from test.models.unets import CONFIGS, PUBLISHED, SD2_LIKE, diffusers_unet, inputs, module_names, our_unet, relative

ALGORITHMS = {
    "lora": {},
    "bypass": {"bypass_mode": "True"},
    "dora": {"dora_wd": "True"},
    "tucker": {"use_tucker": "True"},
    "norms": {"train_norm": "True"},
    "loha": {"algo": "loha"},
    "lokr": {"algo": "lokr"},
    "full": {"algo": "full"},
    "diag-oft": {"algo": "diag-oft"},
    "boft": {"algo": "boft"},
    "glora": {"algo": "glora"},
    "dylora": {"algo": "dylora"},
}


@pytest.fixture(autouse=True)
def nothing_left_by_lycoris(monkeypatch):
    """It writes what a preset or GLoRA targets into its class, where the next network finds it."""
    from lycoris.kohya import LycorisNetworkKohya

    for name in [name for name in vars(LycorisNetworkKohya) if name.isupper()]:
        monkeypatch.setattr(LycorisNetworkKohya, name, getattr(LycorisNetworkKohya, name))
    logging.getLogger("LyCORIS").setLevel(logging.ERROR)


def lycoris_network(text_encoders, unet, **arguments):
    from lycoris.kohya import create_network

    return create_network(1.0, 4, 1, None, text_encoders, unet, warn_on_unmatched=False, **arguments)


def view_of(kind, network):
    return unet_view(network, diffusers_paths=kind != "sdxl")


def chosen_by_lycoris(config):
    """The layers of its default: all in transformers and residual blocks, down and up, and four by diffusers' names."""
    named = ("conv_in", "conv_out", "time_embedding.linear_1", "time_embedding.linear_2")
    inner = ("attentions", "resnets", "downsamplers", "upsamplers")
    return {
        old: new
        for old, new in module_names(config).items()
        if (new in named and config.adm_in_channels is None) or any(f".{part}." in new for part in inner)
        if not old.endswith(("norm", "norm1", "norm2", "norm3", "in_layers.0", "out_layers.0"))
    }


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_lycoris_chooses_all_layers_by_users_names_and_every_one_acts(kind, checkpointing):
    config = CONFIGS[kind]
    unet = our_unet(config).requires_grad_(False)
    unet.enable_gradient_checkpointing(checkpointing)
    given, _ = inputs(config)
    plain = unet(*given)
    view = view_of(kind, unet)
    network = lycoris_network(None, view)
    expected = {(old if kind == "sdxl" else new).replace(".", "_") for old, new in chosen_by_lycoris(config).items()}
    assert {module.lora_name.removeprefix("lora_unet_") for module in network.unet_loras} == expected
    network.apply_to(None, view, False, True)
    assert relative(unet(*given), plain) < 1e-5
    for module in network.unet_loras:
        nn.init.normal_(module.lora_up.weight, std=0.1)
    out = unet(*given)
    assert relative(out, plain) > 1e-2
    out.square().mean().backward()
    assert [name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()] == []


@pytest.mark.parametrize(("kind", "count"), [("sd1", 282), ("sd2", 282), ("sdxl", 788)])
def test_lycoris_makes_as_many_modules_as_of_the_published_models(kind, count):
    with torch.device("meta"):
        network = lycoris_network(None, view_of(kind, UNet(PUBLISHED[kind])))
    assert len({module.lora_name for module in network.unet_loras}) == len(network.unet_loras) == count


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("kind", ["sd2", *(pytest.param(kind, marks=pytest.mark.all) for kind in ("sd1", "sdxl"))])
def test_every_algorithm_of_lycoris_starts_at_the_base_and_trains_all_that_it_has(kind, algorithm):
    config = CONFIGS[kind]
    unet = our_unet(config).requires_grad_(False)
    given, _ = inputs(config)
    plain = unet(*given)
    view = view_of(kind, unet)
    network = lycoris_network(None, view, **ALGORITHMS[algorithm])
    network.apply_to(None, view, False, True)
    assert relative(unet(*given), plain) < 1e-5
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1)
    for _ in range(2):  # what stands before a factor of zero gets its first gradient in the second step
        optimizer.zero_grad()
        unet(*given).square().mean().backward()
        optimizer.step()
    still = [name for name, one in network.named_parameters() if one.grad is None or not one.grad.any()]
    rotations_of_one = ["lora_unet_conv_out.oft_blocks"] if algorithm == "diag-oft" and kind != "sdxl" else []
    assert still == rotations_of_one  # four channels in four blocks cannot be rotated
    assert relative(unet(*given), plain) > 1e-4


def test_lycoris_trains_every_layer_of_text_encoders(text_encoders):
    first, second = (copy.deepcopy(one).requires_grad_(False) for one in text_encoders)
    views = [text_encoder_view(first), text_encoder_view(second)]
    network = lycoris_network(views, nn.Module())
    assert len(network.text_encoder_loras) == 3 * 6 + 2 * 6
    assert "lora_te1_text_model_encoder_layers_2_mlp_fc1" in {one.lora_name for one in network.text_encoder_loras}
    ids = torch.arange(1, 11)[None]
    plain = [encoder(ids).last_hidden_state.detach() for encoder in (first, second)]
    network.apply_to(views, nn.Module(), True, False)
    states = [encoder(ids).last_hidden_state for encoder in (first, second)]
    assert all(relative(one, other) < 1e-5 for one, other in zip(states, plain, strict=True))
    sum(one.square().mean() for one in states).backward()
    assert [name for name, one in network.named_parameters() if one.grad is None] == []


LAYERS = (
    "to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "proj_out", "conv1", "conv2",
    "time_emb_proj", "conv_shortcut", "conv_in", "conv_out", "linear_1", "linear_2", "downsamplers.0.conv",
    "upsamplers.0.conv",
)  # fmt: skip


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_pefts_layers_are_called_and_have_the_gradients_that_they_have_in_diffusers(kind, checkpointing):
    from peft import LoraConfig, get_peft_model_state_dict, inject_adapter_in_model

    config = CONFIGS[kind]
    unet = our_unet(config)
    theirs = diffusers_unet(config, unet)
    given, (their_given, added) = inputs(config)
    plain = unet(*given).detach()
    unet.enable_gradient_checkpointing(checkpointing)
    view = unet_view(unet, diffusers_paths=True)
    lora = LoraConfig(r=2, target_modules=[*LAYERS])
    for network in (view, theirs):
        inject_adapter_in_model(lora, network)
    assert relative(unet(*given), plain) < 1e-5
    weights, their_weights = get_peft_model_state_dict(view), get_peft_model_state_dict(theirs)
    assert weights.keys() == their_weights.keys()
    assert len(weights) == 2 * sum(
        not name.endswith(("norm", "norm1", "norm2", "norm3", "conv_norm_out"))
        for name in module_names(config).values()
    )
    ours_by_name, theirs_by_name = (
        {name: one for name, one in network.named_parameters() if one.requires_grad} for network in (view, theirs)
    )
    torch.manual_seed(2)
    for name, one in theirs_by_name.items():
        nn.init.normal_(one, std=0.1)
        ours_by_name[name].data.copy_(one)
    out, expected = unet(*given), theirs(*their_given, added_cond_kwargs=added).sample
    assert relative(out, expected) < 1e-4 and relative(out, plain) > 1e-2
    for one in (out, expected):
        one.square().mean().backward()
    scale = 1e-7 * float(torch.stack([one.grad.norm() for one in theirs_by_name.values()]).norm())
    assert [
        name
        for name, one in theirs_by_name.items()
        if not (ours_by_name[name].grad - one.grad).norm() <= 1e-4 * one.grad.norm() + scale
    ] == []


def test_peft_on_the_u_net_itself_goes_by_stabilitys_names():
    from peft import LoraConfig, inject_adapter_in_model

    unet = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    plain = unet(*given).detach()
    inject_adapter_in_model(LoraConfig(r=2, target_modules=["to_q", "in_layers.2", "time_embed.0"]), unet)
    trained = {name: one for name, one in unet.named_parameters() if one.requires_grad}
    assert "input_blocks.1.0.in_layers.2.lora_A.default.weight" in trained
    assert relative(unet(*given), plain) < 1e-5
    unet(*given).square().mean().backward()
    assert [name for name, one in trained.items() if one.grad is None] == []
