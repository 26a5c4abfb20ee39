"""A U-Net's configuration against the config.json of diffusers' UNet2DConditionModel, both ways."""

from collections.abc import Mapping, Sequence
from typing import Any

from library.errors import InputError
from library.models.unet import NORM_GROUPS, SIZE_EMBEDDING_DIM, UNetConfig

_PLAIN_DOWN, _ATTENTION_DOWN = "DownBlock2D", "CrossAttnDownBlock2D"
_PLAIN_UP, _ATTENTION_UP = "UpBlock2D", "CrossAttnUpBlock2D"
_SAMPLE_SIZE = 128  # latents' side that pipelines make when they are not told: SDXL's 1024 px
# Settings that this U-Net has no other choice for; a file may leave them out.
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "class_embed_type": None,
    "encoder_hid_dim": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-05,
    "norm_num_groups": NORM_GROUPS,
    "only_cross_attention": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
}


def to_diffusers(config: UNetConfig) -> dict[str, Any]:
    """The config.json that makes UNet2DConditionModel the same network, with the same parameters.

    Raises:
        InputError: diffusers has no way to say it: the middle block differs in depth from a last level with attention.
    """
    depths = config.transformer_depth
    if depths[-1] and depths[-1] != config.transformer_depth_middle:
        raise InputError(
            f"diffusers cannot express a U-Net with {depths[-1]} transformer layers in the last level and "
            f"{config.transformer_depth_middle} in the middle. Save it as safetensors or ckpt."
        )
    sized = config.adm_in_channels is not None
    return {
        **_FIXED,
        "_class_name": "UNet2DConditionModel",
        "addition_embed_type": "text_time" if sized else None,
        "addition_time_embed_dim": SIZE_EMBEDDING_DIM if sized else None,
        # In diffusers' files this name stands for the number of heads.
        "attention_head_dim": [config.num_heads or max(1, size // config.num_head_channels)
                               for size in config.level_channels],
        "block_out_channels": list(config.level_channels),
        "cross_attention_dim": config.context_dim,
        "down_block_types": [_ATTENTION_DOWN if depth else _PLAIN_DOWN for depth in depths],
        "in_channels": config.in_channels,
        "layers_per_block": config.num_res_blocks,
        "out_channels": config.out_channels,
        "projection_class_embeddings_input_dim": config.adm_in_channels,
        "sample_size": _SAMPLE_SIZE,
        "transformer_layers_per_block": [*(max(1, depth) for depth in depths[:-1]), config.transformer_depth_middle],
        "up_block_types": [_ATTENTION_UP if depth else _PLAIN_UP for depth in reversed(depths)],
        "use_linear_projection": config.use_linear_in_transformer,
    }  # fmt: skip


def from_diffusers(content: Mapping[str, Any], origin: str) -> UNetConfig:
    """The configuration that a config.json means.

    Args:
        origin: the file, for messages.

    Raises:
        InputError: it describes another kind of U-Net, or lacks a setting.
    """
    try:
        return _from_diffusers(content)
    except KeyError as error:
        raise InputError(f"{origin}: the setting {error} is missing; no U-Net of Stable Diffusion's kind.") from error
    except ValueError as error:
        raise InputError(f"{origin}: not a U-Net that can be trained here: {error}") from error


def _from_diffusers(content: Mapping[str, Any]) -> UNetConfig:
    for name, value in _FIXED.items():
        if content.get(name, value) != value:
            raise ValueError(f"{name} is {content[name]!r}, only {value!r} is known")
    channels = content["block_out_channels"]
    levels = len(channels)
    down = content["down_block_types"]
    known = {_PLAIN_DOWN, _ATTENTION_DOWN}
    mirrored = [_ATTENTION_UP if kind == _ATTENTION_DOWN else _PLAIN_UP for kind in reversed(down)]
    if not set(down) <= known or list(content["up_block_types"]) != mirrored:
        raise ValueError(f"the blocks {list(down)}, {list(content['up_block_types'])}")
    layers = _per_level(content.get("transformer_layers_per_block", 1), levels)
    depths = tuple(layer if kind == _ATTENTION_DOWN else 0 for layer, kind in zip(layers, down, strict=True))
    blocks = set(_per_level(content["layers_per_block"], levels))
    widths = set(_per_level(content["cross_attention_dim"], levels))
    multiples = [size // channels[0] for size in channels]
    if len(blocks) != 1 or len(widths) != 1 or [channels[0] * factor for factor in multiples] != list(channels):
        raise ValueError("levels with other blocks, context widths or channels than multiples of the first")
    added = content.get("addition_embed_type")
    if added not in (None, "text_time") or (added and content["addition_time_embed_dim"] != SIZE_EMBEDDING_DIM):
        raise ValueError(f"addition_embed_type is {added!r}")
    return UNetConfig(
        in_channels=content["in_channels"],
        out_channels=content["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(multiples),
        num_res_blocks=blocks.pop(),
        transformer_depth=depths,
        transformer_depth_middle=layers[-1],
        context_dim=widths.pop(),
        adm_in_channels=content["projection_class_embeddings_input_dim"] if added else None,
        use_linear_in_transformer=content.get("use_linear_projection", False),
        **_heads(content, channels, depths),
    )


def _heads(content: Mapping[str, Any], channels: Sequence[int], depths: Sequence[int]) -> dict[str, int]:
    """Heads of one size everywhere (SD 2, SDXL) or of one number everywhere (SD 1)."""
    setting = content.get("num_attention_heads") or content.get("attention_head_dim", 8)
    heads = _per_level(setting, len(channels))
    used = [(size, n) for size, n, depth in zip(channels, heads, depths, strict=True) if depth]
    used.append((channels[-1], heads[-1]))  # the middle block
    sizes = {size / n for size, n in used}
    if len(sizes) == 1:
        return {"num_head_channels": int(sizes.pop())}
    numbers = {n for _, n in used}
    if len(numbers) == 1:
        return {"num_heads": numbers.pop()}
    raise ValueError(f"attention_head_dim {heads}: neither one size nor one number of heads")


def _per_level(value: int | Sequence[int], levels: int) -> list[int]:
    """One entry a level from one for all or a list."""
    entries = [value] * levels if isinstance(value, int) else list(value)
    if len(entries) != levels or not all(isinstance(entry, int) for entry in entries):
        raise ValueError(f"{value!r} for {levels} levels")
    return entries
