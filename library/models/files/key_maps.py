"""Names of tensors in Stability's single files against those of diffusers and transformers, both ways.

Every map is a bijection. U-Net: names only. CLIP-L: names only. bigG and VAE: tensors, since shapes differ, too.
Prefixes of the single file (`model.diffusion_model.` and so on) are the caller's: names here begin after them.
"""

import re
from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor

from library.models.unet import UNetConfig

Value = TypeVar("Value")

_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
}
_UNET_ENDS = {
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "input_blocks.0.0": "conv_in",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_UNET_VECTOR = {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}


def inverse(names: Mapping[str, str]) -> dict[str, str]:
    """The map the other way round.

    Raises:
        ValueError: it is no bijection.
    """
    turned = {new: old for old, new in names.items()}
    if len(turned) != len(names):
        raise ValueError("two names are mapped to one")
    return turned


def rename(tensors: Mapping[str, Value], names: Mapping[str, str]) -> dict[str, Value]:
    """The same tensors by their new names.

    Raises:
        KeyError: a tensor's name is not in the map.
    """
    return {names[name]: tensor for name, tensor in tensors.items()}


# U-Net


def unet_to_diffusers(config: UNetConfig) -> dict[str, str]:
    """Every parameter of a U-Net of that configuration: Stability's name -> UNet2DConditionModel's.

    Stability numbers the stages of the way down and up through; diffusers numbers levels, and layers in each.
    """
    modules = dict(_UNET_ENDS)
    if config.adm_in_channels is not None:
        modules |= _UNET_VECTOR
    plain: set[str] = set()  # attention projections, which have no bias
    channels, depths = config.level_channels, config.transformer_depth
    last = len(channels) - 1

    skips, stage = [channels[0]], 1
    for level, depth in enumerate(depths):
        for index in range(config.num_res_blocks):
            there = f"down_blocks.{level}"
            modules |= _resnet(f"input_blocks.{stage}.0", f"{there}.resnets.{index}", skips[-1] != channels[level])
            if depth:
                modules |= _transformer(f"input_blocks.{stage}.1", f"{there}.attentions.{index}", depth, plain)
            skips.append(channels[level])
            stage += 1
        if level != last:
            modules[f"input_blocks.{stage}.0.op"] = f"down_blocks.{level}.downsamplers.0.conv"
            skips.append(channels[level])
            stage += 1

    modules |= _resnet("middle_block.0", "mid_block.resnets.0", shortcut=False)
    modules |= _transformer("middle_block.1", "mid_block.attentions.0", config.transformer_depth_middle, plain)
    modules |= _resnet("middle_block.2", "mid_block.resnets.1", shortcut=False)

    stage = 0
    for step, depth in enumerate(reversed(depths)):
        for index in range(config.num_res_blocks + 1):
            there = f"up_blocks.{step}"
            # The skip connection's channels come on top, so the width always changes.
            modules |= _resnet(f"output_blocks.{stage}.0", f"{there}.resnets.{index}", shortcut=True)
            if depth:
                modules |= _transformer(f"output_blocks.{stage}.1", f"{there}.attentions.{index}", depth, plain)
            if step != last and index == config.num_res_blocks:
                modules[f"output_blocks.{stage}.{2 if depth else 1}.conv"] = f"{there}.upsamplers.0.conv"
            stage += 1

    return {
        f"{old}.{kind}": f"{new}.{kind}"
        for old, new in modules.items()
        for kind in (("weight",) if old in plain else ("weight", "bias"))
    }


def _resnet(old: str, new: str, shortcut: bool) -> dict[str, str]:
    inner = _RESNET | ({"skip_connection": "conv_shortcut"} if shortcut else {})
    return {f"{old}.{a}": f"{new}.{b}" for a, b in inner.items()}


def _transformer(old: str, new: str, depth: int, plain: set[str]) -> dict[str, str]:
    """A transformer's modules, named alike in both; the projections without bias are added to `plain`."""
    inner = ["norm", "proj_in", "proj_out"]
    for block in range(depth):
        here = f"transformer_blocks.{block}"
        inner += [f"{here}.{layer}" for layer in ("norm1", "norm2", "norm3", "ff.net.0.proj", "ff.net.2")]
        for attention in ("attn1", "attn2"):
            projections = [f"{here}.{attention}.{letter}" for letter in ("to_q", "to_k", "to_v")]
            plain.update(f"{old}.{name}" for name in projections)
            inner += [*projections, f"{here}.{attention}.to_out.0"]
    return {f"{old}.{name}": f"{new}.{name}" for name in inner}


# Text encoders


def clip_l_to_transformers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """CLIP-L: what follows `conditioner.embedders.0.transformer.` or, in SD 1.x, `cond_stage_model.transformer.`.

    transformers 5 has no `text_model.` before the names any more; files, and folders of older versions, have it.
    The position numbers, which some files carry, are dropped: they are 0, 1, 2, ...
    """
    return {
        name.removeprefix("text_model."): tensor
        for name, tensor in tensors.items()
        if not name.endswith("embeddings.position_ids")
    }


_OPEN_CLIP_ENDS = {
    "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "positional_embedding": "text_model.embeddings.position_embedding.weight",
    "ln_final.weight": "text_model.final_layer_norm.weight",
    "ln_final.bias": "text_model.final_layer_norm.bias",
}
_OPEN_CLIP_LAYER = {
    "ln_1": "layer_norm1",
    "ln_2": "layer_norm2",
    "attn.out_proj": "self_attn.out_proj",
    "mlp.c_fc": "mlp.fc1",
    "mlp.c_proj": "mlp.fc2",
}
_PROJECTION_OLD, _PROJECTION_NEW = "text_projection", "text_projection.weight"
_QKV = ("q", "k", "v")  # the order in OpenCLIP's fused matrix


def open_clip_to_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """OpenCLIP: what follows `conditioner.embedders.1.model.` or, in SD 2.x, `cond_stage_model.model.`.

    The new names are those of CLIPTextModelWithProjection's state dict: `text_model.` before all but the projection.

    Fused query, key and value matrices are split (views), the projection is transposed; `logit_scale`, which belongs to
    CLIP's training, is dropped.

    Raises:
        KeyError: a name is not OpenCLIP's.
        ValueError: there are two projections, and they differ.
    """
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name == "logit_scale":
            continue
        if name in _OPEN_CLIP_ENDS:
            renamed[_OPEN_CLIP_ENDS[name]] = tensor
        elif re.fullmatch(rf"{_PROJECTION_OLD}(\.weight)*", name):
            # OpenCLIP multiplies from the right; under .weight the same is a linear layer, as other programs have it.
            projection = tensor.T.contiguous() if name == _PROJECTION_OLD else tensor
            if not torch.equal(renamed.setdefault(_PROJECTION_NEW, projection), projection):
                raise ValueError(f"{name} is another projection than {_PROJECTION_OLD}")
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.attn\.in_proj_(weight|bias)", name):
            layer = f"text_model.encoder.layers.{match[1]}.self_attn"
            for letter, part in zip(_QKV, tensor.chunk(3), strict=True):
                renamed[f"{layer}.{letter}_proj.{match[2]}"] = part
        elif match := re.fullmatch(r"transformer\.resblocks\.(\d+)\.(.+)\.(weight|bias)", name):
            renamed[f"text_model.encoder.layers.{match[1]}.{_OPEN_CLIP_LAYER[match[2]]}.{match[3]}"] = tensor
        else:
            raise KeyError(name)
    return renamed


def open_clip_from_transformers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of open_clip_to_transformers; `logit_scale` is absent.

    Raises:
        KeyError: a name is not CLIPTextModelWithProjection's, or a layer lacks one of query, key and value.
    """
    ends, layer_names = inverse(_OPEN_CLIP_ENDS), inverse(_OPEN_CLIP_LAYER)
    renamed: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in ends:
            renamed[ends[name]] = tensor
        elif name == _PROJECTION_NEW:
            renamed[_PROJECTION_OLD] = tensor.T.contiguous()
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.self_attn\.[qkv]_proj\.(weight|bias)", name):
            fused = f"transformer.resblocks.{match[1]}.attn.in_proj_{match[2]}"
            if fused not in renamed:
                layer = f"text_model.encoder.layers.{match[1]}.self_attn"
                renamed[fused] = torch.cat([tensors[f"{layer}.{letter}_proj.{match[2]}"] for letter in _QKV])
        elif match := re.fullmatch(r"text_model\.encoder\.layers\.(\d+)\.(.+)\.(weight|bias)", name):
            renamed[f"transformer.resblocks.{match[1]}.{layer_names[match[2]]}.{match[3]}"] = tensor
        else:
            raise KeyError(name)
    return renamed


# VAE

_VAE_ATTENTION = {"norm": "group_norm", "q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
# diffusers before 0.18 had these, and many published folders still do.
_VAE_ATTENTION_OLDER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
_VAE_SHORTCUT, _SHORTCUT = ".nin_shortcut.", ".conv_shortcut."


def vae_to_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """VAE: what follows `first_stage_model.` -> AutoencoderKL's state dict.

    Stability's attention has 1×1 convolutions where diffusers has linear layers: those weights are reshaped (views).
    """
    prefixes = _vae_prefixes(count(tensors, r"decoder\.up\.(\d+)\."))
    renamed = {}
    for name, tensor in tensors.items():
        new = _swap_prefix(name, prefixes).replace(_VAE_SHORTCUT, _SHORTCUT)
        renamed[new] = tensor.flatten(1) if ".attentions." in new and tensor.ndim == 4 else tensor
    return renamed


def vae_from_diffusers(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of vae_to_diffusers."""
    prefixes = inverse(_vae_prefixes(count(tensors, r"decoder\.up_blocks\.(\d+)\.")))
    renamed = {}
    for name, tensor in tensors.items():
        new = _swap_prefix(name, prefixes).replace(_SHORTCUT, _VAE_SHORTCUT)
        renamed[new] = tensor[:, :, None, None] if ".attentions." in name and tensor.ndim == 2 else tensor
    return renamed


def vae_from_older_diffusers(tensors: Mapping[str, Value]) -> dict[str, Value]:
    """AutoencoderKL's names of today for a folder written before diffusers 0.18; others pass unchanged."""
    pattern = re.compile(rf"(?<=attentions\.0\.)({'|'.join(_VAE_ATTENTION_OLDER)})(?=\.)")
    return {pattern.sub(lambda m: _VAE_ATTENTION_OLDER[m[1]], name): tensor for name, tensor in tensors.items()}


def _vae_prefixes(levels: int) -> dict[str, str]:
    """What names of Stability's VAE begin with -> diffusers'; diffusers numbers the decoder's levels the other way."""
    prefixes = {}
    for level in range(levels):
        down, up = f"encoder.down_blocks.{level}", f"decoder.up_blocks.{levels - 1 - level}"
        prefixes[f"encoder.down.{level}.block."] = f"{down}.resnets."
        prefixes[f"encoder.down.{level}.downsample."] = f"{down}.downsamplers.0."
        prefixes[f"decoder.up.{level}.block."] = f"{up}.resnets."
        prefixes[f"decoder.up.{level}.upsample."] = f"{up}.upsamplers.0."
    for half in ("encoder", "decoder"):
        prefixes[f"{half}.mid.block_1."] = f"{half}.mid_block.resnets.0."
        prefixes[f"{half}.mid.block_2."] = f"{half}.mid_block.resnets.1."
        prefixes[f"{half}.norm_out."] = f"{half}.conv_norm_out."
        for old, new in _VAE_ATTENTION.items():
            prefixes[f"{half}.mid.attn_1.{old}."] = f"{half}.mid_block.attentions.0.{new}."
    return prefixes


def _swap_prefix(name: str, prefixes: Mapping[str, str]) -> str:
    """The name with its beginning replaced if the map has it; no prefix of the map begins another."""
    for old, new in prefixes.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def count(names: Mapping[str, object], pattern: str) -> int:
    """How many numbers, from 0 without a gap, the pattern's group takes at names' beginnings.

    A gap raises KeyError: one stray name would else make a network of any size.
    """
    compiled = re.compile(pattern)
    numbers = {int(match[1]) for name in names if (match := compiled.match(name))}
    missing = next((number for number in range(len(numbers)) if number not in numbers), None)
    if missing is not None:
        raise KeyError(pattern.replace(r"(\d+)", str(missing)).replace("\\", "") + "*")
    return len(numbers)
