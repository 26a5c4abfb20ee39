"""Marks of another noise process than the one that is trained here: a model that has one is refused by name.

Trained is discrete diffusion on a table of alpha_bar (Ho et al., 2006.11239), with noise or velocity predicted. EDM
(Karras et al., 2206.00364) scales inputs and outputs by a continuous sigma, flow matching (Lipman et al., 2210.02747)
mixes picture and noise in a straight line: such a model, trained as if it were the other, unlearns what it can.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from library.diffusion.schedule import NoiseSchedule
from library.errors import InputError

# Tensors that hold nothing but the mark, as ComfyUI writes and reads them: Playground 2.5, CosXL.
_EDM_TENSORS = re.compile(r"edm_.*")
# diffusers' schedulers over a table of alpha_bar; they differ in how they sample.
_SCHEDULERS = {
    f"{name}Scheduler"
    for name in (
        "DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "DEISMultistep", "DPMSolverMultistep",
        "DPMSolverMultistepInverse", "DPMSolverSDE", "DPMSolverSinglestep", "EulerAncestralDiscrete", "EulerDiscrete",
        "HeunDiscrete", "KDPM2AncestralDiscrete", "KDPM2Discrete", "LCM", "LMSDiscrete", "PNDM", "SASolver", "TCD",
        "UniPCMultistep",
    )
}  # fmt: skip
# How far a table in a file may be from the configuration's: half precision is 5e-4 off, a zero terminal SNR 0.03.
_NEAR = 5e-3
_WAY_OUT = "Give a model of the usual noise process (DDPM's, with noise or v predicted)."


def check_tensors(names: Iterable[str], origin: str) -> None:
    """Raise InputError where a single file has tensors that mark EDM."""
    marks = sorted(name for name in names if _EDM_TENSORS.fullmatch(name))
    if marks:
        raise InputError(
            f"{origin}: it is a model of another noise process, EDM, as its tensors {', '.join(marks[:4])} say; that "
            f"is not trained here, and training it as usual would destroy it. {_WAY_OUT}"
        )


def check_scheduler(config: Mapping[str, Any], origin: str) -> None:
    """Raise InputError where a scheduler's configuration is of another noise process, or cannot be followed.

    Args:
        config: diffusers' scheduler_config.json, or what metadata has of one.
        origin: where it stands, for messages.
    """
    name = str(config.get("_class_name", "DDIMScheduler"))
    if name.removeprefix("Flax") not in _SCHEDULERS:
        raise InputError(
            f"{origin}: its scheduler is {name[:80]!r}, of another noise process than the one that is trained "
            f"here (EDM and flow matching are not). {_WAY_OUT}"
        )
    for field in ("use_flow_sigmas", "use_dynamic_shifting"):
        if config.get(field):
            raise InputError(f"{origin}: {field} is true: it is a model of flow matching, not trained here. {_WAY_OUT}")
    kind = config.get("prediction_type", "epsilon")
    if kind not in ("epsilon", "v_prediction"):
        raise InputError(
            f"{origin}: prediction_type is {str(kind)[:80]!r}; trained here are epsilon and v_prediction. {_WAY_OUT}"
        )
    if config.get("snr_shift_scale", 1) not in (1, None):
        raise InputError(f"{origin}: snr_shift_scale shifts the noise schedule, which is not read here. {_WAY_OUT}")
    try:
        alphas_cumprod_S = NoiseSchedule.from_config(config).alphas_cumprod_S
        falls = len(alphas_cumprod_S) > 1 and bool((alphas_cumprod_S[1:] < alphas_cumprod_S[:-1]).all())
        wrong = (
            None if falls and alphas_cumprod_S[-1] >= 0 and alphas_cumprod_S[0] < 1 else "its alpha_bar does not fall"
        )
    except InputError:
        raise
    except (TypeError, ValueError, RuntimeError, ArithmeticError) as error:
        wrong = str(error).splitlines()[0]
    if wrong:
        fields = ("beta_start", "beta_end", "beta_schedule", "num_train_timesteps", "trained_betas")
        said = ", ".join(f"{name} {str(config[name])[:40]}" for name in fields if config.get(name) is not None)
        raise InputError(f"{origin}: makes no noise schedule ({wrong}): {said}. Copy or download it again.")


def check_schedule(tensors: Mapping[str, Tensor], config: Mapping[str, Any], origin: str) -> None:
    """Raise InputError where a single file has a table of alpha_bar that is not the schedule that is trained.

    A table that is none (zeros that fill a place) says nothing. The published table beside the mark `ztsnr` is usual.
    """
    table_S = tensors.get("alphas_cumprod")
    if table_S is None or table_S.ndim != 1 or not table_S.is_floating_point():
        return
    table_S = table_S.float()
    if not bool(((table_S[1:] < table_S[:-1]).all()) & (table_S[:1] <= 1).all() & (table_S >= 0).all()):
        return
    known = [NoiseSchedule.from_config(config), NoiseSchedule.from_config({**config, "rescale_betas_zero_snr": False})]
    if not any(len(table_S) == one.timesteps and (table_S - one.alphas_cumprod_S).abs().max() < _NEAR for one in known):
        raise InputError(
            f"{origin}: its tensor alphas_cumprod is the table of another noise schedule than the one that it would be "
            "trained on. Give it as a diffusers folder, whose scheduler_config.json says the schedule."
        )
