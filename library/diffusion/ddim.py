"""DDIM and PLMS: samplers that go from one of training's timesteps to another, and at last to no noise at all.

The timestep after each is the next of the list. diffusers' DDIMScheduler and PNDMScheduler subtract `1000 // steps`
instead, which is another timestep wherever `steps` does not divide 1000: with 43 of the step counts from 1 to 100 they
end above the first timestep and leave its noise in the picture. With the other counts both samplers are equal to
diffusers' with timestep_spacing "trailing" and set_alpha_to_one (PLMS to PNDMScheduler for noise prediction only, which
adds up velocities of several timesteps as if they were noise).

Legend: B batch, C channels, H W latent rows and columns.
"""

from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from library.diffusion.schedule import NoiseSchedule, Prediction

# Of the latest prediction first, by how many earlier ones there are (Liu et al., 2202.09778, equation 12).
_MULTISTEP = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


@dataclass(frozen=True)
class Step:
    """The result of a step, under the name that diffusers' schedulers have for it."""

    prev_sample: Tensor


class DDIM:
    """Denoising diffusion implicit models (Song et al., 2010.02502, equation 12 with sigma 0).

    The class has the part of the interface of diffusers' schedulers that sampling calls.
    """

    init_noise_sigma = 1.0
    order = 1

    def __init__(self, schedule: NoiseSchedule, prediction: Prediction) -> None:
        """
        Args:
            schedule: the noise schedule that the network was trained on.
        """
        self._prediction = prediction
        self._alphas_cumprod = schedule.alphas_cumprod_S.double().tolist()
        self._next: dict[int, int] = {}  # the timestep after each; none after the last
        self.timesteps = torch.zeros(0, dtype=torch.int64)

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """Space the timesteps evenly from the last one down ("trailing": Lin et al., 2305.08891, table 2).

        Raises:
            ValueError: there are not as many timesteps.
        """
        total = len(self._alphas_cumprod)
        if not 1 <= num_inference_steps <= total:
            raise ValueError(f"there are {total} timesteps")
        times = [round(total - total * step / num_inference_steps) - 1 for step in range(num_inference_steps)]
        self._next = dict(pairwise(times))
        self.timesteps = torch.tensor(self._evaluated(times), device=device)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """The latents as they are: the network takes them so."""
        return sample

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Step:
        """The latents (B, C, H, W) at the next timestep of the list, or without noise after the last."""
        t = int(timestep)
        clean_BCHW, noise_BCHW = self._prediction.clean_and_noise(*self._shares(t), sample, model_output)
        return Step(self._mixed(clean_BCHW, noise_BCHW, t))

    def _evaluated(self, times: list[int]) -> list[int]:
        """At which timesteps the network is asked, in their order."""
        return times

    def _mixed(self, clean_BCHW: Tensor, noise_BCHW: Tensor, t: int) -> Tensor:
        """The picture and the noise in the shares of the timestep after t."""
        signal, noise = self._shares(self._next[t]) if t in self._next else (1.0, 0.0)
        return signal * clean_BCHW + noise * noise_BCHW

    def _shares(self, t: int) -> tuple[float, float]:
        alpha_bar = self._alphas_cumprod[t]
        return alpha_bar**0.5, (1 - alpha_bar) ** 0.5


class PLMS(DDIM):
    """Pseudo linear multistep (Liu et al., 2202.09778, section 3.3), as CompVis' PLMSSampler starts it.

    The first step is taken twice: the second time with the mean of the noise that is predicted at both of its ends.
    """

    def set_timesteps(self, num_inference_steps: int, device: torch.device | str | None = None) -> None:
        """See DDIM."""
        super().set_timesteps(num_inference_steps, device)
        self._noises: list[Tensor] = []  # as predicted, the latest last
        self._begun = 0
        self._first: Tensor | None = None  # the latents of the first step, until it has been taken twice

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> Step:
        """See DDIM."""
        t = int(timestep)
        self._begun += 1
        noise_BCHW = self._prediction.clean_and_noise(*self._shares(t), sample, model_output)[1]
        if self._begun == 2 and self._first is not None:
            t, sample = int(self.timesteps[0]), self._first
            combined_BCHW = (self._noises[-1] + noise_BCHW) / 2
            self._first = None
        else:
            self._first = sample if self._begun == 1 else None
            self._noises = [*self._noises[-3:], noise_BCHW]
            weights = _MULTISTEP[len(self._noises) - 1]
            terms = [weight * one for weight, one in zip(weights, reversed(self._noises), strict=True)]
            combined_BCHW = torch.stack(terms).sum(dim=0)
        signal, noise = self._shares(t)
        return Step(self._mixed((sample - noise * combined_BCHW) / signal, combined_BCHW, t))

    def _evaluated(self, times: list[int]) -> list[int]:
        return [*times[:2], *times[1:]]
