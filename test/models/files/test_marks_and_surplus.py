"""Models that are easily misread: of another noise process, with tensors of other programs, with parts that do not fit.

The marks are those that ComfyUI writes (Playground 2.5, CosXL), and diffusers' configurations.
"""

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import InputError
from library.families import SD1, SD2, SDXL
from library.models.files.modelspec import read_metadata
from library.models.files.noise_process import check_scheduler, check_tensors
from library.models.files.read import load_model
from library.models.files.write import save_model
from library.models.unet import UNet
from library.models.vae import encode_images

CLIP_L = "conditioner.embedders.0."
BIG_G = "conditioner.embedders.1.model."


@pytest.fixture(scope="module")
def folder(sdxl, tmp_path_factory) -> Path:
    return save_model(sdxl, tmp_path_factory.mktemp("folder") / "tiny", "diffusers_safetensors")


@pytest.fixture(scope="module")
def single(sdxl, tmp_path_factory) -> Path:
    return save_model(sdxl, tmp_path_factory.mktemp("single") / "tiny", "safetensors")


@pytest.fixture
def load(folder):
    tokenizers = (str(folder / "tokenizer"), str(folder / "tokenizer_2"))
    return lambda path, **others: load_model(str(path), SDXL, tokenizers=tokenizers, **others)


def _with(single: Path, path: Path, tensors: dict, metadata: dict | None = None) -> Path:
    """The single file with more tensors and other metadata."""
    said = {key: value for key, value in read_metadata(single).items() if "prediction_type" not in key}
    save_file({**load_file(single), **tensors}, path, said | (metadata or {}))
    return path


def _equal(ours, theirs) -> bool:
    networks = [(ours.unet, theirs.unet), (ours.vae, theirs.vae), *zip(ours.text_encoders, theirs.text_encoders)]  # noqa: B905
    return all(
        a.state_dict().keys() == b.state_dict().keys()
        and all(torch.equal(one, b.state_dict()[name]) for name, one in a.state_dict().items())
        for a, b in networks
    )


# Another noise process ------------------------------------------------------------------------------------------------


def test_edm_models_are_refused_by_their_mark(single, load, tmp_path):
    path = _with(
        single, tmp_path / "edm.safetensors", {"edm_vpred.sigma_max": torch.zeros(4), "v_pred": torch.zeros(0)}
    )
    with pytest.raises(
        InputError, match=r"edm\.safetensors: it is a model of .*, EDM, as its tensors edm_vpred\.sigma_max"
    ):
        load(path)
    for mark in ("edm_mean", "edm_std", "edm_vpred.sigma_min"):
        with pytest.raises(InputError, match=f"EDM, as its tensors {mark} say"):
            check_tensors(["model.diffusion_model.out.2.bias", mark], "file")


@pytest.mark.parametrize("key", ["modelspec.prediction_type", "modelspec.predict_key"])
def test_the_metadata_that_programs_write_say_the_prediction_type(single, load, tmp_path, key):
    model = load(_with(single, tmp_path / "v.safetensors", {}, {key: "v"}))
    assert (model.prediction_type, model.prediction_source) == ("v_prediction", f"{key} in its metadata")
    again = save_model(model, tmp_path / "again", "safetensors")
    assert "v_pred" in load_file(again) and read_metadata(again)["modelspec.prediction_type"] == "v"
    for other in ("edm", ""):
        path = _with(single, tmp_path / "other.safetensors", {}, {key: other})
        with pytest.raises(InputError, match=rf"other\.safetensors: {key} in its metadata is '{other}'; trained here"):
            load(path)


