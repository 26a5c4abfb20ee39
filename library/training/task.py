"""What the loop does with a batch: model, recipe and objective together make its loss, checkpoints and pictures.

Legend: B batch, C channels, H W latent rows and columns.
"""

import logging
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.diffusion.random_draws import normal
from library.finite import is_finite
from library.keyed_random import Stream
from library.models.keyed_dropout import draws
from library.models.text import TextStates, Tokens
from library.models.vae import latent_shape
from library.training.encoders import Encoders
from library.training.objective import Objective, Predict
from library.training.preview import Previewer
from library.training.recipes.recipe import Recipe

logger = logging.getLogger(__name__)


class Task:
    """One training task, of any family and recipe."""

    def __init__(self, recipe: Recipe, objective: Objective, encoders: Encoders, previewer: Previewer | None) -> None:
        """
        Args:
            previewer: None where no sample pictures are asked for.
        """
        self._recipe, self._objective, self._encoders, self._previewer = recipe, objective, encoders, previewer
        self._device, self._seed = objective.device, objective.seed

    def loss(self, module: nn.Module, batch: MicroBatch) -> Tensor:
        """The mean loss over the micro-batch, a scalar with gradients to `module`."""
        places = batch.places_B.tolist()
        latents_BCHW = self._latents(batch, self._seed, Stream.VAE, batch.step, places)
        with draws(self._seed, batch.step, places):
            return self._objective.losses(self._predict(module, batch), latents_BCHW, batch).mean()

    def validation_losses(self, module: nn.Module, batch: MicroBatch, seed: int, numbers: range) -> Tensor:
        """Losses of the first samples of a batch, (len(numbers),), their noise keyed by their numbers among all.

        A batch may hold more samples than there are numbers: those beyond are not looked at.
        """
        keys = [*numbers, *[0] * (len(batch) - len(numbers))]
        latents_BCHW = self._latents(batch, seed, Stream.VALIDATION_VAE, 0, keys)
        losses_B = self._objective.validation_losses(self._predict(module, batch), latents_BCHW, batch, seed, keys)
        return losses_B[: len(numbers)]

    def samples_not_finite(self, batch: MicroBatch) -> list[str]:
        """Names of a batch's samples whose latents are not finite: the VAE overflows on them, or their cache is broken.

        Called where a loss is not finite: looking at all latents would have the host wait for the device.
        """
        places = batch.places_B.tolist()
        latents_BCHW = self._latents(batch, self._seed, Stream.VAE, batch.step, places)
        return [name for name, one in zip(batch.names, latents_BCHW, strict=False) if not is_finite(one)]

    def save(self, stem: str, module: nn.Module) -> Path:
        """Write a checkpoint, complete or not at all; returns its path. Called on the main process."""
        return self._recipe.save(stem, module)

    @torch.no_grad()
    def preview(self, position: str, step: int, module: nn.Module, since: float = 0.0) -> None:
        """Sample the preview prompts with the weights as they are. Called on the main process.

        Args:
            since: pictures that have been there since this time of the clock are not drawn again.
        """
        if self._previewer is not None:
            logger.info("drawing %d sample pictures after step %d", len(self._previewer.prompts), step)
            self._previewer.run(module, self._encoders, self._device, position, step, since)

    def _predict(self, module: Any, batch: MicroBatch) -> Predict:
        """The recipe's prediction under the batch's conditions."""
        text = self._text(batch)
        return lambda noisy_BCHW, t_B: self._recipe.predict(module, noisy_BCHW, t_B, text, batch)

    def _text(self, batch: MicroBatch) -> Tokens | TextStates:
        """The batch's tokens, or its cached text states, on the device."""
        if batch.text is not None:
            context_BTC, pooled_BP = batch.text
            return TextStates(
                devices.upload(context_BTC, self._device),
                None if pooled_BP is None else devices.upload(pooled_BP, self._device),
            )
        if batch.tokens is None:
            raise ValueError("a micro-batch without tokens and without cached text states")
        ids, weights = (tuple(devices.upload(tensor, self._device) for tensor in part) for part in batch.tokens)
        return Tokens(ids, weights)

    def _latents(self, batch: MicroBatch, seed: int, stream: Stream, step: int, keys: list[int]) -> Tensor:
        """The images' latents (B, C, H, W), drawn from the VAE's posterior by keyed noise."""
        height_px, width_px = (int(side) for side in batch.size_ids_B6[0, 4:])  # the bucket's
        noise_BCHW = normal(seed, stream, step, keys, latent_shape(self._encoders.vae, height_px, width_px))
        if batch.moments is not None:
            mean_BCHW, std_BCHW = batch.moments
            return self._encoders.cached_latents(mean_BCHW, std_BCHW, noise_BCHW)
        if batch.images_BHWC is None:
            raise ValueError("a micro-batch without images and without cached latents")
        return self._encoders.latents(batch.images_BHWC, noise_BCHW)
