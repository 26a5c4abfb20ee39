"""What a run trains, as facts: they change with what is learned, and with nothing else."""

import copy
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import sdxl_pretrain
from library.diffusion.schedule import NoiseSchedule, prediction_type
from library.models.denoiser import Denoiser
from library.processes.versions import differences
from library.training.identity import changed, identify
from library.training.ranks.agreement import describe_run

FLAGS = ["--pretrained_model_name_or_path=m", "--train_data_dir=d", "--output_dir=o", "--resolution=64"]


def identity(
    sdxl, length=None, weighted=False, prediction="epsilon", zero_snr=False, clip_skip=None, trained=(), frozen=""
):
    """Of a run over the model; `frozen` names the part of the U-Net that does not train."""
    options = SimpleNamespace(model=SimpleNamespace(max_token_length=length, weighted_captions=weighted))
    schedule = NoiseSchedule.from_config(sdxl.scheduler_config, zero_snr)
    module = Denoiser(copy.deepcopy(sdxl), trained, clip_skip=clip_skip)
    for name, weight in module.unet.named_parameters():
        weight.requires_grad_(not frozen or not name.startswith(frozen))
    return identify(options, sdxl, "full", module, prediction_type(prediction), schedule)


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({"length": 150}, ["the caption length in tokens"]),
        ({"weighted": True}, ["the weights in captions"]),
        ({"prediction": "v_prediction"}, ["the prediction type"]),
        ({"prediction": "v_prediction", "zero_snr": True}, ["the prediction type", "the noise schedule"]),
        ({"trained": (False, True)}, ["text encoder 2"]),
        ({"clip_skip": 1}, ["the text encoders' outputs", "text encoder 1"]),
        ({"frozen": "out."}, ["the U-Net's frozen weights"]),
        ({"length": 77}, []),
    ],
)
def test_what_is_learned_is_in_it(sdxl, settings, names):
    found = changed(identity(sdxl), identity(sdxl, **settings))
    assert [text.partition(" (")[0] for text in found] == names


def test_one_number_of_what_is_frozen_is_noticed_and_its_precision_is_not(sdxl):
    vae, encoders = copy.deepcopy(sdxl.vae), copy.deepcopy(sdxl.text_encoders)
    with torch.no_grad():
        vae.encoder.conv_in.bias[0] += 1
        encoders[0].get_input_embeddings().weight[0, 0] += 1
    other = replace(sdxl, vae=vae, text_encoders=encoders)
    assert [text.partition(" (")[0] for text in changed(identity(sdxl), identity(other))] == [
        "the VAE's encoder",
        "text encoder 1",
    ]
    assert not changed(identity(sdxl), identity(replace(sdxl, vae=copy.deepcopy(sdxl.vae))))


def test_what_no_output_depends_on_is_not_in_it(sdxl):
    vae, encoders = copy.deepcopy(sdxl.vae), copy.deepcopy(sdxl.text_encoders)
    with torch.no_grad():
        vae.decoder.conv_in.bias[0] += 1
        encoders[0].encoder.layers[-1].mlp.fc1.bias[0] += 1
    assert not changed(identity(sdxl), identity(replace(sdxl, vae=vae, text_encoders=encoders)))


def test_another_frozen_block_of_the_unet_is_noticed(sdxl):
    unet = copy.deepcopy(sdxl.unet)
    with torch.no_grad():
        unet.output_blocks[0][0].in_layers[2].bias[0] += 1
    found = changed(identity(sdxl, frozen="output_blocks"), identity(replace(sdxl, unet=unet), frozen="output_blocks"))
    assert [text.partition(" (")[0] for text in found] == ["the U-Net's frozen weights"]
    assert not changed(identity(sdxl), identity(replace(sdxl, unet=unet)))  # where it trains, a state has it


def test_processes_that_would_learn_different_things_are_told_apart(sdxl):
    data = SimpleNamespace(global_batch=4, fingerprint=lambda: "abc", description=dict)
    module = torch.nn.Linear(2, 2)

    def described(prediction):
        return describe_run(sdxl_pretrain.SCRIPT.options(FLAGS), 1, data, module, identity(sdxl, prediction=prediction))

    assert differences(described("epsilon"), described("epsilon")) == []
    (difference,) = differences(described("epsilon"), described("v_prediction"))
    assert "the prediction type" in difference and "v_prediction" in difference


def test_old_and_new_stand_in_the_message(sdxl):
    (text,) = changed(identity(sdxl), identity(sdxl, prediction="v_prediction"))
    assert text == "the prediction type (epsilon then, v_prediction now)"