def test_metadata_of_ours_with_another_process_are_refused(single, load, tmp_path):
    path = _with(single, tmp_path / "m.safetensors", {}, {"sd_training.scheduler": '{"use_flow_sigmas": true}'})
    with pytest.raises(InputError, match=r"m\.safetensors: sd_training\.scheduler in its metadata: use_flow_sigmas"):
        load(path)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"_class_name": "EDMEulerScheduler", "sigma_data": 0.5}, "EDMEulerScheduler"),
        ({"_class_name": "EDMDPMSolverMultistepScheduler"}, "EDMDPMSolverMultistepScheduler"),
        ({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}, "FlowMatchEulerDiscreteScheduler"),
        ({"_class_name": "CosineDPMSolverMultistepScheduler"}, "CosineDPMSolverMultistepScheduler"),
        ({"_class_name": ["custom", "MyScheduler"]}, "MyScheduler"),
        ({"_class_name": "DPMSolverMultistepScheduler", "use_flow_sigmas": True}, "use_flow_sigmas is true"),
        ({"_class_name": "UniPCMultistepScheduler", "prediction_type": "flow_prediction"}, "'flow_prediction'"),
        ({"prediction_type": "sample"}, "'sample'"),
    ],
)
def test_schedulers_of_other_processes_are_refused(change, named):
    with pytest.raises(InputError, match=rf"scheduler_config\.json: .*{named}"):
        check_scheduler({**SDXL.scheduler, **change}, "scheduler_config.json")


@pytest.mark.parametrize(
    "change",
    [
        {"beta_end": 12.0}, {"beta_end": "high"}, {"beta_start": -1e-3}, {"num_train_timesteps": 0}, {"beta_end": None},
        {"num_train_timesteps": "1000"}, {"trained_betas": ["x"]}, {"trained_betas": []}, {"trained_betas": [0.1, 2.0]},
        {"beta_start": float("nan")}, {"beta_schedule": "squaredcos_cap_v2"}, {"beta_schedule": ["linear"]},
    ],
)  # fmt: skip
def test_settings_that_make_no_schedule_are_named(change):
    with pytest.raises(InputError, match=r"scheduler_config\.json: "):
        check_scheduler({**SDXL.scheduler, **change}, "scheduler_config.json")


def test_they_are_refused_before_any_weight_is_read(folder, load, tmp_path):
    shutil.copytree(folder, tmp_path / "other")
    file = tmp_path / "other" / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}))
    save_file({}, tmp_path / "other" / "unet" / "diffusion_pytorch_model.safetensors")
    with pytest.raises(InputError, match=r"scheduler_config\.json: its scheduler is 'FlowMatch"):
        load(tmp_path / "other")


@pytest.mark.parametrize(
    "kind",
    [
        "DDIM",
        "DDPM",
        "PNDM",
        "UniPCMultistep",
        "EulerAncestralDiscrete",
        "LCM",
        "TCD",
        "DPMSolverMultistep",
        "SASolver",
    ],
)
def test_schedulers_that_sample_otherwise_are_the_same_process(kind):
    """Their configurations as diffusers writes them, with all fields of their own."""
    import diffusers

    scheduler = getattr(diffusers, f"{kind}Scheduler").from_config(dict(SDXL.scheduler))
    check_scheduler(json.loads(scheduler.to_json_string()), "scheduler_config.json")


def test_a_table_of_another_schedule_is_refused_and_the_usual_one_is_not(single, load, tmp_path):
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    usual, linear = (torch.cumprod(1 - one, 0) for one in (betas, torch.linspace(0.0001, 0.02, 1000)))
    for number, table in enumerate((usual, usual.half(), torch.zeros(1000))):
        load(_with(single, tmp_path / f"{number}.safetensors", {"alphas_cumprod": table, "ztsnr": torch.zeros(0)}))
    with pytest.raises(InputError, match=r"linear\.safetensors: its tensor alphas_cumprod .* another noise schedule"):
        load(_with(single, tmp_path / "linear.safetensors", {"alphas_cumprod": linear}))


def test_a_scale_of_latents_of_its_own_is_refused_and_the_usual_one_is_not(single, load, tmp_path):
    for number, factor in enumerate((0.13025, 0.1302)):
        load(_with(single, tmp_path / f"{number}.safetensors", {"scale_factor": torch.tensor(factor)}))
    with pytest.raises(InputError, match=r"own\.safetensors: its tensor scale_factor says .* by 0\.2.* by 0\.13025"):
        load(_with(single, tmp_path / "own.safetensors", {"scale_factor": torch.tensor(0.2)}))


