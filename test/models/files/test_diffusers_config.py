"""unet/config.json against SDXL's published one and what diffusers builds of it."""

import json

import pytest

from library.errors import InputError
from library.models.files.diffusers_config import unet_config_from_diffusers, unet_config_to_diffusers
from library.models.unet import UNetConfig

# The fields of stabilityai/stable-diffusion-xl-base-1.0's unet/config.json.
SDXL = json.loads("""{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.19.0.dev0", "act_fn": "silu",
  "addition_embed_type": "text_time", "addition_embed_type_num_heads": 64, "addition_time_embed_dim": 256,
  "attention_head_dim": [5, 10, 20], "block_out_channels": [320, 640, 1280], "center_input_sample": false,
  "class_embed_type": null, "class_embeddings_concat": false, "conv_in_kernel": 3, "conv_out_kernel": 3,
  "cross_attention_dim": 2048, "cross_attention_norm": null,
  "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"], "downsample_padding": 1,
  "dual_cross_attention": false, "encoder_hid_dim": null, "encoder_hid_dim_type": null, "flip_sin_to_cos": true,
  "freq_shift": 0, "in_channels": 4, "layers_per_block": 2, "mid_block_only_cross_attention": null,
  "mid_block_scale_factor": 1, "mid_block_type": "UNetMidBlock2DCrossAttn", "norm_eps": 1e-05, "norm_num_groups": 32,
  "num_attention_heads": null, "num_class_embeds": null, "only_cross_attention": false, "out_channels": 4,
  "projection_class_embeddings_input_dim": 2816, "resnet_out_scale_factor": 1.0, "resnet_skip_time_act": false,
  "resnet_time_scale_shift": "default", "sample_size": 128, "time_cond_proj_dim": null,
  "time_embedding_act_fn": null, "time_embedding_dim": null, "time_embedding_type": "positional",
  "timestep_post_act": null, "transformer_layers_per_block": [1, 2, 10],
  "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"], "upcast_attention": null,
  "use_linear_projection": true
}""")
# Those of runwayml/stable-diffusion-v1-5, which are fewer; the rest are diffusers' defaults.
SD1 = json.loads("""{
  "_class_name": "UNet2DConditionModel", "_diffusers_version": "0.6.0", "act_fn": "silu", "attention_head_dim": 8,
  "block_out_channels": [320, 640, 1280, 1280], "center_input_sample": false, "cross_attention_dim": 768,
  "down_block_types": ["CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
  "downsample_padding": 1, "flip_sin_to_cos": true, "freq_shift": 0, "in_channels": 4, "layers_per_block": 2,
  "mid_block_scale_factor": 1, "norm_eps": 1e-05, "norm_num_groups": 32, "out_channels": 4, "sample_size": 64,
  "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]
}""")


def test_sdxls_config_is_the_default():
    assert unet_config_from_diffusers(SDXL, "config.json") == UNetConfig()


def test_what_is_written_says_the_same_as_sdxls_own_file():
    written = unet_config_to_diffusers(UNetConfig())
    for name, value in SDXL.items():
        if name in written:
            assert written[name] == value, name
    meaning = {"block_out_channels", "attention_head_dim", "transformer_layers_per_block", "cross_attention_dim",
               "projection_class_embeddings_input_dim", "addition_embed_type", "down_block_types", "up_block_types",
               "use_linear_projection", "sample_size", "layers_per_block", "in_channels", "out_channels"}  # fmt: skip
    assert meaning <= set(written)
    json.dumps(written)


def test_every_field_written_is_one_that_diffusers_knows():
    import inspect

    from diffusers import UNet2DConditionModel

    known = set(inspect.signature(UNet2DConditionModel.__init__).parameters) | {"_class_name"}
    assert set(unet_config_to_diffusers(UNetConfig())) <= known


def test_sd1s_config_is_eight_heads_and_convolutions():
    config = unet_config_from_diffusers(SD1, "config.json")
    assert config == UNetConfig(
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(1, 1, 1, 0),
        transformer_depth_middle=1,
        context_dim=768,
        adm_in_channels=None,
        num_heads=8,
        use_linear_in_transformer=False,
    )
    assert unet_config_from_diffusers(unet_config_to_diffusers(config), "written") == config


@pytest.mark.parametrize(
    "config",
    [
        UNetConfig(model_channels=64, transformer_depth=(0, 1, 3), transformer_depth_middle=3, num_res_blocks=1),
        UNetConfig(model_channels=64, channel_mult=(1, 2), transformer_depth=(2, 0), transformer_depth_middle=4),
        UNetConfig(in_channels=9, out_channels=8, num_head_channels=32, adm_in_channels=2560),
    ],
)
def test_written_and_read_again_it_is_the_same(config):
    assert unet_config_from_diffusers(json.loads(json.dumps(unet_config_to_diffusers(config))), "written") == config


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"act_fn": "gelu"}, "act_fn is 'gelu'"),
        ({"class_embed_type": "timestep"}, "class_embed_type is 'timestep'"),
        ({"addition_embed_type": "image"}, "addition_embed_type is 'image'"),
        ({"addition_time_embed_dim": 128}, "addition_time_embed_dim 128"),
        ({"layers_per_block": [1, 2, 2]}, "layers_per_block"),
        ({"attention_head_dim": [5, 10, 40]}, "heads"),
        ({"block_out_channels": [320, 480, 1280]}, "not multiples"),
        ({"down_block_types": ["KDownBlock2D"] * 3}, "not Stable Diffusion's"),
        ({"up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"]}, "not Stable Diffusion's"),
    ],
)
def test_another_kind_of_unet_is_refused_with_the_fields_name(change, words):
    with pytest.raises(InputError, match=words) as caught:
        unet_config_from_diffusers(SDXL | change, "some/config.json")
    assert str(caught.value).startswith("some/config.json: ")


def test_a_missing_field_is_named():
    fields = {name: value for name, value in SDXL.items() if name != "cross_attention_dim"}
    with pytest.raises(InputError, match="the field 'cross_attention_dim' is missing"):
        unet_config_from_diffusers(fields, "config.json")


def test_a_middle_block_that_diffusers_cannot_describe_is_refused():
    with pytest.raises(InputError, match="save a single file instead"):
        unet_config_to_diffusers(UNetConfig(transformer_depth_middle=4))
