"""SD 1.x and SD 2.x on disk: what diffusers makes of ours, round trips, and what no tensor of a single file shows."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from library.errors import InputError
from library.families import FAMILIES, SD1, SD2, SDXL
from library.models.files import single_file
from library.models.files.infer_configs import unet_sizes
from library.models.files.kept_configs import unet_fields
from library.models.files.modelspec import read_metadata
from library.models.files.read import load_model, load_tokenizers, load_vae
from library.models.files.write import save_model
from library.models.model import Model
from library.models.text_encoders import encode, tokenize_all
from library.models.unet import UNet, UNetConfig

CAPTIONS = ["a photo of a cat", "a red dog"]
BOTH = ("sd1", "sd2_v")
ALL = tuple(FAMILIES.values())


@pytest.fixture(scope="module")
def written(sd1, sd2_v, sdxl, tmp_path_factory):
    """Of each tiny model a diffusers folder and a single file, by (name, form)."""
    base = tmp_path_factory.mktemp("families")
    models = {"sd1": sd1, "sd2_v": sd2_v, "sdxl": sdxl}
    return {
        (name, form): save_model(model, base / f"{name}_{form}", form)
        for name, model in models.items()
        for form in ("diffusers_safetensors", "safetensors")
    }


def _load(path: Path, folder: Path, families=ALL) -> Model:
    tokenizers = [str(folder / name) for name in ("tokenizer", "tokenizer_2") if (folder / name).exists()]
    return load_model(str(path), families, tokenizers=tokenizers)


@torch.no_grad()
def _outputs(model: Model) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(7)
    latents, times = torch.randn(2, 4, 8, 24, generator=generator), torch.tensor([3.0, 700.0])
    context = encode(model.text_encoders, tokenize_all(model.tokenizers, CAPTIONS), model.uses(None)).context_BTC
    return {
        "context": context,
        "unet": model.unet(latents, times, context, None),
        "vae": model.vae.decode(latents / model.vae.config.scaling_factor).sample,
    }


@torch.no_grad()
def _assert_diffusers_computes_the_same(pipeline, model: Model) -> None:
    generator = torch.Generator().manual_seed(7)
    latents, times = torch.randn(2, 4, 8, 24, generator=generator), torch.tensor([3.0, 700.0])
    context, _ = pipeline.encode_prompt(CAPTIONS, "cpu", 1, False)
    theirs = {
        "context": context,
        "unet": pipeline.unet(latents, times, context).sample,
        "vae": pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample,
    }
    for name, ours in _outputs(model).items():
        assert (ours - theirs[name]).abs().max() <= 1e-4 * theirs[name].abs().max(), name
        assert theirs[name].abs().max() > 1e-2, f"{name}: outputs near zero show nothing"


def _assert_equal(first: Model, second: Model) -> None:
    assert first.family is second.family
    assert first.unet.config == second.unet.config
    for ours, theirs in zip(
        (first.unet, first.vae, *first.text_encoders), (second.unet, second.vae, *second.text_encoders), strict=True
    ):
        found, expected = ours.state_dict(), theirs.state_dict()
        assert found.keys() == expected.keys()
        for key, tensor in found.items():
            assert torch.equal(tensor, expected[key]), key
    assert [one.pad_token_id for one in first.tokenizers] == [one.pad_token_id for one in second.tokenizers]
    assert first.prediction_type == second.prediction_type


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("form", ["diffusers", "diffusers_safetensors"])
def test_diffusers_opens_our_folder_and_computes_the_same(name, form, request, tmp_path):
    from diffusers import StableDiffusionPipeline

    model = request.getfixturevalue(name)
    folder = save_model(model, tmp_path / "model", form)
    pipeline = StableDiffusionPipeline.from_pretrained(folder, local_files_only=True)
    _assert_diffusers_computes_the_same(pipeline, model)
    assert pipeline.scheduler.config.prediction_type == model.prediction_type
    assert pipeline.unet.config.sample_size == {"sd1": 64, "sd2_v": 96}[name]  # 512 and 768 px
    _assert_equal(_load(folder, folder), model)


@pytest.mark.parametrize(("name", "size", "zeros"), [("sdxl", 64, False), ("sd1", [64, 96], None), ("sd2_v", 64, None)])
def test_what_a_pipeline_draws_by_default_is_the_models_own(written, tmp_path, name, size, zeros):
    """Written as the family's, a model for 512 px would draw 1024 px, and none for an empty prompt what it should."""
    shutil.copytree(written[name, "diffusers_safetensors"], tmp_path / "own")
    for file, change in (
        ("unet/config.json", {"sample_size": size}),
        ("model_index.json", {} if zeros is None else {"force_zeros_for_empty_prompt": zeros}),
    ):
        path = tmp_path / "own" / file
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    model = _load(tmp_path / "own", tmp_path / "own")
    single = save_model(model, tmp_path / "single", "safetensors")
    for number, again in enumerate((model, _load(single, tmp_path / "own"))):
        folder = save_model(again, tmp_path / f"again{number}", "diffusers_safetensors")
        assert json.loads((folder / "unet" / "config.json").read_text())["sample_size"] == size
        index = json.loads((folder / "model_index.json").read_text())
        assert index.get("force_zeros_for_empty_prompt") == zeros