@pytest.mark.parametrize(
    "own", [{"shift_factor": 0.1159}, {"latents_mean": [1.0, 2.0, 3.0, 4.0], "latents_std": [2.0, 3.0, 4.0, 5.0]}]
)
def test_a_single_file_keeps_how_its_vae_shifts_latents(sdxl, load, tmp_path, own):
    """Without, a checkpoint of Playground's VAE would be read as one that shifts nothing."""
    vae = copy.deepcopy(sdxl.vae)
    vae.register_to_config(**own)
    model = load(save_model(replace(sdxl, vae=vae), tmp_path / "shifted", "safetensors"))
    assert {name: model.vae.config[name] for name in own} == own
    images = torch.randint(0, 255, (1, 32, 32, 3), dtype=torch.uint8)
    assert torch.equal(encode_images(model.vae, images), encode_images(vae, images))


# Harmless surplus -----------------------------------------------------------------------------------------------------


def test_what_no_output_is_made_of_is_a_warning(sdxl, single, load, tmp_path, caplog):
    kept = [
        f"{CLIP_L}transformer.text_projection.weight",
        f"{CLIP_L}transformer.text_projection.weight.weight",
        f"{CLIP_L}transformer.text_model.text_projection.weight",
        f"{CLIP_L}text_projection",
        f"{CLIP_L}logit_scale",
    ]
    dropped = [
        "global_step", "model_ema.diffusion_modelout2weight", "model_sampling.sigmas", "unet_ema.out.2.weight",
        f"{BIG_G}visual.conv1.weight",
    ]  # fmt: skip
    model = load(_with(single, tmp_path / "more.safetensors", {name: torch.eye(3) for name in [*kept, *dropped]}))
    assert _equal(model, sdxl)
    for names, what in ((kept, "kept as they are"), (dropped, "left out")):
        (line,) = [record.message for record in caplog.records if f"made of are {what}: " in record.message]
        assert "5 tensors that no output" in line and set(line.partition(f"{what}: ")[2].split(", ")) == set(names)
    again = load_file(save_model(model, tmp_path / "again", "safetensors"))
    assert again.keys() == {*load_file(single), *kept}
    assert _equal(load(tmp_path / "again.safetensors"), sdxl)


def test_a_projection_as_a_linear_layer_is_read(sdxl, single, load, tmp_path):
    tensors, name = load_file(single), f"{BIG_G}text_projection"
    linear = tensors.pop(name).T.contiguous()
    save_file({**tensors, f"{name}.weight": linear}, tmp_path / "linear.safetensors", read_metadata(single))
    assert _equal(load(tmp_path / "linear.safetensors"), sdxl)
    path = _with(single, tmp_path / "both.safetensors", {f"{name}.weight": linear})
    assert _equal(load(path), sdxl)
    path = _with(single, tmp_path / "two.safetensors", {f"{name}.weight": linear + 1})
    with pytest.raises(InputError, match=r"text_projection\.weight is another projection"):
        load(path)


@pytest.mark.parametrize("wrap", [lambda n: n.replace("model.", "model._orig_mod.", 1), lambda n: f"module.{n}"])
def test_names_that_wrappers_have_changed_are_understood(sdxl, single, load, tmp_path, wrap):
    tensors = {wrap(name): tensor for name, tensor in load_file(single).items()}
    save_file(tensors, tmp_path / "wrapped.safetensors", read_metadata(single))
    assert _equal(load(tmp_path / "wrapped.safetensors"), sdxl)
    name = "model.diffusion_model.out.2.bias"
    path = _with(single, tmp_path / "twice.safetensors", {f"model._orig_mod.{name[6:]}": torch.zeros(4)})
    with pytest.raises(InputError, match=r"twice\.safetensors: it has model\.diffusion_model\.out\.2\.bias twice"):
        load(path)


def test_a_folder_with_all_of_clip_and_compiled_names_is_read(sdxl, folder, load, tmp_path, caplog):
    shutil.copytree(folder, tmp_path / "more")
    weights = tmp_path / "more" / "text_encoder" / "model.safetensors"
    more = {"text_projection.weight": torch.eye(3), "logit_scale": torch.ones(()), "vision_model.x": torch.ones(2)}
    save_file({**load_file(weights), **more}, weights)
    weights = tmp_path / "more" / "unet" / "diffusion_pytorch_model.safetensors"
    save_file({f"_orig_mod.{name}": one for name, one in load_file(weights).items()}, weights)
    assert _equal(load(tmp_path / "more"), sdxl)
    assert "text_encoder: 3 tensors that no output is made of are left out" in caplog.text


