"""The U-Net of Stable Diffusion, of SDXL's size or smaller, its parameters named as Stability's checkpoint keys.

Sources: Rombach et al. 2022 (latent diffusion), Podell et al. 2023 (SDXL). The names are those that follow
`model.diffusion_model.` in a single-file checkpoint, so the state dict is the file.
Legend: B batch, C channels, H W latent rows and columns, L tokens of the image (H·W), T of the text, E width of the
time embedding, V width of the vector conditions, X width of the text context.
"""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from library.errors import InputError
from library.models import keyed_dropout
from library.models.attention import attention, check_name
from library.models.cpu_kernels import Conv2d, Linear
from library.models.fused_ops import PLAIN, is_untouched, normed_convolution, normed_feed_forward, normed_linears

NORM_GROUPS = 32
SIZE_EMBEDDING_DIM = 256  # SDXL embeds each of the six size conditions this wide: 2816 = 1280 + 6·256


@dataclass(frozen=True)
class UNetConfig:
    """Sizes of a U-Net; the defaults are SDXL's base model.

    Attributes:
        model_channels: channels of the first level; level i has model_channels · channel_mult[i].
        num_res_blocks: residual blocks a level on the way down (one more on the way up).
        transformer_depth: transformer layers after each residual block, per level; 0 for none.
        transformer_depth_middle: the same in the middle block, at least 1.
        context_dim: width of the text encoders' states.
        adm_in_channels: width of the vector conditions (pooled text and sizes); None for SD 1.x and 2.x, without.
        num_head_channels: head size of the attention layers.
        num_heads: if not None, heads of every attention layer, whatever their size (SD 1.x has 8).
        use_linear_in_transformer: project to and from tokens by Linear (SD 2.x, SDXL) or by 1×1 convolution (SD 1.x).
        upcast_attention: diffusers is to compute scores in fp32 (SD 2.1); every backend here does so for all models.
    """

    in_channels: int = 4
    out_channels: int = 4
    model_channels: int = 320
    channel_mult: tuple[int, ...] = (1, 2, 4)
    num_res_blocks: int = 2
    transformer_depth: tuple[int, ...] = (0, 2, 10)
    transformer_depth_middle: int = 10
    context_dim: int = 2048
    adm_in_channels: int | None = 2816
    num_head_channels: int = 64
    num_heads: int | None = None
    use_linear_in_transformer: bool = True
    upcast_attention: bool = False

    def __post_init__(self) -> None:
        """Refuse sizes that cannot be built.

        Raises:
            InputError: it says which sizes do not fit together.
        """
        if len(self.transformer_depth) != len(self.channel_mult):
            raise InputError(
                f"U-Net configuration: transformer_depth {self.transformer_depth} and channel_mult "
                f"{self.channel_mult} must have one entry a level"
            )
        if self.transformer_depth_middle < 1:
            raise InputError("U-Net configuration: transformer_depth_middle must be at least 1")
        depths = [*self.transformer_depth, self.transformer_depth_middle]
        for channels, depth in zip([*self.level_channels, self.level_channels[-1]], depths, strict=True):
            if channels % NORM_GROUPS:
                raise InputError(f"U-Net configuration: {channels} channels are not a multiple of {NORM_GROUPS}")
            if depth and channels % (self.num_heads or self.num_head_channels):
                heads = f"{self.num_heads} heads" if self.num_heads else f"heads of {self.num_head_channels}"
                raise InputError(f"U-Net configuration: {channels} channels cannot be split into {heads}")

    @property
    def level_channels(self) -> tuple[int, ...]:
        """Channels of each level, finest first."""
        return tuple(self.model_channels * factor for factor in self.channel_mult)

    def heads(self, channels: int) -> int:
        """Attention heads of a layer of that width."""
        return self.num_heads or channels // self.num_head_channels

    @property
    def largest_head_size(self) -> int:
        """Channels of one attention head, in the widest layer."""
        widest = self.level_channels[-1]
        return widest // self.heads(widest)