@pytest.mark.parametrize("name", BOTH)
@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_diffusers_opens_our_single_file_and_computes_the_same(name, form, request, written, tmp_path):
    from diffusers import StableDiffusionPipeline

    model, folder = request.getfixturevalue(name), written[name, "diffusers_safetensors"]
    file = save_model(model, tmp_path / "model", form)
    pipeline = StableDiffusionPipeline.from_single_file(file, config=str(folder), local_files_only=True)
    _assert_diffusers_computes_the_same(pipeline, model)
    _assert_equal(_load(file, folder), model)


@pytest.mark.parametrize("name", [*BOTH, "sdxl"])
def test_a_small_single_file_computes_what_was_saved(name, request, written):
    """Heads, activations and norm groups leave no trace in shapes: taken as usual, the U-Net was 7 % off."""
    model = request.getfixturevalue(name)
    again = _load(written[name, "safetensors"], written[name, "diffusers_safetensors"])
    _assert_equal(again, model)
    for ours, theirs in zip(again.text_encoders, model.text_encoders, strict=True):
        for field in ("num_attention_heads", "hidden_act", "eos_token_id"):
            assert getattr(ours.config, field) == getattr(theirs.config, field)
    if name != "sdxl":
        found, expected = _outputs(again), _outputs(model)
        assert all(torch.equal(found[part], expected[part]) for part in expected)


@pytest.mark.parametrize(
    ("key", "what"),
    [
        ("sd_training.unet", r"heads its U-Net has .*\[32, 64, 128, 128\] channels"),
        ("sd_training.text_encoders", "heads its text encoder 1 has .*48 channels"),
        ("sd_training.vae", r"norm groups its VAE has .*\[32, 64\] channels"),
    ],
)
def test_what_cannot_be_read_for_certain_is_refused(written, tmp_path, key, what):
    file = written["sd1", "safetensors"]
    metadata = {name: value for name, value in read_metadata(file).items() if name != key}
    save_file(load_file(file), tmp_path / "other.safetensors", metadata)
    with pytest.raises(InputError, match=rf"other\.safetensors: refused: how many .*{what}.*{key}.*diffusers folder"):
        _load(tmp_path / "other.safetensors", written["sd1", "diffusers_safetensors"])


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("sd_training.unet", {"num_heads": 0}),
        ("sd_training.unet", {"num_heads": "8"}),
        ("sd_training.unet", {"num_head_channels": None}),
        ("sd_training.unet", 5),
        ("sd_training.vae", {"norm_num_groups": -32}),
        ("sd_training.text_encoders", [{"num_attention_heads": 1}]),
        ("sd_training.text_encoders", "x"),
    ],
)
def test_metadata_that_makes_no_sense_is_named(written, tmp_path, key, change):
    file = written["sd1", "safetensors"]
    metadata = read_metadata(file)
    metadata[key] = json.dumps({**json.loads(metadata[key]), **change} if isinstance(change, dict) else change)
    save_file(load_file(file), tmp_path / "odd.safetensors", metadata)
    with pytest.raises(InputError, match=rf"odd\.safetensors: {key} in its metadata .*makes no sense"):
        _load(tmp_path / "odd.safetensors", written["sd1", "diffusers_safetensors"])


