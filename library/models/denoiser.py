"""SDXL's U-Net together with the two text encoders that condition it, as the one module that trains.

One module, so that a wrapper (DistributedDataParallel and its kin) sees every gradient of a step.
Legend: B batch, C channels, H W latent rows and columns, K chunks of a caption, T text tokens, V vector conditions.
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from library.models.model import SDXLModel
from library.models.text_encoders import (
    enable_gradient_checkpointing,
    encode_sdxl,
    set_trainable,
    trainable_parameters,
    trained_layers,
)
from library.models.unet import size_embedding


def frozen_copy(network: Any, dtype: torch.dtype) -> Any:
    """The network in `dtype`, to compute with: a copy where it has another, so that checkpoints keep its weights."""
    frozen = network.requires_grad_(False).eval()
    same = all(parameter.dtype == dtype for parameter in frozen.parameters())
    return frozen if same else nn.Module.to(copy.deepcopy(frozen), dtype)


class ConditionedUNet(nn.Module):
    """U-Net and text encoders; what does not train is frozen and stays out of the gradients."""

    def __init__(self, model: SDXLModel, train_te1: bool, train_te2: bool, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.unet, self.text_encoder1, self.text_encoder2 = model.unet, model.text_encoder1, model.text_encoder2
        self.unet.requires_grad_(True)
        set_trainable(self.text_encoder1, self.text_encoder2, train_te1, train_te2)
        self.trained_te1 = trainable_parameters(self.text_encoder1)
        self.trained_te2 = trainable_parameters(self.text_encoder2)
        self.train()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            for encoder, trained in ((self.text_encoder1, train_te1), (self.text_encoder2, train_te2)):
                if trained:
                    enable_gradient_checkpointing(encoder)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Compute with copies in `dtype` of the encoders that do not train; what trains keeps its weights."""
        if not self.trained_te1:
            self.text_encoder1 = frozen_copy(self.text_encoder1, dtype)
        if not self.trained_te2:
            self.text_encoder2 = frozen_copy(self.text_encoder2, dtype)

    def cast_trained(self, dtype: torch.dtype) -> None:
        """Have the weights of the U-Net and of each encoder that trains in `dtype`, and their gradients with them."""
        parts: list[nn.Module] = [self.unet]
        parts += [self.text_encoder1] * bool(self.trained_te1) + [self.text_encoder2] * bool(self.trained_te2)
        for part in parts:
            part.to(dtype)

    def sharding_units(self) -> list[nn.Module]:
        """The parts that fully sharded training gathers one by one: each is called for itself."""
        unet = self.unet
        trained = ((self.text_encoder1, self.trained_te1), (self.text_encoder2, self.trained_te2))
        layers = [layer for encoder, trains in trained if trains for layer in trained_layers(encoder)]
        return [*unet.input_blocks, unet.middle_block, *unet.output_blocks, *layers]

    def without_text_encoders(self) -> tuple[Any, Any]:
        """Take both encoders out, since their outputs are given to `forward`; returns them."""
        encoders = self.text_encoder1, self.text_encoder2
        del self.text_encoder1, self.text_encoder2
        return encoders

    def conditions(
        self,
        ids1_BK77: Tensor | None,
        ids2_BK77: Tensor | None,
        size_ids_B6: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Text states (B, T, C) and vector conditions (B, V): pooled text beside the six embedded sizes, in px.

        Args:
            weights: (B, K, 77) of each encoder's tokens, where captions have some.
            text: text states and pooled text, where they are known already; ids and weights are not looked at then.
        """
        if text is None:
            if ids1_BK77 is None or ids2_BK77 is None:
                raise ValueError("conditions need token ids or what the text encoders make of them")
            text = encode_sdxl(self.text_encoder1, self.text_encoder2, ids1_BK77, ids2_BK77, weights)
        return text[0], vector_conditions(text[1], size_ids_B6)

    def forward(
        self,
        noisy_BCHW: Tensor,
        t_B: Tensor,
        ids1_BK77: Tensor | None,
        ids2_BK77: Tensor | None,
        size_ids_B6: Tensor,
        weights: tuple[Tensor, Tensor] | None = None,
        text: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """The prediction for noised latents, (B, C, H, W); `weights` and `text` as in `conditions`."""
        context_BTC, vector_BV = self.conditions(ids1_BK77, ids2_BK77, size_ids_B6, weights, text)
        return self.unet(noisy_BCHW, t_B, context_BTC, vector_BV)


def vector_conditions(pooled_BP: Tensor, size_ids_B6: Tensor) -> Tensor:
    """(B, V): pooled text beside the six embedded sizes, in px."""
    return torch.cat([pooled_BP, size_embedding(size_ids_B6).to(pooled_BP.dtype)], dim=1)