def sinusoidal_embedding(values_B: Tensor, dim: int) -> Tensor:
    """(B, dim): cosines, then sines, of the values at dim/2 frequencies from 1 down to near 1/10000, in fp32.

    Ho et al. 2020 (DDPM), in the order that Stable Diffusion was trained with.
    """
    half = dim // 2
    places = torch.arange(half, dtype=torch.float32, device=values_B.device)
    angles_BF = values_B.float()[:, None] * torch.exp(-math.log(10000) * places / half)
    return torch.cat([angles_BF.cos(), angles_BF.sin()], dim=-1)


def size_embedding(size_ids_B6: Tensor, dim: int = SIZE_EMBEDDING_DIM) -> Tensor:
    """SDXL's size conditions (original h, w; crop top, left; target h, w; in px) embedded: (B, 6·dim), fp32."""
    return sinusoidal_embedding(size_ids_B6.flatten(), dim).reshape(len(size_ids_B6), -1)


class Block(nn.Module):
    """What is checkpointed and compiled for itself; `compute` says what it does.

    Attributes:
        checkpointing: keep its inputs alone, and compute the rest again for backward.
        compiled: what to call in place of `compute` (library.models.compiled).
    """

    checkpointing = False
    compiled: Callable[["Block", Tensor, Tensor], Tensor] | None = None

    def forward(self, x: Tensor, condition: Tensor) -> Tensor:
        return self.compute(x, condition) if self.compiled is None else self.compiled(self, x, condition)

    def compute(self, x: Tensor, condition: Tensor) -> Tensor:
        """The block's output, of the layout of its input."""
        raise NotImplementedError


class ResBlock(Block):
    """Two convolutions with the time embedding added between them, around a skip connection."""

    def __init__(self, in_channels: int, out_channels: int, emb_dim: int) -> None:
        super().__init__()
        self.in_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, in_channels), nn.SiLU(), nn.Conv2d(in_channels, out_channels, 3, padding=1)
        )
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_dim, out_channels))
        self.out_layers = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, out_channels),
            nn.SiLU(),
            nn.Identity(),  # dropout in Stability's code; it keeps the convolution's number
            _zeroed(nn.Conv2d(out_channels, out_channels, 3, padding=1)),
        )
        same = in_channels == out_channels
        self.skip_connection = nn.Identity() if same else Conv2d(in_channels, out_channels, 1)

    def compute(self, x_BCHW: Tensor, emb_BE: Tensor) -> Tensor:
        inner: Any = self.in_layers
        outer: Any = self.out_layers
        h_BCHW = normed_convolution(x_BCHW, inner[0], inner[2]) + self.emb_layers(emb_BE)[:, :, None, None]
        return self.skip_connection(x_BCHW) + normed_convolution(h_BCHW, outer[0], outer[3])


class Attention(nn.Module):
    """Multi-head attention from image tokens, after their norm, to themselves or to the text."""

    def __init__(self, channels: int, context_dim: int | None, heads: int) -> None:
        """`context_dim`: width of the text's states; None for attention of the image tokens to themselves."""
        super().__init__()
        self.heads, self.to_text = heads, context_dim is not None
        self.backend = "sdpa"
        self.to_q = Linear(channels, channels, bias=False)
        self.to_k = Linear(context_dim or channels, channels, bias=False)
        self.to_v = Linear(context_dim or channels, channels, bias=False)
        self.to_out = nn.Sequential(Linear(channels, channels))

    def forward(self, x_BLC: Tensor, norm: nn.LayerNorm, context_BTX: Tensor) -> Tensor:
        if self.to_text:
            (q_BLC,) = normed_linears(x_BLC, norm, self.to_q)
            k_BTC, v_BTC = self.to_k(context_BTX), self.to_v(context_BTX)
        else:
            q_BLC, k_BTC, v_BTC = normed_linears(x_BLC, norm, self.to_q, self.to_k, self.to_v)
        q_BLND, k_BTND, v_BTND = (one.unflatten(-1, (self.heads, -1)) for one in (q_BLC, k_BTC, v_BTC))
        return self.to_out(attention(q_BLND, k_BTND, v_BTND, self.backend).flatten(-2))


