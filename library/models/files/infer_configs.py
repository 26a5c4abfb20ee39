"""Configurations of a model's networks as far as the shapes in a single file tell them.

What they do not tell is `kept_configs`' business; the defaults here are Stable Diffusion's. A missing key raises
KeyError; the caller knows the file's name.
"""

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from library.models.files.key_maps import count

HEAD_CHANNELS = 64
VAE_NORM_GROUPS = 32


def unet_sizes(tensors: Mapping[str, Tensor]) -> dict[str, Any]:
    """The fields of `UNetConfig` that are sizes: all but those about heads and upcasting.

    Args:
        tensors: by Stability's keys, without `model.diffusion_model.`.
    """
    model_channels, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    channels: list[int] = []  # of the blocks of each level
    blocks: list[int] = []
    depths: list[int] = []
    for index in range(1, count(tensors, r"input_blocks\.(\d+)\.")):
        if f"input_blocks.{index}.0.op.weight" in tensors:
            continue  # the downsampling that ends a level
        if not channels or f"input_blocks.{index - 1}.0.op.weight" in tensors:
            channels.append(tensors[f"input_blocks.{index}.0.out_layers.3.weight"].shape[0])
            depths.append(count(tensors, rf"input_blocks\.{index}\.1\.transformer_blocks\.(\d+)\."))
            blocks.append(0)
        blocks[-1] += 1
    to_k = next(name for name in tensors if name.endswith("attn2.to_k.weight"))
    label = tensors.get("label_emb.0.0.weight")
    return {
        "in_channels": in_channels,
        "out_channels": tensors["out.2.weight"].shape[0],
        "model_channels": model_channels,
        "channel_mult": tuple(size // model_channels for size in channels),
        "num_res_blocks": blocks[0],
        "transformer_depth": tuple(depths),
        "transformer_depth_middle": count(tensors, r"middle_block\.1\.transformer_blocks\.(\d+)\."),
        "context_dim": tensors[to_k].shape[1],
        "adm_in_channels": None if label is None else label.shape[1],
        "use_linear_in_transformer": tensors["middle_block.1.proj_in.weight"].ndim == 2,
    }


def clip_config(tensors: Mapping[str, Tensor], *, hidden_act: str) -> dict[str, Any]:
    """The arguments of transformers' CLIPTextConfig, with the special ids that the published configs have.

    Args:
        tensors: by transformers' names, with or without `text_model.`.
        hidden_act: the family's.
    """
    tensors = {name.removeprefix("text_model."): tensor for name, tensor in tensors.items()}
    vocabulary, width = tensors["embeddings.token_embedding.weight"].shape
    projection = tensors.get("text_projection.weight")
    return {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "intermediate_size": tensors["encoder.layers.0.mlp.fc1.weight"].shape[0],
        "num_hidden_layers": count(tensors, r"encoder\.layers\.(\d+)\."),
        "num_attention_heads": width // HEAD_CHANNELS,
        "max_position_embeddings": tensors["embeddings.position_embedding.weight"].shape[0],
        "projection_dim": width if projection is None else projection.shape[0],
        "hidden_act": hidden_act,
        "bos_token_id": 0,
        "eos_token_id": 2,  # in transformers: EOS is where the highest id stands, as OpenCLIP has it
        "pad_token_id": 1,
    }


def vae_config(tensors: Mapping[str, Tensor], scaling_factor: float, sample_size: int) -> dict[str, Any]:
    """The arguments of diffusers' AutoencoderKL.

    Args:
        tensors: by Stability's keys without `first_stage_model.`, or by diffusers' names.
        sample_size: width and height in px of the pictures that it is for.
    """
    block = re.compile(r"encoder\.(?:down|down_blocks)\.(\d+)\.(?:block|resnets)\.(\d+)\.conv1\.weight")
    found = {(int(m[1]), int(m[2])): tensors[m[0]].shape[0] for name in tensors if (m := block.fullmatch(name))}
    if not found:
        raise KeyError("encoder.down.0.block.0.conv1.weight")
    levels = max(level for level, _ in found) + 1
    return {
        "in_channels": tensors["encoder.conv_in.weight"].shape[1],
        "out_channels": tensors["decoder.conv_out.weight"].shape[0],
        "block_out_channels": tuple(found[level, 0] for level in range(levels)),
        "down_block_types": ("DownEncoderBlock2D",) * levels,
        "up_block_types": ("UpDecoderBlock2D",) * levels,
        "layers_per_block": max(place for _, place in found) + 1,
        "latent_channels": tensors["decoder.conv_in.weight"].shape[1],
        "norm_num_groups": VAE_NORM_GROUPS,
        "sample_size": sample_size,
        "scaling_factor": scaling_factor,
        "use_quant_conv": "quant_conv.weight" in tensors,
        "use_post_quant_conv": "post_quant_conv.weight" in tensors,
    }