@pytest.mark.parametrize("family", [SD1, SD2, SDXL], ids=["sd1", "sd2", "sdxl"])
def test_the_published_u_net_needs_no_metadata(family):
    with torch.device("meta"):
        sizes = unet_sizes(UNet(family.unet).state_dict())
    assert UNetConfig(**sizes, **unet_fields(sizes, {}, family, "file")) == family.unet


def test_published_u_nets_are_what_diffusers_configurations_say():
    """Heads and projections as the published unet/config.json of both families have them."""
    from library.models.files.diffusers_config import unet_config_to_diffusers

    first, second = unet_config_to_diffusers(SD1.unet), unet_config_to_diffusers(SD2.unet)
    assert (first["attention_head_dim"], first["use_linear_projection"], first["cross_attention_dim"]) == (
        8,
        False,
        768,
    )
    assert second["attention_head_dim"] == [5, 10, 20, 20]
    assert (second["use_linear_projection"], second["cross_attention_dim"]) == (True, 1024)
    for fields in (first, second):
        assert fields["block_out_channels"] == [320, 640, 1280, 1280]
        assert fields["down_block_types"] == ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"]
        assert "addition_embed_type" not in fields


def test_an_sd1_models_size_has_the_published_files_tensors():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2, scaling_factor=0.18215,
        )  # fmt: skip
        config = CLIPTextConfig(
            hidden_size=768, intermediate_size=3072, num_attention_heads=12, eos_token_id=2, bos_token_id=0,
        )  # fmt: skip
        model = Model(SD1, UNet(SD1.unet), vae, (CLIPTextModel(config),), (), dict(SD1.scheduler))
        names = single_file.join(model)
    # v1-5-pruned-emaonly.safetensors holds 1131; position_ids is no parameter here.
    assert len(names) == 1131 - 1
    assert "cond_stage_model.transformer.text_model.encoder.layers.11.mlp.fc2.bias" in names
    assert model.architecture == "stable-diffusion-v1"
    # Nothing has to be remembered of it: any reader takes the family's values.
    assert set(single_file.remembered(model)) == {"modelspec.architecture", "modelspec.prediction_type"}


# What files in the field have besides ---------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_older_sd1_files_are_read(sd1, written, tmp_path, prefix):
    file, folder = written["sd1", "safetensors"], written["sd1", "diffusers_safetensors"]
    encoder = "cond_stage_model.transformer."
    tensors = {
        name.replace(f"{encoder}text_model.", encoder + prefix): tensor for name, tensor in load_file(file).items()
    }
    tensors[f"{encoder}{prefix}embeddings.position_ids"] = torch.arange(77)[None]
    more = {
        "betas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
        "cond_stage_model.logit_scale": torch.ones(()),
    }
    torch.save(
        {"state_dict": {**tensors, **more}, "metadata": read_metadata(file), "global_step": 5}, tmp_path / "old.ckpt"
    )
    _assert_equal(_load(tmp_path / "old.ckpt", folder), sd1)


