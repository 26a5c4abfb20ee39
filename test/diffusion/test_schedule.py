"""The noise schedule against diffusers' DDPMScheduler and its zero-terminal-SNR rescaling."""

import pytest
import torch
from diffusers import DDPMScheduler

from library.diffusion.schedule import Epsilon, NoiseSchedule, VPrediction, prediction_type
from library.errors import InputError

SDXL = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012, "num_train_timesteps": 1000}


@pytest.fixture
def latents():
    random = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 5, 4, 3, 3, generator=random)
    return x0, noise, torch.tensor([0, 1, 500, 998, 999])


@pytest.mark.parametrize("zero_terminal_snr", [False, True])
def test_noised_latents_and_velocity_are_diffusers(latents, zero_terminal_snr):
    x0, noise, t = latents
    peer = DDPMScheduler(**SDXL, rescale_betas_zero_snr=zero_terminal_snr)
    ours = NoiseSchedule.from_config(SDXL, zero_terminal_snr)
    torch.testing.assert_close(ours.add_noise(x0, noise, t), peer.add_noise(x0, noise, t), rtol=1e-5, atol=2e-6)
    velocity = VPrediction().target(ours, x0, noise, t)
    torch.testing.assert_close(velocity, peer.get_velocity(x0, noise, t), rtol=1e-5, atol=2e-6)


def test_nothing_of_the_signal_is_left_at_a_zero_terminal_snr(latents):
    x0, noise, _ = latents
    last = torch.full((5,), 999)
    noised = NoiseSchedule.from_config(SDXL, zero_terminal_snr=True).add_noise(x0, noise, last)
    assert torch.equal(noised, noise)
    assert not torch.allclose(NoiseSchedule.from_config(SDXL).add_noise(x0, noise, last), noise, atol=1e-2)


def test_settings_that_a_scheduler_leaves_out_are_stable_diffusions():
    assert torch.equal(NoiseSchedule.from_config({}).alphas_cumprod_S, NoiseSchedule.from_config(SDXL).alphas_cumprod_S)


def test_epsilon_predicts_the_noise(latents):
    x0, noise, t = latents
    assert Epsilon().target(NoiseSchedule.from_config(SDXL), x0, noise, t) is noise


def test_unknown_settings_are_named():
    with pytest.raises(InputError, match="'sample' is not known"):
        prediction_type("sample")
    with pytest.raises(InputError, match="'squaredcos_cap_v2' is not known"):
        NoiseSchedule.from_config({"beta_schedule": "squaredcos_cap_v2"})