# Weights that are none ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "shown", "value"),
    [
        ("model.diffusion_model.out.2.weight", "out.2.weight", "nan"),
        (f"{CLIP_L}transformer.text_model.final_layer_norm.bias", "final_layer_norm.bias", "inf"),
        (f"{BIG_G}transformer.resblocks.1.mlp.c_fc.weight", "layers.1.mlp.fc1.weight", "-inf"),
        ("first_stage_model.decoder.conv_out.weight", "decoder.conv_out.weight", "nan"),
    ],
)
def test_weights_that_are_no_numbers_are_named(single, load, tmp_path, name, shown, value):
    tensor = load_file(single)[name].half().clone()
    tensor.view(-1)[1] = float(value)
    path = _with(single, tmp_path / "nan.safetensors", {name: tensor})
    with pytest.raises(InputError, match=rf"nan\.safetensors: 1 tensors have weights that are NaN.*{shown} \(1 of"):
        load(path)


def test_quantised_weights_are_no_weights(single, load, tmp_path):
    name = "model.diffusion_model.out.2.weight"
    tensor = torch.zeros(load_file(single)[name].shape, dtype=torch.int8)
    with pytest.raises(InputError, match=r"q\.safetensors: 1 tensors are no .*out\.2\.weight: torch\.int8"):
        load(_with(single, tmp_path / "q.safetensors", {name: tensor}))


# Parts that do not fit ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"in_channels": 9}, "its U-Net takes 9 channels, and latents have 4.*inpainting"),
        ({"out_channels": 8}, "its U-Net puts out 8 channels, and latents have 4"),
        ({"context_dim": 128}, r"attends to text of 128 channels, and the text encoders put out 64 \+ 128 = 192"),
        (
            {"adm_in_channels": 1600},
            r"takes vectors of 1600 channels, and pooled text and sizes have 128 \+ 1536 = 1664",
        ),
        ({"in_channels": 16, "out_channels": 16}, "latents have 4 channels, and the U-Net in .* takes 16"),
    ],
)
def test_parts_that_do_not_fit_are_named_at_loading(sdxl, load, tmp_path, change, message):
    unet, form = UNet(replace(sdxl.unet.config, **change)), "safetensors" if len(change) == 1 else "diffusers"
    path = save_model(replace(sdxl, unet=unet), tmp_path / "unfit", form)
    with pytest.raises(InputError, match=rf"unfit.*{message}"):
        load(path)


@pytest.mark.parametrize(("name", "family"), [("sd1", SD1), ("sd2_v", SD2)])
def test_text_of_another_width_is_named_for_the_other_families(request, tmp_path, name, family):
    model = request.getfixturevalue(name)
    width = model.unet.config.context_dim
    unet = UNet(replace(model.unet.config, context_dim=width * 2))
    path = save_model(replace(model, unet=unet), tmp_path / "unfit", "diffusers_safetensors")
    with pytest.raises(InputError, match=rf"attends to text of {2 * width} channels, .* put out {width}\."):
        load_model(str(path), family)


def test_a_vae_of_other_latents_is_named_as_the_flag_gave_it(folder, load, tmp_path):
    from diffusers import AutoencoderKL

    settings = {"block_out_channels": (32, 64), "down_block_types": ("DownEncoderBlock2D",) * 2,
                "up_block_types": ("UpDecoderBlock2D",) * 2, "layers_per_block": 1}  # fmt: skip
    AutoencoderKL(latent_channels=16, **settings).save_pretrained(tmp_path / "flux")
    with pytest.raises(InputError, match=r"--vae .*flux: this VAE's latents have 16 channels.* takes 4"):
        load(folder, vae=str(tmp_path / "flux"))
    AutoencoderKL(in_channels=4, **settings).save_pretrained(tmp_path / "rgba")
    with pytest.raises(InputError, match=r"--vae .*rgba: this VAE takes pictures of 4 channels"):
        load(folder, vae=str(tmp_path / "rgba"))


def test_a_text_encoder_of_another_kind_is_named(folder, load, tmp_path):
    shutil.copytree(folder, tmp_path / "t5")
    config = tmp_path / "t5" / "text_encoder" / "config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "model_type": "t5"}))
    with pytest.raises(InputError, match=r"text_encoder/config\.json: its model_type is 't5', not a CLIP text encoder"):
        load(tmp_path / "t5")