def test_sd2_files_keep_the_layer_that_nothing_uses(sd2_v, written, tmp_path):
    """OpenCLIP's 24th layer, its projection and temperature: read, not used, written back as they were."""
    from diffusers import StableDiffusionPipeline

    file, folder = written["sd2_v", "safetensors"], written["sd2_v", "diffusers_safetensors"]
    tensors, encoder = load_file(file), "cond_stage_model.model."
    assert not any(".resblocks.23." in name for name in tensors)
    last = f"{encoder}transformer.resblocks.22."
    more = {name.replace(".22.", ".23."): tensor + 1 for name, tensor in tensors.items() if name.startswith(last)}
    more |= {f"{encoder}text_projection": torch.randn(32, 32), f"{encoder}logit_scale": torch.tensor(4.6)}
    save_file({**tensors, **more}, tmp_path / "published.safetensors", read_metadata(file))
    model = _load(tmp_path / "published.safetensors", folder)
    _assert_equal(model, sd2_v)
    for form in ("safetensors", "ckpt"):
        again = save_model(model, tmp_path / "again", form)
        found = load_file(again) if form == "safetensors" else torch.load(again, weights_only=True)["state_dict"]
        assert found.keys() == {*tensors, *more}
        assert all(torch.equal(found[name], tensor) for name, tensor in more.items())
        pipeline = StableDiffusionPipeline.from_single_file(again, config=str(folder), local_files_only=True)
        _assert_diffusers_computes_the_same(pipeline, model)


# Which family ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "diffusers_safetensors"])
@pytest.mark.parametrize(
    ("name", "families", "message"),
    [
        ("sdxl", [SD1, SD2], r"it is an SDXL base model.*sdxl_pretrain\.py.*Give an SD 1\.x base model or an SD 2\.x"),
        ("sd1", [SDXL], r"it is a Stable Diffusion 1 model.*fine_tune\.py.*Give an SDXL base model"),
        ("sd2_v", [SDXL], r"it is a Stable Diffusion 2 model.*fine_tune\.py.*Give an SDXL base model"),
        ("sd2_v", [SD1], r"it is a Stable Diffusion 2 model"),
    ],
)
def test_another_familys_model_is_named_with_the_script_that_takes_it(written, form, name, families, message):
    path, folder = written[name, form], written[name, "diffusers_safetensors"]
    with pytest.raises(InputError, match=rf"(?s){path}: {message}"):
        _load(path, folder, families)
    with pytest.raises(InputError, match=rf"(?s){path}: {message}"):
        if len(families) > 1:
            load_tokenizers(str(path), families)
        else:
            _load(path, folder, families[0])


def test_of_several_families_the_content_tells_which(written):
    for name, family in (("sd1", SD1), ("sd2_v", SD2)):
        folder = written[name, "diffusers_safetensors"]
        (tokenizer,) = load_tokenizers(str(folder), [SD1, SD2])
        assert tokenizer.pad_token_id == (tokenizer.eos_token_id if family is SD1 else 0)
        (tokenizer,) = load_tokenizers(str(written[name, "safetensors"]), [SD1, SD2], [str(folder)])
        assert tokenizer.pad_token_id == (tokenizer.eos_token_id if family is SD1 else 0)
    plain = written["sd1", "diffusers_safetensors"] / "tokenizer"  # pads with EOS; as SD 2.x's it pads with "!"
    model = load_model(str(written["sd2_v", "safetensors"]), [SD1, SD2], tokenizers=[str(plain)])
    assert (model.family, model.tokenizers[0].pad_token_id) == (SD2, 0)


def test_a_second_tokenizer_has_nothing_to_belong_to(written):
    folder = written["sd1", "diffusers_safetensors"]
    with pytest.raises(InputError, match=r"2 tokenizers are given, and an SD 1\.x model has 1 text encoder"):
        load_model(str(folder), SD1, tokenizers=(None, str(folder / "tokenizer")))


def test_an_inpainting_model_is_refused(sd1, tmp_path):
    unet = UNet(replace(sd1.unet.config, in_channels=9))
    folder = save_model(replace(sd1, unet=unet), tmp_path / "inpainting", "diffusers_safetensors")
    with pytest.raises(InputError, match=r"its U-Net takes 9 channels.*inpainting"):
        load_model(str(folder), SD1)


def test_a_vae_file_has_the_scaling_factor_of_the_family_it_is_given_to(written):
    vae = {k: v for k, v in load_file(written["sd1", "safetensors"]).items() if k.startswith("first_stage_model.")}
    path = written["sd1", "safetensors"].with_name("vae.safetensors")
    save_file(vae, path, {"sd_training.vae": read_metadata(written["sd1", "safetensors"])["sd_training.vae"]})
    factors = [load_vae(str(path), family, torch.float32).config.scaling_factor for family in (SD1, SD2, SDXL)]
    assert factors == [0.18215, 0.18215, 0.13025]


