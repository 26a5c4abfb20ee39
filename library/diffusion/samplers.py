"""Samplers by the names that flags and prompt files use, over our noise schedule: our own or diffusers' schedulers."""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

from library.errors import InputError

if TYPE_CHECKING:  # the names of the samplers are wanted where torch is not: by --help
    from library.diffusion.schedule import NoiseSchedule, Prediction

# name -> (diffusers class, settings of its own); k_ names are the same samplers by k-diffusion's names
_DIFFUSERS: dict[str, tuple[str, dict[str, Any]]] = {
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
NAMES = ["ddim", "pndm", *_DIFFUSERS, "k_lms", "k_euler", "k_euler_a", "k_dpm_2", "k_dpm_2_a"]
# All others divide by the signal at the first step, which is 0 under a zero terminal SNR.
_ZERO_SNR_SAFE = {"ddim"}


def make_sampler(name: str, schedule: NoiseSchedule, prediction: Prediction) -> Any:
    """A new sampler, with the interface of diffusers' schedulers, for a model trained on this schedule.

    Timesteps are spaced from the very last one down ("trailing": Lin, table 2), so that sampling in few
    steps also starts at the timestep that training saw as pure noise; the last step leaves no noise.

    Raises:
        InputError: the name is not known, or the sampler cannot start where no signal is left.
    """
    if name not in NAMES:
        raise InputError(f"sampler {name!r} is not known; choose one of {', '.join(NAMES)}")
    plain_name = name.removeprefix("k_")
    if schedule.ends_in_pure_noise and plain_name not in _ZERO_SNR_SAFE:
        raise InputError(f"sampler {name!r} cannot start at a zero terminal SNR; use ddim (--sample_sampler or --ss)")
    if plain_name not in _DIFFUSERS:
        from library.diffusion.ddim import DDIM, PLMS

        return {"ddim": DDIM, "pndm": PLMS}[plain_name](schedule, prediction)
    import diffusers

    class_name, settings = _DIFFUSERS[plain_name]
    sampler_class = getattr(diffusers, class_name)
    ends = (_EndsWithoutNoise,) if settings.get("final_sigmas_type") == "sigma_min" else ()
    return type(class_name, (*ends, _CountsTimesteps, sampler_class), {})(
        num_train_timesteps=schedule.timesteps,
        trained_betas=_betas(schedule),
        prediction_type=prediction.name,
        **_spacing(sampler_class),
        **settings,
    )


class _CountsTimesteps:
    """Corrects one of diffusers' schedulers: as many timesteps as are asked for.

    With 62 of the step counts from 1 to 1000 (61 is the first) the spacing "trailing" gives one more, -1: the sum of
    the rounded intervals ends just above 0.
    """

    def set_timesteps(self, num_inference_steps: int, *arguments: Any, **others: Any) -> None:
        """See diffusers."""
        base: Any = super()
        base.set_timesteps(num_inference_steps, *arguments, **others)
        if float(self.timesteps[-1]) < 0:  # type: ignore[attr-defined]
            base.set_timesteps(num_inference_steps * (1 - 1e-9), *arguments, **others)  # longer by as little


class _EndsWithoutNoise:
    """Corrects DPM-Solver, which diffusers ends at the first timestep's noise: its last step goes on to none.

    The limit of DPM-Solver-1 (Lu et al., 2206.00927, equation 3.7) without noise at the step's end is DDIM's x0.
    """

    def step(self, model_output: Any, timestep: Any, sample: Any, **others: Any) -> Any:
        """See diffusers."""
        base: Any = self
        stepped = super().step(model_output, timestep, sample, **others)  # type: ignore[misc]
        if base.step_index < len(base.timesteps):
            return stepped
        noise = base.model_outputs[-1]
        alpha_bar = base.alphas_cumprod[int(timestep)]
        clean = (sample - (1 - alpha_bar) ** 0.5 * noise) / alpha_bar**0.5
        return type(stepped)(prev_sample=clean)


def _spacing(sampler_class: type) -> dict[str, str]:
    """The setting for "trailing" timesteps if the sampler has it; dpmsingle always starts at the last timestep."""
    return {"timestep_spacing": "trailing"} if "timestep_spacing" in signature(sampler_class).parameters else {}


def _betas(schedule: NoiseSchedule) -> Any:
    """The schedule's betas as a NumPy array: 1 - alpha_bar_t / alpha_bar_(t-1)."""
    alphas_cumprod_S = schedule.alphas_cumprod_S.double().cpu().numpy()
    betas = 1 - alphas_cumprod_S
    betas[1:] = 1 - alphas_cumprod_S[1:] / alphas_cumprod_S[:-1]
    return betas
