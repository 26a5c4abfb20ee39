"""A U-Net's configuration as diffusers keeps it, in unet/config.json, and back."""

from collections.abc import Mapping
from typing import Any

from library.errors import InputError
from library.models.unet import NORM_GROUPS, SIZE_EMBEDDING_DIM, UNetConfig

# What this U-Net is and cannot be told to be otherwise; a file that lacks a field means the value here.
_FIXED: dict[str, Any] = {
    "act_fn": "silu",
    "attention_type": "default",
    "center_input_sample": False,
    "class_embed_type": None,
    "conv_in_kernel": 3,
    "conv_out_kernel": 3,
    "downsample_padding": 1,
    "dropout": 0.0,
    "dual_cross_attention": False,
    "encoder_hid_dim": None,
    "encoder_hid_dim_type": None,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "mid_block_scale_factor": 1,
    "mid_block_type": "UNetMidBlock2DCrossAttn",
    "norm_eps": 1e-5,
    "norm_num_groups": NORM_GROUPS,
    "num_class_embeds": None,
    "only_cross_attention": False,
    "resnet_out_scale_factor": 1.0,
    "resnet_skip_time_act": False,
    "resnet_time_scale_shift": "default",
    "reverse_transformer_layers_per_block": None,
    "time_cond_proj_dim": None,
    "time_embedding_act_fn": None,
    "time_embedding_dim": None,
    "time_embedding_type": "positional",
    "timestep_post_act": None,
}
_DOWN, _DOWN_ATTENTION = "DownBlock2D", "CrossAttnDownBlock2D"
_UP, _UP_ATTENTION = "UpBlock2D", "CrossAttnUpBlock2D"


def unet_config_to_diffusers(config: UNetConfig, sample_size: int | list[int] = 128) -> dict[str, Any]:
    """The content of unet/config.json, without `_diffusers_version`.

    Args:
        sample_size: latent rows and columns that pipelines make by default; 128 is SDXL's, 1024 px.

    Raises:
        InputError: diffusers has no words for this configuration.
    """
    depths = config.transformer_depth
    if depths[-1] not in (0, config.transformer_depth_middle):
        raise InputError(
            f"U-Net configuration: diffusers gives the middle block the depth of the last level ({depths[-1]}), here "
            f"it is {config.transformer_depth_middle}; save a single file instead"
        )
    heads = [config.heads(channels) for channels in config.level_channels]
    layers = [depth or 1 for depth in depths[:-1]] + [config.transformer_depth_middle]
    fields = {
        "_class_name": "UNet2DConditionModel",
        **_FIXED,
        "sample_size": sample_size,
        "in_channels": config.in_channels,
        "out_channels": config.out_channels,
        "block_out_channels": list(config.level_channels),
        "layers_per_block": config.num_res_blocks,
        "down_block_types": [_DOWN_ATTENTION if depth else _DOWN for depth in depths],
        "up_block_types": [_UP_ATTENTION if depth else _UP for depth in reversed(depths)],
        "transformer_layers_per_block": layers,
        # The field's name says size, its meaning is the number of heads: diffusers keeps it for old files' sake.
        "attention_head_dim": heads if config.num_heads is None else config.num_heads,
        "num_attention_heads": None,
        "cross_attention_dim": config.context_dim,
        "use_linear_projection": config.use_linear_in_transformer,
        "upcast_attention": config.upcast_attention or None,
    }
    if config.adm_in_channels is not None:
        fields |= {
            "addition_embed_type": "text_time",
            "addition_time_embed_dim": SIZE_EMBEDDING_DIM,
            "projection_class_embeddings_input_dim": config.adm_in_channels,
        }
    return fields


def unet_config_from_diffusers(fields: Mapping[str, Any], origin: str) -> UNetConfig:
    """The configuration that unet/config.json describes.

    Args:
        origin: the file, for messages.

    Raises:
        InputError: it describes another kind of U-Net, or a field is missing; the message names the field.
    """
    for name, value in _FIXED.items():
        found = fields.get(name, value)
        if found != value and not (name == "only_cross_attention" and not any(_listed(found, 1))):
            raise InputError(f"{origin}: {name} is {found!r}; this U-Net supports {value!r} only")
    try:
        return _read(fields, origin)
    except KeyError as missing:
        raise InputError(f"{origin}: the field {missing} is missing; is it a U-Net's config.json?") from missing
    except InputError:
        raise
    except (TypeError, ValueError, ArithmeticError, IndexError) as error:
        raise InputError(
            f"{origin}: a field has a value of the wrong kind ({error}). Copy or download it again."
        ) from error


def _read(fields: Mapping[str, Any], origin: str) -> UNetConfig:
    channels = list(fields["block_out_channels"])
    levels = len(channels)
    kinds, up_kinds = list(fields["down_block_types"]), list(fields["up_block_types"])
    if any(kind not in (_DOWN, _DOWN_ATTENTION) for kind in kinds) or up_kinds != [
        _UP_ATTENTION if kind == _DOWN_ATTENTION else _UP for kind in reversed(kinds)
    ]:
        raise InputError(f"{origin}: blocks {kinds} down and {up_kinds} up are not Stable Diffusion's")
    if any(size % channels[0] for size in channels):
        raise InputError(f"{origin}: block_out_channels {channels} are not multiples of the first")
    layers = _listed(fields.get("transformer_layers_per_block", 1), levels)
    blocks = set(_listed(fields["layers_per_block"], levels))
    if len(blocks) != 1:
        raise InputError(f"{origin}: layers_per_block {fields['layers_per_block']} must be the same at every level")
    attended = [level for level in range(levels) if kinds[level] == _DOWN_ATTENTION or level == levels - 1]
    heads = _listed(fields.get("num_attention_heads") or fields["attention_head_dim"], levels)
    sizes = {channels[level] // heads[level] for level in attended}
    counts = {heads[level] for level in attended}
    if len(sizes) > 1 and len(counts) > 1:
        raise InputError(f"{origin}: heads {heads} give neither one head size nor one number of heads")
    return UNetConfig(
        in_channels=fields["in_channels"],
        out_channels=fields["out_channels"],
        model_channels=channels[0],
        channel_mult=tuple(size // channels[0] for size in channels),
        num_res_blocks=blocks.pop(),
        transformer_depth=tuple(layers[level] if kinds[level] == _DOWN_ATTENTION else 0 for level in range(levels)),
        transformer_depth_middle=layers[-1],
        context_dim=fields["cross_attention_dim"],
        adm_in_channels=_vector_width(fields, origin),
        num_head_channels=sizes.pop() if len(sizes) == 1 else UNetConfig.num_head_channels,
        num_heads=counts.pop() if len(sizes) > 1 else None,
        use_linear_in_transformer=bool(fields.get("use_linear_projection", False)),
        upcast_attention=bool(fields.get("upcast_attention")),
    )


def _vector_width(fields: Mapping[str, Any], origin: str) -> int | None:
    kind = fields.get("addition_embed_type")
    if kind is None:
        return None
    if kind != "text_time" or fields["addition_time_embed_dim"] != SIZE_EMBEDDING_DIM:
        raise InputError(
            f"{origin}: addition_embed_type is {kind!r}, addition_time_embed_dim "
            f"{fields.get('addition_time_embed_dim')}; this U-Net supports 'text_time' with {SIZE_EMBEDDING_DIM} only"
        )
    return int(fields["projection_class_embeddings_input_dim"])


def _listed(value: Any, levels: int) -> list[Any]:
    """One value a level, whether the file holds a list or one value for all."""
    return list(value) if isinstance(value, (list, tuple)) else [value] * levels