class GEGLU(nn.Module):
    """The matrix of a linear layer gated by the GELU of another; the feed-forward computes with it."""

    def __init__(self, channels: int, inner: int) -> None:
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)


class FeedForward(nn.Module):
    """After a norm, GEGLU to four times the width, and back."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.net = nn.Sequential(GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels))

    def forward(self, x_BLC: Tensor, norm: nn.LayerNorm) -> Tensor:
        net: Any = self.net
        return normed_feed_forward(x_BLC, norm, net[0].proj, net[2])


class TransformerBlock(Block):
    """Self-attention, attention to the text, feed-forward; each after its norm and added to its input."""

    def __init__(self, channels: int, context_dim: int, heads: int) -> None:
        super().__init__()
        self.attn1 = Attention(channels, None, heads)
        self.attn2 = Attention(channels, context_dim, heads)
        self.ff = FeedForward(channels)
        self.norm1 = nn.LayerNorm(channels)
        self.norm2 = nn.LayerNorm(channels)
        self.norm3 = nn.LayerNorm(channels)

    def compute(self, x_BLC: Tensor, context_BTX: Tensor) -> Tensor:
        x_BLC = x_BLC + self.attn1(x_BLC, self.norm1, context_BTX)
        x_BLC = x_BLC + self.attn2(x_BLC, self.norm2, context_BTX)
        return x_BLC + self.ff(x_BLC, self.norm3)


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels of a feature map, added to it."""

    def __init__(self, channels: int, depth: int, config: UNetConfig) -> None:
        super().__init__()
        self.linear = config.use_linear_in_transformer
        self.norm = nn.GroupNorm(NORM_GROUPS, channels, eps=1e-6)
        self.proj_in = Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            TransformerBlock(channels, config.context_dim, config.heads(channels)) for _ in range(depth)
        )
        self.proj_out = _zeroed(Linear(channels, channels) if self.linear else nn.Conv2d(channels, channels, 1))

    def forward(self, x_BCHW: Tensor, context_BTX: Tensor) -> Tensor:
        h_BCHW = self.norm(x_BCHW)
        h_BLC = self.proj_in(_tokens(h_BCHW)) if self.linear else _tokens(self.proj_in(h_BCHW))
        for block in self.transformer_blocks:
            h_BLC = _run(block, h_BLC, context_BTX)
        size = x_BCHW.shape[-2:]
        out = _pixels(self.proj_out(h_BLC), size) if self.linear else self.proj_out(_pixels(h_BLC, size))
        return x_BCHW + out


class Downsample(nn.Module):
    """Half the rows and columns, rounded up, by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.op = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        return self.op(x_BCHW)


class Upsample(nn.Module):
    """To the size of the skip connection that comes next (twice as large, or one less), then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x_BCHW: Tensor, size_hw: torch.Size) -> Tensor:
        return self.conv(F.interpolate(x_BCHW, size=tuple(size_hw), mode="nearest"))


class Stage(nn.Sequential):
    """The layers that share one number in Stability's keys; each is given what its kind needs."""

    def forward(self, x_BCHW: Tensor, emb_BE: Tensor, context_BTX: Tensor, next_hw: torch.Size) -> Tensor:  # type: ignore[override]
        """next_hw: rows and columns that an Upsample in here must reach."""
        for layer in self:
            if isinstance(layer, ResBlock):
                x_BCHW = _run(layer, x_BCHW, emb_BE)
            elif isinstance(layer, SpatialTransformer):
                x_BCHW = layer(x_BCHW, context_BTX)
            elif isinstance(layer, Upsample):
                x_BCHW = layer(x_BCHW, next_hw)
            else:
                x_BCHW = layer(x_BCHW)
        return x_BCHW


