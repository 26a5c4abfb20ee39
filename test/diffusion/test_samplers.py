"""Every sampler, run with the exact denoiser of a distribution that is known: all mass on one point."""

import numpy as np
import pytest
import torch

from library.diffusion.samplers import NAMES, make_sampler
from library.diffusion.schedule import Epsilon, NoiseSchedule, VPrediction
from library.errors import InputError

POINT = 0.7


def sample(name, schedule, prediction, steps=12):
    """Sample with the denoiser that is right if every latent is POINT."""
    sampler = make_sampler(name, schedule, prediction)
    sampler.set_timesteps(steps)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        noised = sampler.scale_model_input(latents, t)
        alpha_bar = np.interp(float(t), range(1000), schedule.alphas_cumprod_S.numpy())
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if isinstance(prediction, VPrediction):
            # v = (signal * x_t - x0) / noise, from x_t = signal x0 + noise eps and v = signal eps - noise x0
            predicted = (signal * noised - POINT) / noise
        else:
            predicted = (noised - signal * POINT) / noise
        latents = sampler.step(predicted, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("prediction", [Epsilon(), VPrediction()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_every_sampler_finds_the_point(name, prediction):
    latents = sample(name, NoiseSchedule.from_config({}), prediction)
    # pndm and dpmsolver stop at the first timestep's noise level, 0.03
    torch.testing.assert_close(latents, torch.full_like(latents, POINT), atol=0.07, rtol=0)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_sampling_starts_where_training_ends(name):
    sampler = make_sampler(name, NoiseSchedule.from_config({}), Epsilon())
    sampler.set_timesteps(4)
    assert float(sampler.timesteps[0]) == 999


def test_ddim_samples_at_a_zero_terminal_snr_and_others_say_that_they_cannot():
    schedule = NoiseSchedule.from_config({}, zero_terminal_snr=True)
    latents = sample("ddim", schedule, VPrediction())
    torch.testing.assert_close(latents, torch.full_like(latents, POINT), atol=1e-3, rtol=0)
    with pytest.raises(InputError, match="use ddim"):
        make_sampler("euler", schedule, VPrediction())


def test_an_unknown_sampler_is_named():
    with pytest.raises(InputError, match="'unipc' is not known"):
        make_sampler("unipc", NoiseSchedule.from_config({}), Epsilon())
