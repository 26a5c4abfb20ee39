"""What a run trains the U-Net to predict, and on which noise schedule: as flags say, else as the model's files do."""

from dataclasses import dataclass
from typing import Any

from library.diffusion.schedule import NoiseSchedule, Prediction, prediction_type
from library.errors import InputError
from library.models.family import Family
from library.models.model import Model


@dataclass(frozen=True)
class PredictionChoice:
    """What is trained, and what the log says about it.

    Attributes:
        scheduler_config: the model's, with what is trained in place of what it said before; for checkpoints.
        lines: for the plan in the log.
        warnings: what may be a mistake.
    """

    prediction: Prediction
    schedule: NoiseSchedule
    scheduler_config: dict[str, Any]
    lines: tuple[str, ...]
    warnings: tuple[str, ...]


def choose_prediction(
    model: Model, source: str, *, v_parameterization: bool, zero_terminal_snr: bool
) -> PredictionChoice:
    """The prediction type and the noise schedule that a model is trained with.

    The flag counts first, then what the files say (`Model.prediction_source`), then the family's usual type.

    Args:
        source: the model's file, folder or hub name, for messages.
        v_parameterization, zero_terminal_snr: the flags of these names.

    Raises:
        InputError: a zero terminal SNR with epsilon prediction, or a prediction type that is not known.
    """
    said, where = model.prediction_type, model.prediction_source
    warnings: list[str] = []
    if v_parameterization:
        prediction, by = prediction_type("v_prediction"), "--v_parameterization"
        if where and said != prediction.name:
            warnings.append(
                f"--v_parameterization trains {source} to predict v, and it predicts {said} until now, as {where} "
                "says: it has to learn anew what it predicts. Leave the flag out if that is not meant"
            )
    else:
        prediction, by = prediction_type(said), where or "what is usual"
        if not where:
            warnings.append(
                f"nothing in {source} says what it predicts; {said} is taken, which is usual. If it is a v-prediction "
                "model, stop and add --v_parameterization: training it on the wrong target destroys it"
            )
    schedule = NoiseSchedule.from_config(model.scheduler_config, zero_terminal_snr)
    if schedule.ends_in_pure_noise and prediction.name == "epsilon":
        raise InputError(
            "a zero terminal SNR (--zero_terminal_snr, or rescale_betas_zero_snr in the model's scheduler) is not "
            "for epsilon prediction, which says nothing about pure noise; add --v_parameterization"
        )
    trained: dict[str, Any] = {"prediction_type": prediction.name}
    lines = [f"prediction: {prediction.name}, by {by}"]
    if schedule.ends_in_pure_noise:
        trained |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        lines.append(f"zero terminal SNR, by {'--zero_terminal_snr' if zero_terminal_snr else 'the model'}")
    config = {**model.scheduler_config, **trained}
    return PredictionChoice(prediction, schedule, config, tuple(lines), tuple(warnings))


def check_v2(v2: bool, family: Family, source: str) -> None:
    """Raise InputError where --v2 was given and the model is none of SD 2.x; without the flag the files decide."""
    if v2 and family.name != "sd2":
        raise InputError(
            f"--v2 says that {source} is an SD 2.x model, and by its content it is an {family.title} one; leave --v2 "
            "out, or give an SD 2.x model"
        )