class UNet(nn.Module):
    """Predicts noise (or velocity) from noised latents, their timesteps, the text's states and vector conditions.

    Layers that end a residual branch start at zero, as in Stability's code, so a new model starts near the identity.
    """

    def __init__(self, config: UNetConfig | None = None) -> None:
        super().__init__()
        self.config = config = config or UNetConfig()
        channels, depths = config.level_channels, config.transformer_depth
        emb_dim = 4 * config.model_channels
        levels = range(len(channels))

        def blocks(in_channels: int, out_channels: int, depth: int) -> list[nn.Module]:
            layers: list[nn.Module] = [ResBlock(in_channels, out_channels, emb_dim)]
            return [*layers, SpatialTransformer(out_channels, depth, config)] if depth else layers

        self.time_embed = _embedder(config.model_channels, emb_dim)
        if config.adm_in_channels is not None:
            self.label_emb = nn.Sequential(_embedder(config.adm_in_channels, emb_dim))

        self.input_blocks = nn.ModuleList([Stage(nn.Conv2d(config.in_channels, channels[0], 3, padding=1))])
        skips = [channels[0]]
        for level in levels:
            for _ in range(config.num_res_blocks):
                self.input_blocks.append(Stage(*blocks(skips[-1], channels[level], depths[level])))
                skips.append(channels[level])
            if level != levels[-1]:
                self.input_blocks.append(Stage(Downsample(channels[level])))
                skips.append(channels[level])

        width = channels[-1]
        self.middle_block = Stage(
            *blocks(width, width, config.transformer_depth_middle), ResBlock(width, width, emb_dim)
        )

        self.output_blocks = nn.ModuleList()
        for level in reversed(levels):
            for index in range(config.num_res_blocks + 1):
                layers = blocks(width + skips.pop(), channels[level], depths[level])
                if level and index == config.num_res_blocks:
                    layers.append(Upsample(channels[level]))
                self.output_blocks.append(Stage(*layers))
                width = channels[level]

        self.out = nn.Sequential(
            nn.GroupNorm(NORM_GROUPS, width), nn.SiLU(), _zeroed(nn.Conv2d(width, config.out_channels, 3, padding=1))
        )

    def set_attention_backend(self, name: str) -> None:
        """Compute attention on that backend of library.models.attention. Raises ValueError for an unknown name."""
        check_name(name)
        for module in self.modules():
            if isinstance(module, Attention):
                module.backend = name

    def blocks(self) -> list[Block]:
        """Residual blocks and transformer layers, in the order in which they compute."""
        return [module for module in self.modules() if isinstance(module, Block)]

    def enable_gradient_checkpointing(self, enabled: bool = True) -> None:
        """Keep only the inputs of all `blocks`, and compute the rest again for backward."""
        self.checkpoint_blocks(range(len(self.blocks())) if enabled else ())

    def checkpoint_blocks(self, chosen: Collection[int]) -> None:
        """The same for those of the `blocks` that have these numbers alone."""
        for number, block in enumerate(self.blocks()):
            block.checkpointing = number in chosen

    def forward(
        self,
        x_BCHW: Tensor,
        t_B: Tensor,
        context_BTX: Tensor,
        vector_BV: Tensor | None = None,
        skip_residuals: Sequence[Tensor] = (),
        middle_residual: Tensor | None = None,
    ) -> Tensor:
        """The prediction, of the latents' shape.

        Args:
            x_BCHW: noised latents, any number of rows and columns.
            t_B: timesteps, 0 to 999.
            context_BTX: states of the text encoders.
            vector_BV: pooled text and embedded sizes; None exactly if adm_in_channels is None.
            skip_residuals, middle_residual: a ControlNet's, as in `decode`.
        """
        emb_BE = self.embed(t_B, vector_BV, x_BCHW.dtype)
        h_BCHW, skips = self.encode(x_BCHW, emb_BE, context_BTX)
        return self.decode(h_BCHW, skips, emb_BE, context_BTX, skip_residuals, middle_residual)

    def embed(self, t_B: Tensor, vector_BV: Tensor | None, dtype: torch.dtype) -> Tensor:
        """(B, E): timesteps and vector conditions, as the residual blocks take them.

        Args:
            dtype: that of the latents. Without autocast it is that of all weights; under autocast the layers cast.

        Raises:
            ValueError: vector conditions are missing, or the network takes none.
        """
        if (vector_BV is None) != (self.config.adm_in_channels is None):
            raise ValueError(f"vector conditions: adm_in_channels is {self.config.adm_in_channels}")
        emb_BE = self.time_embed(sinusoidal_embedding(t_B, self.config.model_channels).to(dtype))
        return emb_BE if vector_BV is None else emb_BE + self.label_emb(vector_BV.to(dtype))

    def encode(self, x_BCHW: Tensor, emb_BE: Tensor, context_BTX: Tensor) -> tuple[Tensor, list[Tensor]]:
        """The middle block's output, and the outputs of all input blocks, the first one's first."""
        h_BCHW = x_BCHW
        skips: list[Tensor] = []
        for stage in self.input_blocks:
            h_BCHW = stage(h_BCHW, emb_BE, context_BTX, h_BCHW.shape[-2:])
            skips.append(h_BCHW)
        return self.middle_block(h_BCHW, emb_BE, context_BTX, h_BCHW.shape[-2:]), skips

    def decode(
        self,
        h_BCHW: Tensor,
        skips: list[Tensor],
        emb_BE: Tensor,
        context_BTX: Tensor,
        skip_residuals: Sequence[Tensor] = (),
        middle_residual: Tensor | None = None,
    ) -> Tensor:
        """The prediction, from what `encode` returned.

        Args:
            skips: it is emptied, so that what is not kept for backward goes as soon as it has been used.
            skip_residuals: added to the skips, in their order; none, or one for each (Zhang et al. 2023, ControlNet).
            middle_residual: added to the middle block's output.

        Raises:
            ValueError: there are residuals for some skips only.
        """
        if skip_residuals and len(skip_residuals) != len(skips):
            raise ValueError(f"{len(skip_residuals)} residuals for {len(skips)} skip connections")
        residuals = list(skip_residuals)
        if middle_residual is not None:
            h_BCHW = h_BCHW + middle_residual
        for stage in self.output_blocks:
            skip_BCHW = skips.pop() + residuals.pop() if residuals else skips.pop()
            h_BCHW = torch.cat([h_BCHW, skip_BCHW], dim=1)
            del skip_BCHW
            h_BCHW = stage(h_BCHW, emb_BE, context_BTX, skips[-1].shape[-2:] if skips else h_BCHW.shape[-2:])
        return self.out(h_BCHW)


