"""Small U-Nets of the three families, and their pairs in diffusers."""

import torch

from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.files.key_maps import rename, unet_to_diffusers
from library.models.unet import UNet, UNetConfig, size_embedding
from test.models.weights import normal_weights

POOLED = 40
SDXL_LIKE = UNetConfig(
    model_channels=32,
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    context_dim=48,
    adm_in_channels=POOLED + 6 * 256,
)
SD1_LIKE = UNetConfig(
    model_channels=32,
    channel_mult=(1, 2, 2),
    num_res_blocks=1,
    transformer_depth=(1, 1, 0),
    transformer_depth_middle=1,
    context_dim=48,
    adm_in_channels=None,
    num_heads=4,
    use_linear_in_transformer=False,
)
SD2_LIKE = UNetConfig(
    model_channels=64,
    channel_mult=(1, 2),
    num_res_blocks=1,
    transformer_depth=(1, 0),
    transformer_depth_middle=1,
    context_dim=48,
    adm_in_channels=None,
)
# Topologies of the published models, a tenth as wide.
NARROW = {"model_channels": 32, "context_dim": 16, "num_head_channels": 32}
PUBLISHED = {
    "sd1": UNetConfig(
        **{**NARROW, "num_heads": 8}, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0),
        transformer_depth_middle=1, adm_in_channels=None, use_linear_in_transformer=False,
    ),
    "sd2": UNetConfig(
        **NARROW, channel_mult=(1, 2, 4, 4), transformer_depth=(1, 1, 1, 0), transformer_depth_middle=1,
        adm_in_channels=None,
    ),
    "sdxl": UNetConfig(**NARROW, adm_in_channels=32 + 6 * 256),
}  # fmt: skip
CONFIGS = {"sdxl": SDXL_LIKE, "sd1": SD1_LIKE, "sd2": SD2_LIKE}
SIZES = torch.tensor([[480.0, 640, 0, 96, 512, 640], [1024, 1024, 13, 0, 1024, 1024]])


def our_unet(config):
    """A network without zero weights."""
    torch.manual_seed(0)
    return normal_weights(UNet(config))


def diffusers_unet(config, ours=None):
    """diffusers' network of the same topology, of the same weights if `ours` is given."""
    from diffusers import UNet2DConditionModel

    theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(config))
    if ours is not None:
        theirs.load_state_dict(rename(ours.state_dict(), unet_to_diffusers(config)))
    return theirs


def inputs(config, rows=8, columns=8):
    """What `UNet.forward` takes, and the same for diffusers' (arguments, added_cond_kwargs)."""
    torch.manual_seed(1)
    given = torch.randn(2, 4, rows, columns), torch.tensor([3, 977]), torch.randn(2, 7, config.context_dim)
    pooled = torch.randn(2, POOLED)
    if config.adm_in_channels is None:
        return (*given, None), (given, None)
    vector = torch.cat([pooled, size_embedding(SIZES)], dim=1)
    return (*given, vector), (given, {"text_embeds": pooled, "time_ids": SIZES})


def module_names(config):
    """Every layer with weights: Stability's path -> diffusers' path."""
    return {old.rpartition(".")[0]: new.rpartition(".")[0] for old, new in unet_to_diffusers(config).items()}


def relative(found, expected):
    """The distance of two tensors of one shape, relative to the second one's norm."""
    assert found.shape == expected.shape
    return float((found.detach() - expected.detach()).norm() / expected.detach().norm())
