"""Pictures sampled with the model as it is, by the samplers users know; never touches the state of training.

Legend: B batch, C channels, H W latent rows and columns, T text tokens, V vector conditions.
"""

import glob
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.atomic_write import write_file
from library.diffusion.samplers import make_sampler
from library.diffusion.schedule import NoiseSchedule, Prediction
from library.errors import InputError
from library.finite import is_finite
from library.generation.guidance import GuidedDenoiser
from library.generation.pipeline import sample_latents
from library.keyed_random import Stream, generator
from library.models.text import Tokens
from library.models.vae import latent_shape
from library.options.prompts import SamplePrompt
from library.training.encoders import Encoders
from library.training.state.names import SAMPLE_FOLDER, sample_name

logger = logging.getLogger(__name__)

_TIME = "%Y%m%d%H%M%S"  # in the names of pictures


@dataclass(frozen=True)
class Previewer:
    """Samples a list of prompts to PNG files in OUTPUT_DIR/sample.

    Attributes:
        schedule: on the CPU.
        seed: the run's, for prompts without a seed of their own.
        autocast: the precision that the U-Net computes in; sampler and VAE keep their own.
        tokenize: prompts, to tokens of all that they say.
        between: called before each step of a sampler; may raise, to end the work.
    """

    prompts: Sequence[SamplePrompt]
    output_dir: Path
    output_name: str | None
    default_sampler: str
    schedule: NoiseSchedule
    prediction: Prediction
    seed: int
    autocast: Callable[[], AbstractContextManager]
    tokenize: Callable[[Sequence[str]], Tokens]
    between: Callable[[], None]

    def check(self) -> None:
        """Raise InputError now, not after hours, if a sampler cannot work with this schedule."""
        for prompt in self.prompts:
            try:
                self._sampler(prompt).set_timesteps(prompt.sample_steps)
            except ValueError as error:
                if isinstance(error, InputError):
                    raise
                raise InputError(
                    f"sampler {prompt.sample_sampler or self.default_sampler} cannot take {prompt.sample_steps} steps "
                    f"for {prompt.prompt!r}: {error}"
                ) from error

    @torch.no_grad()
    def run(
        self, module: Any, encoders: Encoders, device: torch.device, position: str, step: int, since: float = 0.0
    ) -> list[Path]:
        """Sample every prompt and write its picture.

        Args:
            module: the denoiser with the weights to sample with.
            position: 'e000020' or '000500', for the file names.
            step: steps done.
            since: a run that goes on gives the time of its state: pictures of this position that are younger are left
                out. 0: all are drawn.
        """
        from PIL import Image

        folder = self.output_dir / SAMPLE_FOLDER
        now = time.strftime(_TIME)
        paths = []
        for index, prompt in enumerate(self.prompts):
            if since and self._is_there(position, index, prompt, since):
                continue
            sampler = self._sampler(prompt)
            sampler.set_timesteps(prompt.sample_steps, device=device)
            shape_CHW = latent_shape(encoders.vae, prompt.height, prompt.width)
            denoise = self._denoiser(module, encoders, device, prompt)
            latents_BCHW = sample_latents(denoise, sampler, shape_CHW, self._random(prompt, index, step), device)
            if not is_finite(latents_BCHW):
                logger.warning(
                    "sample picture of %r at step %d: its latents are NaN or infinite, and it shows nothing: the U-Net "
                    "overflows, or has diverged",
                    prompt.prompt,
                    step,
                )
            image_HWC = encoders.decode(latents_BCHW)[0].cpu().numpy()
            path = folder / sample_name(self.output_name, now, position, index, prompt.seed)
            write_file(path, partial(Image.fromarray(image_HWC).save, format="PNG"))
            paths.append(path)
        return paths

    def _is_there(self, position: str, index: int, prompt: SamplePrompt, since: float) -> bool:
        """Whether a prompt's picture of this position has been drawn after a time."""
        run, any_time = glob.escape(self.output_name or ""), "?" * len(time.strftime(_TIME))
        found = (self.output_dir / SAMPLE_FOLDER).glob(sample_name(run, any_time, position, index, prompt.seed))
        return any(path.stat().st_mtime >= since for path in found)

    def _sampler(self, prompt: SamplePrompt) -> Any:
        return make_sampler(prompt.sample_sampler or self.default_sampler, self.schedule, self.prediction)

    def _random(self, prompt: SamplePrompt, index: int, step: int) -> np.random.Generator:
        """Keyed by the prompt's seed, or without one by the run's seed, the step and the prompt's place."""
        if prompt.seed is not None:
            return generator(prompt.seed, Stream.PREVIEW)
        return generator(self.seed, Stream.PREVIEW, step, index)

    def _denoiser(self, module: Any, encoders: Encoders, device: torch.device, prompt: SamplePrompt) -> GuidedDenoiser:
        """The U-Net with a prompt's conditions, in row 0, and its negative prompt's, in row 1."""
        size_hw = (prompt.height, prompt.width)
        size_ids_26 = torch.tensor([[*size_hw, 0, 0, *size_hw]] * 2, dtype=torch.float32, device=device)
        states = encoders.text_states(module, self.tokenize([prompt.prompt, prompt.negative_prompt]))
        context_2TC, vector_2V = module.conditions(states, size_ids_26)

        def predict(noisy_BCHW: Tensor, t_B: Tensor, context_BTC: Tensor, vector_BV: Tensor | None) -> Tensor:
            self.between()
            with self.autocast():
                return module.unet(noisy_BCHW, t_B, context_BTC, vector_BV)

        return GuidedDenoiser(predict, context_2TC, vector_2V, prompt.scale)
