"""What the rest of a run asks of a recipe: what trains, how a prediction is made, what is saved.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

from torch import Tensor

from library.data.micro_batch import MicroBatch
from library.models.denoiser import Denoiser
from library.models.text import TextStates, Tokens
from library.training.engine.optimizers import ParameterGroup


class Recipe(Protocol):
    """What trains. A recipe is made on the CPU; `library.training.engine.placement` brings its module to the device."""

    @property
    def name(self) -> str:
        """The recipe's name, which a training state holds."""

    @property
    def module(self) -> Denoiser:
        """The one module that wrappers see; all that trains is in it."""

    def groups(self) -> Sequence[ParameterGroup]:
        """The parameters that train, with their learning rates."""

    def predict(
        self, module: Any, noisy_BCHW: Tensor, t_B: Tensor, text: Tokens | TextStates, batch: MicroBatch
    ) -> Tensor:
        """The network's prediction for noised latents, (B, C, H, W).

        Args:
            module: `self.module`, or what wraps it.
            text: the batch's, on the device.
        """

    def save(self, stem: str, module: Any) -> Path:
        """Write a checkpoint, complete or not at all; returns its path. Called on the main process.

        Args:
            module: with all weights as they are to be saved.
        """

    def saved_bytes(self) -> int:
        """About what a checkpoint takes on disk."""

    def lines(self) -> list[str]:
        """What the run says of its checkpoints before it trains."""
