"""Samplers by the names that flags and prompt files use, as diffusers' schedulers over our noise schedule."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from library.errors import InputError

if TYPE_CHECKING:  # the names of the samplers are wanted where torch is not: by --help
    from library.diffusion.schedule import NoiseSchedule, Prediction

# name -> (diffusers class, settings of its own); k_ names are the same samplers by k-diffusion's names
_SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {"clip_sample": False, "set_alpha_to_one": True}),
    "pndm": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lms": ("LMSDiscreteScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm_2": ("KDPM2DiscreteScheduler", {}),
    "dpm_2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpmsolver": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}),
    "dpmsolver++": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++"}),
    "dpmsingle": ("DPMSolverSinglestepScheduler", {}),
}
NAMES = [*_SAMPLERS, "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
# All others divide by the signal at the first step, which is 0 under a zero terminal SNR.
_ZERO_SNR_SAFE = {"ddim"}


def make_sampler(name: str, schedule: NoiseSchedule, prediction: Prediction) -> Any:
    """A new diffusers scheduler that samples a model trained on this schedule with this prediction type.

    Timesteps are spaced from the very last one down ("trailing": Lin, table 2), so that sampling in few
    steps also starts at the timestep that training saw as pure noise.

    Raises:
        InputError: the name is not known, or the sampler cannot start where no signal is left.
    """
    import diffusers

    if name not in NAMES:
        raise InputError(f"sampler {name!r} is not known; choose one of {', '.join(NAMES)}")
    plain_name = name.removeprefix("k_")
    if schedule.ends_in_pure_noise and plain_name not in _ZERO_SNR_SAFE:
        raise InputError(f"sampler {name!r} cannot start at a zero terminal SNR; use ddim (--sample_sampler or --ss)")
    class_name, settings = _SAMPLERS[plain_name]
    sampler_class = getattr(diffusers, class_name)
    return sampler_class(
        num_train_timesteps=schedule.timesteps,
        trained_betas=_betas(schedule),
        prediction_type=prediction.name,
        **_spacing(sampler_class),
        **settings,
    )


def _spacing(sampler_class: type) -> dict[str, str]:
    """The setting for "trailing" timesteps if the sampler has it; dpmsingle always starts at the last timestep."""
    return {"timestep_spacing": "trailing"} if "timestep_spacing" in signature(sampler_class).parameters else {}


def _betas(schedule: NoiseSchedule) -> Any:
    """The schedule's betas as a NumPy array: 1 - alpha_bar_t / alpha_bar_(t-1)."""
    alphas_cumprod_S = schedule.alphas_cumprod_S.double().cpu().numpy()
    betas = 1 - alphas_cumprod_S
    betas[1:] = 1 - alphas_cumprod_S[1:] / alphas_cumprod_S[:-1]
    return betas
