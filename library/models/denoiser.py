"""A U-Net together with the text encoders that condition it, as the one module that trains.

One module, so that a wrapper (DistributedDataParallel and its kin) sees every gradient of a step.
Legend: B batch, C channels, H W latent rows and columns, V vector conditions.
"""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.models.model import UNET, Model
from library.models.text import TextStates, Tokens
from library.models.text_encoders import (
    enable_gradient_checkpointing,
    encode,
    set_trainable,
    trainable_parameters,
    trained_layers,
)


def frozen_copy(network: Any, dtype: torch.dtype) -> Any:
    """The network in `dtype`, to compute with: a copy where it has another, so that checkpoints keep its weights."""
    frozen = network.requires_grad_(False).eval()
    same = all(parameter.dtype == dtype for parameter in frozen.parameters())
    return frozen if same else nn.Module.to(copy.deepcopy(frozen), dtype)


class Denoiser(nn.Module):
    """U-Net and text encoders; what does not train is frozen and stays out of the gradients.

    Attributes:
        text_encoders: empty once they have been taken out (`without_text_encoders`).
        trained_encoders: the parameters that train, of each text encoder; empty lists for those that do not train.
        originals: weights that `cast_trained` has rounded although they do not train, as `Model.originals`.
    """

    def __init__(
        self,
        model: Model,
        train_text_encoders: Sequence[bool] = (),
        gradient_checkpointing: bool = False,
        clip_skip: int | None = None,
    ) -> None:
        """
        Args:
            train_text_encoders: of each text encoder, whether it trains; () where none does.
            clip_skip: as --clip_skip has it.

        Raises:
            InputError: a text encoder has no layer that --clip_skip names.
        """
        super().__init__()
        self.unet = model.unet
        self.text_encoders = nn.ModuleList(model.text_encoders)
        self.family, self.uses = model.family, model.uses(clip_skip)
        self.unet.requires_grad_(True)
        trains = train_text_encoders or [False] * len(self.text_encoders)
        for encoder, use, train in zip(self.text_encoders, self.uses, trains, strict=True):
            set_trainable(encoder, use, train)
        self.trained_encoders = [trainable_parameters(encoder) for encoder in self.text_encoders]
        self.originals: dict[str, dict[str, Tensor]] = {}
        self.train()
        if gradient_checkpointing:
            self.unet.enable_gradient_checkpointing()
            for encoder, trained in zip(self.text_encoders, self.trained_encoders, strict=True):
                if trained:
                    enable_gradient_checkpointing(encoder)

    def cast_frozen(self, dtype: torch.dtype) -> None:
        """Compute with copies in `dtype` of the encoders that do not train; what trains keeps its weights."""
        for place, trained in enumerate(self.trained_encoders):
            if not trained:
                self.text_encoders[place] = frozen_copy(self.text_encoders[place], dtype)

    def cast_trained(self, dtype: torch.dtype) -> None:
        """Have the weights of the U-Net and of each encoder that trains in `dtype`, and their gradients with them.

        Frozen layers beside those that train compute in `dtype`, too; checkpoints have their weights as they were.
        """
        folders = [spec.folder for spec in self.family.encoders]
        encoders = zip(folders, self.text_encoders, self.trained_encoders, strict=True)
        cast = {UNET: self.unet, **{folder: encoder for folder, encoder, trained in encoders if trained}}
        for part, network in cast.items():
            self.originals[part] = {
                name: parameter.detach().to("cpu", copy=True)
                for name, parameter in network.named_parameters()
                if not parameter.requires_grad and parameter.dtype != dtype
            }
            network.to(dtype)

    def sharding_units(self) -> list[nn.Module]:
        """The parts that fully sharded training gathers one by one: each is called for itself."""
        unet = self.unet
        layers = [
            layer
            for encoder, trained in zip(self.text_encoders, self.trained_encoders, strict=False)
            if trained
            for layer in trained_layers(encoder)
        ]
        return [*unet.input_blocks, unet.middle_block, *unet.output_blocks, *layers]

    def without_text_encoders(self) -> tuple[Any, ...]:
        """Take the text encoders out, since their states are given to `forward`; returns them."""
        encoders = tuple(self.text_encoders)
        self.text_encoders = nn.ModuleList()
        return encoders

    def conditions(self, text: Tokens | TextStates, size_ids_B6: Tensor) -> tuple[Tensor, Tensor | None]:
        """Text states (B, T, C), and vector conditions (B, V) for families that have some.

        Args:
            text: tokens, or what the text encoders made of them.
            size_ids_B6: original height and width, crop top and left, target height and width, in px.
        """
        states = encode(self.text_encoders, text, self.uses) if isinstance(text, Tokens) else text
        if self.family.vector is None:
            return states.context_BTC, None
        if states.pooled_BP is None:
            raise ValueError("vector conditions need pooled text")
        return states.context_BTC, self.family.vector(states.pooled_BP, size_ids_B6)

    def forward(self, noisy_BCHW: Tensor, t_B: Tensor, text: Tokens | TextStates, size_ids_B6: Tensor) -> Tensor:
        """The prediction for noised latents, (B, C, H, W); `text` and `size_ids_B6` as in `conditions`."""
        context_BTC, vector_BV = self.conditions(text, size_ids_B6)
        return self.unet(noisy_BCHW, t_B, context_BTC, vector_BV)
