"""What a run trains to predict, by flags and by what the files say."""

from dataclasses import replace

import pytest

from library.errors import InputError
from library.families import SD1, SD2, SDXL
from library.models.prediction import check_v2, choose_prediction


def _model(sd1, kind="epsilon", source="", **scheduler):
    config = {**sd1.scheduler_config, "prediction_type": kind, **scheduler}
    return replace(sd1, scheduler_config=config, prediction_source=source)


def _choose(model, v=False, zero=False):
    return choose_prediction(model, "m.safetensors", v_parameterization=v, zero_terminal_snr=zero)


@pytest.mark.parametrize("kind", ["epsilon", "v_prediction"])
def test_without_the_flag_the_files_decide(sd1, kind):
    choice = _choose(_model(sd1, kind, "modelspec.prediction_type"))
    assert (choice.prediction.name, choice.warnings) == (kind, ())
    assert choice.lines == (f"prediction: {kind}, by modelspec.prediction_type",)
    assert choice.scheduler_config["prediction_type"] == kind


def test_the_flag_wins_and_a_contradiction_names_both(sd1):
    choice = _choose(_model(sd1, "epsilon", "scheduler_config.json"), v=True)
    assert choice.prediction.name == choice.scheduler_config["prediction_type"] == "v_prediction"
    (warning,) = choice.warnings
    assert "--v_parameterization" in warning and "epsilon" in warning and "scheduler_config.json" in warning
    assert _choose(_model(sd1, "v_prediction", "the mark v_pred"), v=True).warnings == ()
    assert _choose(_model(sd1, "epsilon", ""), v=True).warnings == ()  # the file says nothing: no contradiction


def test_a_file_that_says_nothing_is_a_warning(sd1):
    choice = _choose(_model(sd1))
    assert choice.prediction.name == "epsilon"
    (warning,) = choice.warnings
    assert "m.safetensors" in warning and "--v_parameterization" in warning


def test_zero_terminal_snr_by_flag_or_file_needs_v(sd1):
    for model, zero in ((_model(sd1, "epsilon", "x"), True), (_model(sd1, rescale_betas_zero_snr=True), False)):
        with pytest.raises(InputError, match=r"--zero_terminal_snr.*--v_parameterization"):
            _choose(model, zero=zero)
        choice = _choose(model, v=True, zero=zero)
        assert choice.schedule.ends_in_pure_noise
        assert choice.scheduler_config["rescale_betas_zero_snr"] is True
        assert choice.scheduler_config["timestep_spacing"] == "trailing"
        assert any(line.startswith("zero terminal SNR, by ") for line in choice.lines)


def test_v2_is_checked_against_the_content():
    check_v2(True, SD2, "m")
    check_v2(False, SD2, "m")
    check_v2(False, SD1, "m")
    for family in (SD1, SDXL):
        with pytest.raises(InputError, match=rf"--v2 says that m is an SD 2\.x model.* {family.title}"):
            check_v2(True, family, "m")
