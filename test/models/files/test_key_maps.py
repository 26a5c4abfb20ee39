"""Names and shapes of tensors against what diffusers' own converters and transformers' models say."""

import pytest
import torch

from library.models.files import key_maps, single_file
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.unet import UNet, UNetConfig

SMALL = UNetConfig(
    model_channels=32,
    num_res_blocks=1,
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    context_dim=16,
    adm_in_channels=8 + 6 * 256,
)
SD1 = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 4, 4),
    transformer_depth=(1, 1, 1, 0),
    transformer_depth_middle=1,
    context_dim=16,
    adm_in_channels=None,
    num_heads=4,
    use_linear_in_transformer=False,
)


def same(found, expected):
    assert set(found) == set(expected)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize("config", [UNetConfig(), SMALL, SD1], ids=["sdxl", "small", "sd1"])
def test_unet_names_and_shapes_are_those_of_diffusers(config):
    """A bijection between all names of both, SDXL's full size included."""
    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        ours = UNet(config).state_dict()
        theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(config)).state_dict()
    names = key_maps.unet_to_diffusers(config)
    assert set(names) == set(ours)
    assert set(names.values()) == set(theirs)
    assert key_maps.inverse(key_maps.inverse(names)) == names
    assert {names[name]: tensor.shape for name, tensor in ours.items()} == {
        name: tensor.shape for name, tensor in theirs.items()
    }


@pytest.mark.parametrize("config", [SMALL, SD1], ids=["small", "sd1"])
def test_unet_tensors_go_where_diffusers_reads_them_from_a_single_file(config):
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    tensors = UNet(config).state_dict()
    for number, name in enumerate(tensors):
        tensors[name] = torch.full_like(tensors[name], number)
    file = {f"model.diffusion_model.{name}": tensor for name, tensor in tensors.items()}
    expected = convert_ldm_unet_checkpoint(file, unet_config_to_diffusers(config))
    same(key_maps.rename(tensors, key_maps.unet_to_diffusers(config)), expected)


def test_two_names_for_one_cannot_be_inverted():
    with pytest.raises(ValueError, match="two names"):
        key_maps.inverse({"a": "c", "b": "c"})


def test_clip_l_file_names_are_transformers_names_with_text_model(text_encoders):
    ours = text_encoders[0].state_dict()
    file = single_file.encoder_to_disk(text_encoders[0].state_dict())
    assert "text_model.encoder.layers.2.self_attn.out_proj.bias" in file
    assert all(name.startswith("text_model.") for name in file)
    same(key_maps.clip_l_to_transformers(file), ours)
    old = file | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
    same(key_maps.clip_l_to_transformers(old), ours)
    same(key_maps.clip_l_to_transformers(ours), ours)  # a folder written by transformers 5


def test_big_g_is_open_clip_and_back(text_encoders):
    ours = text_encoders[1].state_dict()
    file = key_maps.open_clip_from_transformers(ours)
    shapes = {
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"].shape,
        "positional_embedding": (77, 128),
        "transformer.resblocks.1.attn.in_proj_weight": (3 * 128, 128),
        "transformer.resblocks.1.attn.in_proj_bias": (3 * 128,),
        "transformer.resblocks.1.mlp.c_fc.weight": (160, 128),
        "ln_final.bias": (128,),
        "text_projection": (128, 128),
    }
    assert {name: tuple(file[name].shape) for name in shapes} == {n: tuple(shape) for n, shape in shapes.items()}
    assert torch.equal(file["text_projection"], ours["text_projection.weight"].T)
    same(key_maps.open_clip_to_transformers(file), ours)
    same(key_maps.open_clip_to_transformers(file | {"logit_scale": torch.tensor(4.6)}), ours)


def test_big_g_tensors_go_where_diffusers_reads_them_from_a_single_file(text_encoders):
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint

    ours = text_encoders[1].state_dict()
    prefix = "conditioner.embedders.1.model."
    file = {prefix + name: tensor for name, tensor in key_maps.open_clip_from_transformers(ours).items()}
    same(convert_open_clip_checkpoint(text_encoders[1], file, prefix=prefix), ours)


@pytest.mark.parametrize("convert", [key_maps.open_clip_to_transformers, key_maps.open_clip_from_transformers])
def test_a_name_that_is_not_big_gs_is_an_error(convert):
    with pytest.raises(KeyError, match="visual"):
        convert({"visual.proj": torch.zeros(1)})


def test_fused_matrix_holds_query_key_value_in_this_order(text_encoders):
    """The order decides what the model computes: torch's own attention layer has it."""
    encoder = text_encoders[1].text_model.encoder.layers[0].self_attn
    file = key_maps.open_clip_from_transformers(text_encoders[1].state_dict())
    layer = torch.nn.MultiheadAttention(128, 2, batch_first=True)
    ours = {n: file[f"transformer.resblocks.0.attn.{n}"] for n in layer.state_dict()}
    layer.load_state_dict(ours)
    x = torch.randn(1, 5, 128)
    with torch.no_grad():
        torch.testing.assert_close(layer(x, x, x)[0], encoder(x)[0], rtol=1e-4, atol=1e-4)


def test_vae_is_stabilitys_and_back(vae):
    ours = vae.state_dict()
    file = key_maps.vae_from_diffusers(ours)
    assert file["decoder.mid.attn_1.proj_out.weight"].shape == (64, 64, 1, 1)
    assert file["encoder.down.1.block.0.nin_shortcut.weight"].shape == (64, 32, 1, 1)
    assert file["decoder.up.0.block.1.conv1.weight"].shape == (32, 32, 3, 3)  # level 0 is the finest
    assert {"encoder.down.0.downsample.conv.bias", "decoder.up.1.upsample.conv.bias", "decoder.norm_out.bias"} <= set(
        file
    )
    same(key_maps.vae_to_diffusers(file), ours)


def test_vae_tensors_go_where_diffusers_reads_them_from_a_single_file(vae):
    from diffusers.loaders.single_file_utils import convert_ldm_vae_checkpoint

    ours = vae.state_dict()
    file = {f"first_stage_model.{name}": tensor for name, tensor in key_maps.vae_from_diffusers(ours).items()}
    same(convert_ldm_vae_checkpoint(file, vae.config), ours)


def test_vae_folder_of_older_diffusers_gets_todays_names(vae):
    older = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    ours = vae.state_dict()
    folder = {}
    for name, tensor in ours.items():
        for new, old in older.items():
            name = name.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        folder[name] = tensor
    assert "encoder.mid_block.attentions.0.query.weight" in folder
    same(key_maps.vae_from_older_diffusers(folder), ours)
    same(key_maps.vae_from_older_diffusers(ours), ours)