# Prediction type ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "architecture"), [("sd1", "stable-diffusion-v1"), ("sd2_v", "stable-diffusion-v2-768-v")]
)
def test_single_files_say_what_they_are_and_predict(written, sd2_v, tmp_path, name, architecture):
    metadata, tensors = read_metadata(written[name, "safetensors"]), load_file(written[name, "safetensors"])
    v = name == "sd2_v"
    assert metadata["modelspec.architecture"] == architecture
    assert metadata["modelspec.prediction_type"] == ("v" if v else "epsilon")
    assert ("v_pred" in tensors, "ztsnr" in tensors) == (v, False)
    scheduler = {**sd2_v.scheduler_config, "rescale_betas_zero_snr": True}
    file = save_model(replace(sd2_v, scheduler_config=scheduler), tmp_path / "zero", "safetensors")
    assert {"v_pred", "ztsnr"} <= load_file(file).keys()
    base = {**sd2_v.scheduler_config, "prediction_type": "epsilon"}
    file = save_model(replace(sd2_v, scheduler_config=base), tmp_path / "base", "safetensors")
    assert read_metadata(file)["modelspec.architecture"] == "stable-diffusion-v2-512"
    assert "v_pred" not in load_file(file)


@pytest.mark.parametrize(
    ("changed", "mark", "expected", "source"),
    [
        ({"modelspec.prediction_type": "v"}, False, "v_prediction", "modelspec.prediction_type in its metadata"),
        ({"modelspec.prediction_type": "epsilon"}, True, "epsilon", "modelspec.prediction_type in its metadata"),
        (
            {"sd_training.scheduler": '{"prediction_type": "v_prediction"}'},
            False,
            "v_prediction",
            "sd_training.scheduler in",
        ),
        ({}, True, "v_prediction", "the mark v_pred"),
        ({}, False, "epsilon", ""),
    ],
)
def test_the_order_in_which_a_file_is_believed(written, tmp_path, caplog, changed, mark, expected, source):
    file = written["sd1", "safetensors"]
    metadata = {k: v for k, v in read_metadata(file).items() if "prediction_type" not in k} | changed
    tensors = load_file(file) | ({"v_pred": torch.zeros(0)} if mark else {})
    save_file(tensors, tmp_path / "m.safetensors", metadata)
    model = _load(tmp_path / "m.safetensors", written["sd1", "diffusers_safetensors"])
    assert model.prediction_type == expected
    assert model.prediction_source.startswith(source) and bool(model.prediction_source) == bool(source)
    contradicted = mark and expected == "epsilon"
    assert ("modelspec" in caplog.text and "v_pred" in caplog.text) == contradicted


@pytest.mark.parametrize(("spread", "expected"), [(0.12, "v_prediction"), (0.05, "epsilon")])
def test_published_sd2_files_are_told_by_one_tensors_spread(spread, expected):
    from library.models.files.kept_prediction import scheduler_of

    bias = torch.randn(320, generator=torch.Generator().manual_seed(0))
    tensors = {
        "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias": bias / bias.std() * spread,
        "model.diffusion_model.input_blocks.0.0.weight": torch.zeros(320, 4, 3, 3),
    }
    config, source = scheduler_of(tensors, {}, SD2, "file")
    assert config["prediction_type"] == expected and "norm1.bias" in source
    config, source = scheduler_of(tensors, {"modelspec.prediction_type": "epsilon"}, SD2, "file")
    assert (config["prediction_type"], source.split()[0]) == ("epsilon", "modelspec.prediction_type")
    tensors["model.diffusion_model.input_blocks.0.0.weight"] = torch.zeros(320, 9, 3, 3)
    assert scheduler_of(tensors, {}, SD2, "file")[1] == ""
    assert scheduler_of(tensors, {}, SD1, "file")[1] == ""
