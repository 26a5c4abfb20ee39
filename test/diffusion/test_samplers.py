"""Every sampler, run with the exact denoiser of a distribution that is known: all mass on one point."""

import numpy as np
import pytest
import torch

from library.diffusion.samplers import NAMES, make_sampler
from library.diffusion.schedule import Epsilon, NoiseSchedule, VPrediction
from library.errors import InputError

POINT = 0.7
PLAIN = [name for name in NAMES if not name.startswith("k_")]
# 61 and 103: the spacing of diffusers has one timestep more than were asked for. lms, dpm_2, dpm_2_a integrate slowly.
COUNTS = dict.fromkeys(PLAIN, (1, 2, 6, 7, 13, 28, 61, 100, 103))
COUNTS |= dict.fromkeys(("lms", "dpm_2", "dpm_2_a"), (1, 6, 28, 61))
COUNTS |= dict.fromkeys(("ddim", "pndm"), (*range(1, 101), 103, 999))


def sample(name, schedule, prediction, steps=12, point=POINT):
    """Sample with the denoiser that is right if every latent is `point`."""
    sampler = make_sampler(name, schedule, prediction)
    sampler.set_timesteps(steps)
    latents = torch.randn(1, 4, 2, 2, generator=torch.Generator().manual_seed(0)) * sampler.init_noise_sigma
    for t in sampler.timesteps:
        assert 0 <= float(t) <= 999
        noised = sampler.scale_model_input(latents, t)
        alpha_bar = np.interp(float(t), range(1000), schedule.alphas_cumprod_S.numpy())
        signal, noise = alpha_bar**0.5, (1 - alpha_bar) ** 0.5
        if isinstance(prediction, VPrediction):
            # v = (signal * x_t - x0) / noise, from x_t = signal x0 + noise eps and v = signal eps - noise x0
            predicted = (signal * noised - point) / noise
        else:
            predicted = (noised - signal * point) / noise
        latents = sampler.step(predicted, t, latents).prev_sample
    return latents


@pytest.mark.parametrize("prediction", [Epsilon(), VPrediction()], ids=lambda kind: kind.name)
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_every_sampler_finds_the_point(name, prediction):
    latents = sample(name, NoiseSchedule.from_config({}), prediction)
    torch.testing.assert_close(latents, torch.full_like(latents, POINT), atol=1e-3, rtol=0)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_no_noise_is_left_by_any_number_of_steps(name):
    schedule = NoiseSchedule.from_config({})
    left = {steps: float(sample(name, schedule, Epsilon(), steps, 0.0).abs().max()) for steps in COUNTS[name]}
    assert {steps: noise for steps, noise in left.items() if noise > 1e-3} == {}


def test_ddim_leaves_no_noise_at_a_zero_terminal_snr():
    schedule = NoiseSchedule.from_config({}, zero_terminal_snr=True)
    for steps in COUNTS["ddim"]:
        assert sample("ddim", schedule, VPrediction(), steps, 0.0).abs().max() < 1e-3


@pytest.mark.parametrize("steps", [1, 2, 5, 25, 50])
@pytest.mark.parametrize(
    ("name", "prediction"), [("ddim", Epsilon()), ("ddim", VPrediction()), ("pndm", Epsilon())], ids=str
)
def test_where_steps_divide_the_timesteps_the_latents_are_diffusers(name, prediction, steps):
    import diffusers

    kind, settings = {
        "ddim": ("DDIMScheduler", {"clip_sample": False}),
        "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    }[name]
    theirs = getattr(diffusers, kind)(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", prediction_type=prediction.name,
        timestep_spacing="trailing", set_alpha_to_one=True, **settings,
    )  # fmt: skip
    ours = make_sampler(name, NoiseSchedule.from_config({}), prediction)
    results = []
    for sampler in (ours, theirs):
        sampler.set_timesteps(steps)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in sampler.timesteps:
            predicted = torch.tanh(latents * 1.5 + float(t) / 1000)  # a network that is not linear
            latents = sampler.step(predicted, t, latents).prev_sample
        results.append(latents)
    assert torch.equal(ours.timesteps, theirs.timesteps)
    torch.testing.assert_close(*results, rtol=1e-4, atol=1e-4)


def test_pndm_combines_noise_whatever_is_predicted():
    """A network that predicts v is asked as one that predicts the same noise: the pictures are the same."""
    schedule, results = NoiseSchedule.from_config({}), []
    for prediction in (Epsilon(), VPrediction()):
        sampler = make_sampler("pndm", schedule, prediction)
        sampler.set_timesteps(20)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        for t in sampler.timesteps:
            alpha_bar = float(schedule.alphas_cumprod_S[int(t)])
            noise = torch.tanh(latents + float(t) / 1000)
            clean = (latents - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
            velocity = alpha_bar**0.5 * noise - (1 - alpha_bar) ** 0.5 * clean
            latents = sampler.step(noise if prediction.name == "epsilon" else velocity, t, latents).prev_sample
        results.append(latents)
    torch.testing.assert_close(*results, rtol=1e-3, atol=1e-3)


@pytest.mark.filterwarnings("ignore:.*dpmsolver.*:FutureWarning")
def test_dpmsolver_is_diffusers_up_to_its_last_step():
    from diffusers import DPMSolverMultistepScheduler

    theirs = DPMSolverMultistepScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", timestep_spacing="trailing",
        algorithm_type="dpmsolver", final_sigmas_type="sigma_min",
    )  # fmt: skip
    ours = make_sampler("dpmsolver", NoiseSchedule.from_config({}), Epsilon())
    seen = []
    for sampler in (ours, theirs):
        sampler.set_timesteps(20)
        latents = torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(1))
        trace = []
        for t in sampler.timesteps:
            latents = sampler.step(torch.tanh(latents + float(t) / 1000), t, latents).prev_sample
            trace.append(latents)
        seen.append(torch.stack(trace))
    torch.testing.assert_close(seen[0][:-1], seen[1][:-1], rtol=1e-4, atol=1e-4)


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


@pytest.mark.parametrize("steps", [0, 1001])
def test_more_steps_than_timesteps_are_refused(steps):
    with pytest.raises(ValueError, match="1000 timesteps"):
        make_sampler("ddim", NoiseSchedule.from_config({}), Epsilon()).set_timesteps(steps)


def test_an_unknown_sampler_is_named():
    with pytest.raises(InputError, match="'unipc' is not known"):
        make_sampler("unipc", NoiseSchedule.from_config({}), Epsilon())
