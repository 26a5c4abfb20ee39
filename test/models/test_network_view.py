"""What networks of others find in a view: names as files have them, counts as sd-scripts has them, the same layers."""

import pytest
import torch
from torch import nn

from library.models.network_view import text_encoder_view, unet_view
from library.models.unet import UNet
from test.models.unets import CONFIGS, PUBLISHED, diffusers_unet, inputs, module_names, our_unet, relative

# sd-scripts' modules of the U-Net: by default, and with conv_dim.
COUNTS = {"sd1": (192, 278), "sd2": (192, 278), "sdxl": (722, 788)}
TRANSFORMERS, CONVOLUTIONS = {"Transformer2DModel"}, {"ResnetBlock2D", "Downsample2D", "Upsample2D"}


def names_as_in_sd_scripts(root, prefix, containers):
    """Layers by class name in containers by class name; names are paths with underscores."""
    found = []
    for path, container in root.named_modules():
        if type(container).__name__ in containers:
            for name, layer in container.named_modules():
                if type(layer).__name__ in ("Linear", "Conv2d"):
                    found.append(f"{prefix}.{path}.{name}".replace(".", "_"))
    return found


def made(config):
    with torch.device("meta"):
        return UNet(config)


def view_of(kind, network):
    return unet_view(network, diffusers_paths=kind != "sdxl")


@pytest.mark.parametrize("kind", PUBLISHED)
def test_names_and_counts_are_those_of_diffusers_u_net(kind):
    view = view_of(kind, made(PUBLISHED[kind]))
    with torch.device("meta"):
        theirs = diffusers_unet(PUBLISHED[kind])
    for containers, count in zip((TRANSFORMERS, TRANSFORMERS | CONVOLUTIONS), COUNTS[kind], strict=True):
        found = names_as_in_sd_scripts(view, "lora_unet", containers)
        expected = names_as_in_sd_scripts(theirs, "lora_unet", containers)
        if kind == "sdxl":  # whose files have Stability's paths
            ours = {new.replace(".", "_"): old.replace(".", "_") for old, new in module_names(PUBLISHED[kind]).items()}
            expected = [f"lora_unet_{ours[name.removeprefix('lora_unet_')]}" for name in expected]
        assert len(found) == len(set(found)) == count
        assert set(found) == set(expected)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("sdxl", "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q"),
        ("sdxl", "lora_unet_middle_block_1_transformer_blocks_9_ff_net_0_proj"),
        ("sdxl", "lora_unet_input_blocks_3_0_op"),
        ("sdxl", "lora_unet_output_blocks_2_2_conv"),
        ("sdxl", "lora_unet_output_blocks_0_0_skip_connection"),
        ("sdxl", "lora_unet_input_blocks_1_0_in_layers_2"),
        ("sdxl", "lora_unet_input_blocks_1_0_emb_layers_1"),
        ("sd1", "lora_unet_down_blocks_0_attentions_0_proj_in"),
        ("sd1", "lora_unet_up_blocks_1_attentions_0_transformer_blocks_0_attn2_to_out_0"),
        ("sd2", "lora_unet_mid_block_attentions_0_transformer_blocks_0_ff_net_2"),
        ("sd2", "lora_unet_down_blocks_0_resnets_0_time_emb_proj"),
        ("sd2", "lora_unet_up_blocks_1_resnets_0_conv_shortcut"),
        ("sd1", "lora_unet_down_blocks_0_downsamplers_0_conv"),
        ("sd1", "lora_unet_up_blocks_0_upsamplers_0_conv"),
    ],
)
def test_names_are_those_of_users_files(kind, name):
    view = view_of(kind, made(PUBLISHED[kind]))
    assert name in names_as_in_sd_scripts(view, "lora_unet", TRANSFORMERS | CONVOLUTIONS)


@pytest.mark.parametrize("diffusers_paths", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_containers_have_the_classes_that_diffusers_or_sd_scripts_have_there(kind, diffusers_paths):
    view = unet_view(made(CONFIGS[kind]), diffusers_paths)
    kinds = {path: type(module).__name__ for path, module in view.named_modules()}
    assert "CrossAttention" in kinds.values()  # sd-scripts' class; diffusers calls it Attention
    if diffusers_paths:
        with torch.device("meta"):
            theirs = diffusers_unet(CONFIGS[kind])
        expected = {
            path: type(module).__name__.replace("Attention", "CrossAttention")
            for path, module in theirs.named_modules()
        }
        named = {path: name for path, name in kinds.items() if name != "NetworkView"}
        assert {path: expected[path] for path in named} == named
        searched = TRANSFORMERS | CONVOLUTIONS | {"CrossAttention", "FeedForward", "GEGLU", "BasicTransformerBlock"}
        assert {path for path, name in expected.items() if name in searched} <= named.keys()


@pytest.mark.parametrize("diffusers_paths", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_all_layers_with_weights_are_in_the_view_and_are_the_networks_own(kind, diffusers_paths):
    network = made(CONFIGS[kind])
    view = unet_view(network, diffusers_paths)
    assert {id(one) for one in view.parameters()} == {id(one) for one in network.parameters()}
    for old, new in module_names(CONFIGS[kind]).items():
        assert view.get_submodule(new if diffusers_paths else old) is network.get_submodule(old)


@pytest.mark.parametrize("diffusers_paths", [False, True])
def test_a_layer_replaced_in_the_view_is_replaced_in_the_network(diffusers_paths):
    """As peft does it; without this the new layer would be trained by nothing, silently."""
    config = CONFIGS["sd1"]
    network = our_unet(config)
    given, _ = inputs(config)
    plain = network(*given).detach()
    view = unet_view(network, diffusers_paths)
    for old, new in module_names(config).items():
        parent, _, name = (new if diffusers_paths else old).rpartition(".")
        layer = network.get_submodule(old)
        setattr(view.get_submodule(parent), name, nn.Sequential(layer))
        assert type(network.get_submodule(old)) is nn.Sequential
    assert relative(network(*given), plain) < 1e-5


def test_text_encoders_have_the_level_that_files_have(text_encoders):
    first, second = (text_encoder_view(one) for one in text_encoders)
    names = [
        names_as_in_sd_scripts(view, f"lora_te{number}", {"CLIPAttention", "CLIPMLP"})
        for number, view in enumerate((first, second), start=1)
    ]
    assert [len(some) for some in names] == [3 * 6, 2 * 6]
    assert "lora_te1_text_model_encoder_layers_0_self_attn_q_proj" in names[0]
    assert "lora_te2_text_model_encoder_layers_1_mlp_fc2" in names[1]
    for view, encoder in zip((first, second), text_encoders, strict=True):
        assert {id(one) for one in view.parameters()} == {id(one) for one in encoder.parameters()}
        assert "text_model" not in dict(encoder.named_children()) or view is encoder