def _embedder(in_dim: int, out_dim: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(in_dim, out_dim), nn.SiLU(), nn.Linear(out_dim, out_dim))


def _zeroed(layer: nn.Module) -> nn.Module:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def _run(block: Any, *inputs: Tensor) -> Tensor:
    """The block's output, its inner activations dropped and computed again in backward if it says so.

    Nothing in this module draws random numbers. What others put into a block may (dropout): torch's generators are then
    set back for the second computation, and only then, for that takes time. Keyed dropout needs no generator.
    """
    if not (block.checkpointing and torch.is_grad_enabled()):
        return block(*inputs)
    others = not _is_as_made(block)
    return checkpoint(
        block, *inputs, use_reentrant=False, preserve_rng_state=others, context_fn=keyed_dropout.checkpoint_contexts
    )


def _is_as_made(block: Block) -> bool:
    """Whether every module in the block is of a class that is made here, and runs that class's `forward`."""
    return all(type(module) in _CLASSES and is_untouched(module) for module in block.modules() if module is not block)


_CLASSES = (*PLAIN, nn.SiLU, nn.Identity, nn.Sequential, Attention, FeedForward, GEGLU)


def _tokens(x_BCHW: Tensor) -> Tensor:
    return x_BCHW.permute(0, 2, 3, 1).flatten(1, 2)


def _pixels(x_BLC: Tensor, size_hw: torch.Size) -> Tensor:
    return x_BLC.unflatten(1, tuple(size_hw)).permute(0, 3, 1, 2)
