"""What a prediction is trained towards, at which timesteps and under which noise, and how far it is from it.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.diffusion.masks import latent_weights
from library.diffusion.random_draws import normal, timesteps
from library.diffusion.schedule import NoiseSchedule, Prediction
from library.keyed_random import Stream

VALIDATION_TIMESTEPS = 4  # 200, 400, 600 and 800 of 1000, as in the reference

Predict = Callable[[Tensor, Tensor], Tensor]  # noisy_BCHW, t_B -> prediction of the latents' shape


@dataclass(frozen=True)
class Objective:
    """Mean squared error of a prediction (Ho et al., 2006.11239, equation 14, on latents).

    Every random number is a function of (seed, step, place in the global batch).

    Attributes:
        prediction: what the network predicts: noise, velocity.
        schedule: the noise schedule, on the device.
    """

    prediction: Prediction
    schedule: NoiseSchedule
    seed: int
    device: torch.device

    def losses(self, predict: Predict, latents_BCHW: Tensor, batch: MicroBatch) -> Tensor:
        """Each sample's loss times its weight, (B,).

        With a weight w for each of B samples: w·mean((prediction - target)²), as DreamBooth (Ruiz et al., 2208.12242,
        equation 2) weighs the prior-preservation term by λ. A mask weighs each latent pixel's error.
        """
        places = batch.places_B.tolist()
        noise_BCHW = self._noise(self.seed, Stream.NOISE, batch.step, places, latents_BCHW)
        t_B = timesteps(self.seed, batch.step, places, self.schedule.timesteps)
        losses_B = self._losses(predict, latents_BCHW, noise_BCHW, t_B, batch)
        return losses_B * devices.upload(batch.loss_weights_B, self.device)

    def validation_losses(
        self, predict: Predict, latents_BCHW: Tensor, batch: MicroBatch, seed: int, keys: Sequence[int]
    ) -> Tensor:
        """Each sample's mean loss at timesteps that divide the schedule evenly, (B,); its noise is keyed by its key."""
        times = np.linspace(0, self.schedule.timesteps, VALIDATION_TIMESTEPS + 2, dtype=int)[1:-1].tolist()
        losses = []
        for time in times:
            noise_BCHW = self._noise(seed, Stream.VALIDATION_NOISE, time, keys, latents_BCHW)
            losses.append(self._losses(predict, latents_BCHW, noise_BCHW, torch.full((len(batch),), time), batch))
        return torch.stack(losses).mean(dim=0)

    def _noise(self, seed: int, stream: Stream, step: int, keys: Sequence[int], latents_BCHW: Tensor) -> Tensor:
        channels, rows, columns = latents_BCHW.shape[1:]
        return devices.upload(normal(seed, stream, step, keys, (channels, rows, columns)), self.device)

    def _losses(
        self, predict: Predict, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor, batch: MicroBatch
    ) -> Tensor:
        """Each sample's mean squared error, (B,); timesteps come from the CPU."""
        t_B = devices.upload(t_B, self.device)
        noisy_BCHW = self.schedule.add_noise(latents_BCHW, noise_BCHW, t_B)
        predicted_BCHW = predict(noisy_BCHW, t_B)
        target_BCHW = self.prediction.target(self.schedule, latents_BCHW, noise_BCHW, t_B)
        loss_BCHW = nn.functional.mse_loss(predicted_BCHW.float(), target_BCHW, reduction="none")
        if batch.masks_BHW is not None:
            weights_B1HW = latent_weights(batch.masks_BHW, noisy_BCHW.shape[2:])
            loss_BCHW = loss_BCHW * devices.upload(weights_B1HW, self.device)
        return loss_BCHW.mean(dim=(1, 2, 3))
