"""Pictures sampled with the model as it is, by the samplers users know; never touches the state of training.

Legend: B batch, C channels, H W latent rows and columns, T text tokens, V vector conditions.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from library.atomic_write import write_file
from library.diffusion.samplers import make_sampler
from library.diffusion.schedule import NoiseSchedule, Prediction
from library.errors import InputError
from library.generation.prompts import SamplePrompt
from library.keyed_random import Stream, generator
from library.training.state.names import sample_name


@dataclass(frozen=True)
class Previewer:
    """Samples a list of prompts to PNG files in OUTPUT_DIR/sample."""

    prompts: Sequence[SamplePrompt]
    output_dir: Path
    output_name: str | None
    default_sampler: str
    schedule: NoiseSchedule
    prediction: Prediction
    seed: int

    def check(self) -> None:
        """Raise InputError now, not after hours, if a sampler cannot work with this schedule."""
        for prompt in self.prompts:
            name = prompt.sample_sampler or self.default_sampler
            try:
                make_sampler(name, self.schedule, self.prediction).set_timesteps(prompt.sample_steps)
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"sampler {name} cannot take {prompt.sample_steps} steps for {prompt.prompt!r}: {error}"
                ) from error

    @torch.no_grad()
    def run(
        self,
        denoise: Callable[[SamplePrompt], "GuidedDenoiser"],
        decode: Callable[[Tensor], Tensor],
        latent_shape: Callable[[int, int], tuple[int, int, int]],
        position: str,
        step: int,
        device: torch.device,
    ) -> list[Path]:
        """Sample every prompt and write its picture.

        Args:
            denoise: makes the guided denoiser of a prompt.
            decode: scaled latents (B, C, H, W) to uint8 images (B, height, width, 3).
            latent_shape: height and width in px to (C, H, W).
            position: 'e000020' or '000500', for the file names.
        """
        from PIL import Image

        folder = self.output_dir / "sample"
        now = time.strftime("%Y%m%d%H%M%S")
        paths = []
        for index, prompt in enumerate(self.prompts):
            shape_CHW = latent_shape(prompt.height, prompt.width)
            latents_BCHW = self._sample(prompt, shape_CHW, denoise(prompt), self._random(prompt, index, step), device)
            image_HWC = decode(latents_BCHW)[0].cpu().numpy()
            path = folder / sample_name(self.output_name, now, position, index, prompt.seed)
            write_file(path, partial(Image.fromarray(image_HWC).save, format="PNG"))
            paths.append(path)
        return paths

    def _random(self, prompt: SamplePrompt, index: int, step: int) -> np.random.Generator:
        """Keyed by the prompt's seed, or without one by the run's seed, the step and the prompt's place."""
        if prompt.seed is not None:
            return generator(prompt.seed, Stream.PREVIEW)
        return generator(self.seed, Stream.PREVIEW, step, index)

    def _sample(
        self,
        prompt: SamplePrompt,
        shape_CHW: tuple[int, int, int],
        denoise: "GuidedDenoiser",
        random: np.random.Generator,
        device: torch.device,
    ) -> Tensor:
        """The latents (1, C, H, W) of one prompt. Noise comes from the CPU: a seed means the same everywhere."""
        torch_generator = torch.Generator().manual_seed(int(random.integers(2**63)))
        sampler = make_sampler(prompt.sample_sampler or self.default_sampler, self.schedule, self.prediction)
        sampler.set_timesteps(prompt.sample_steps, device=device)
        noise_CHW = random.standard_normal(shape_CHW, dtype=np.float32)
        latents_BCHW = torch.from_numpy(noise_CHW)[None].to(device) * sampler.init_noise_sigma
        extra = {"generator": torch_generator} if "generator" in signature(sampler.step).parameters else {}
        for t in sampler.timesteps:
            predicted_BCHW = denoise(sampler.scale_model_input(latents_BCHW, t), t)
            latents_BCHW = sampler.step(predicted_BCHW, t, latents_BCHW, **extra).prev_sample
        return latents_BCHW


@dataclass(frozen=True)
class GuidedDenoiser:
    """Classifier-free guidance (Ho & Salimans, 2207.12598, equation 6) around a U-Net with its conditions fixed.

    Row 0 of the conditions is the prompt, row 1 the negative prompt; at scale 1 only row 0 is computed.
    """

    unet: Callable[[Tensor, Tensor, Tensor, Tensor | None], Tensor]
    context_2TC: Tensor
    vector_2V: Tensor | None  # None: the U-Net has no vector conditions
    scale: float

    def __call__(self, latents_BCHW: Tensor, t: Tensor) -> Tensor:
        """The guided prediction for one picture, (1, C, H, W) float32."""
        rows = 1 if self.scale == 1 else 2
        predicted = self.unet(
            latents_BCHW.repeat(rows, 1, 1, 1),
            t.reshape(1).expand(rows).to(latents_BCHW.device),
            self.context_2TC[:rows],
            None if self.vector_2V is None else self.vector_2V[:rows],
        ).float()
        if rows == 1:
            return predicted
        positive, negative = predicted.chunk(2)
        return negative + self.scale * (positive - negative)
