"""SDXL models on disk: what diffusers makes of ours, what we make of its, round trips, and what is refused."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from library.errors import InputError, TrainingError
from library.families import SDXL
from library.models.files import single_file
from library.models.files import write as checkpoint_write
from library.models.files.infer_configs import clip_config, unet_sizes, vae_config
from library.models.files.modelspec import modelspec, read_metadata
from library.models.files.read import load_model, load_vae
from library.models.files.weight_files import read_weights
from library.models.files.write import save_model, saved_bytes
from library.models.model import Model
from library.models.text import Tokens
from library.models.text_encoders import encode, tokenize
from library.models.unet import UNet, UNetConfig, size_embedding
from library.models.vae import decode_latents

CAPTIONS = ["a photo of a cat", "a red dog"]


@pytest.fixture(scope="module")
def folder(sdxl, tmp_path_factory) -> Path:
    return save_model(sdxl, tmp_path_factory.mktemp("diffusers") / "tiny", "diffusers_safetensors")


@pytest.fixture(scope="module")
def single(sdxl, tmp_path_factory) -> Path:
    return save_model(sdxl, tmp_path_factory.mktemp("single") / "tiny", "safetensors")


def _tokenizers(folder: Path) -> dict[str, tuple[str, str]]:
    return {"tokenizers": (str(folder / "tokenizer"), str(folder / "tokenizer_2"))}


def _parameters(model: Model) -> list[torch.nn.Parameter]:
    return [one for network in (model.unet, model.vae, *model.text_encoders) for one in network.parameters()]


def _state_dicts(model: Model) -> list[dict[str, torch.Tensor]]:
    return [network.state_dict() for network in (model.unet, model.vae, *model.text_encoders)]


def _assert_equal(first: Model, second: Model, dtype: torch.dtype = torch.float32) -> None:
    for name, ours, theirs in zip(
        ("unet", "vae", "text encoder 1", "text encoder 2"), _state_dicts(first), _state_dicts(second), strict=True
    ):
        assert ours.keys() == theirs.keys()
        for key, tensor in ours.items():
            assert torch.equal(tensor.to(dtype), theirs[key].to(dtype)), f"{name}.{key}"
    for ours, theirs in zip(first.tokenizers, second.tokenizers, strict=True):
        assert ours(CAPTIONS)["input_ids"] == theirs(CAPTIONS)["input_ids"]
        assert ours.pad_token_id == theirs.pad_token_id


@torch.no_grad()
def _assert_same_outputs(pipeline, model: Model) -> None:
    generator = torch.Generator().manual_seed(7)
    latents, times = torch.randn(2, 4, 16, 24, generator=generator), torch.tensor([3.0, 700.0])
    sizes = torch.tensor([[32, 48, 0, 0, 32, 48], [64, 64, 16, 8, 32, 48]], dtype=torch.float32)
    context, _, pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
    conditions = {"text_embeds": pooled, "time_ids": sizes}
    expected = pipeline.unet(latents, times, context, added_cond_kwargs=conditions).sample
    expected_pictures = pipeline.vae.decode(latents / pipeline.vae.config.scaling_factor).sample

    ids = [tokenize(tokenizer, CAPTIONS) for tokenizer in (model.tokenizers[0], model.tokenizers[1])]
    our_context, our_pooled = encode(model.text_encoders, Tokens(tuple(ids)), SDXL.uses(None))
    ours = model.unet(latents, times, our_context, torch.cat([our_pooled, size_embedding(sizes)], dim=1))
    for name, mine, theirs in (
        ("context", our_context, context),
        ("pooled", our_pooled, pooled),
        ("unet", ours, expected),
        ("vae", model.vae.decode(latents / model.vae.config.scaling_factor).sample, expected_pictures),
    ):
        assert (mine - theirs).abs().max() <= 1e-4 * theirs.abs().max(), name
        assert theirs.abs().max() > 1e-2, f"{name}: outputs near zero show nothing"
    shown = ((expected_pictures + 1) * 127.5).round().clamp(0, 255).permute(0, 2, 3, 1)
    assert (decode_latents(model.vae, latents).float() - shown).abs().max() <= 1


def _pipeline(folder: Path):
    from diffusers import StableDiffusionXLPipeline

    return StableDiffusionXLPipeline.from_pretrained(folder, local_files_only=True, add_watermarker=False)


@pytest.mark.parametrize("form", ["diffusers", "diffusers_safetensors"])
def test_diffusers_opens_our_folder_and_computes_the_same(sdxl, tmp_path, form):
    written = save_model(sdxl, tmp_path / "model", form)
    assert written == tmp_path / "model"
    endings = {path.suffix for path in written.rglob("*") if path.suffix in (".bin", ".safetensors")}
    assert endings == {".bin" if form == "diffusers" else ".safetensors"}
    _assert_same_outputs(_pipeline(written), sdxl)
    _assert_equal(load_model(str(written), SDXL), sdxl)


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
def test_diffusers_opens_our_single_file_and_computes_the_same(sdxl, folder, tmp_path, form):
    from diffusers import StableDiffusionXLPipeline

    written = save_model(sdxl, tmp_path / "model", form)
    assert written == tmp_path / f"model.{form}"
    pipeline = StableDiffusionXLPipeline.from_single_file(
        written, config=str(folder), local_files_only=True, add_watermarker=False
    )
    _assert_same_outputs(pipeline, sdxl)
    _assert_equal(load_model(str(written), SDXL, **_tokenizers(folder)), sdxl)


def test_a_loaded_model_computes_the_same_as_diffusers(folder, single):
    pipeline = _pipeline(folder)
    for model in (load_model(str(folder), SDXL), load_model(str(single), SDXL, **_tokenizers(folder))):
        _assert_same_outputs(pipeline, model)


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_what_was_rounded_once(sdxl, folder, tmp_path, form, dtype):
    written = save_model(sdxl, tmp_path / "half", form, dtype)
    again = load_model(str(written), SDXL, **_tokenizers(folder))
    assert {tensor.dtype for tensor in _parameters(again)} == {torch.float32}
    _assert_equal(again, sdxl, dtype)
    size = sum(path.stat().st_size for path in ([written] if written.is_file() else written.rglob("*.*")))
    numbers = sum(tensor.numel() for tensor in _parameters(sdxl))
    assert size < 3 * numbers


@pytest.mark.parametrize(
    "options",
    [{}, {"safe_serialization": False}, {"variant": "fp16"}, {"max_shard_size": "1MB"},
     {"max_shard_size": "1MB", "variant": "fp16"}],
)  # fmt: skip
def test_folders_that_diffusers_writes_are_read(sdxl, folder, tmp_path, options):
    _pipeline(folder).save_pretrained(tmp_path / "theirs", **options)
    if "max_shard_size" in options:
        assert len(list((tmp_path / "theirs" / "unet").glob("*-of-*"))) > 1
    _assert_equal(load_model(str(tmp_path / "theirs"), SDXL), sdxl)


def test_a_missing_shard_is_named(folder, tmp_path):
    _pipeline(folder).save_pretrained(tmp_path / "theirs", max_shard_size="1MB")
    shard = sorted((tmp_path / "theirs" / "unet").glob("*-00002-of-*"))[0]
    shard.unlink()
    with pytest.raises(InputError, match=shard.name):
        load_model(str(tmp_path / "theirs"), SDXL)


def test_the_dtype_asked_for_is_what_all_networks_have(folder):
    model = load_model(str(folder), SDXL, dtype=torch.bfloat16)
    assert {tensor.dtype for tensor in _parameters(model)} == {torch.bfloat16}
    assert not any(parameter.requires_grad for parameter in model.vae.parameters())
    assert all(parameter.requires_grad for parameter in model.unet.parameters())


def test_loading_leaves_nothing_mapped_to_the_file(sdxl, single, folder, tmp_path):
    copy = shutil.copy(single, tmp_path / "copy.safetensors")
    model = load_model(str(copy), SDXL, **_tokenizers(folder))
    with Path(copy).open("r+b") as file:
        file.write(b"\xff" * Path(copy).stat().st_size)
    _assert_equal(model, sdxl)


def test_what_older_files_carry_besides_the_networks_is_passed_over(sdxl, single, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    more = {
        "conditioner.embedders.0.transformer.text_model.embeddings.position_ids": torch.arange(77)[None],
        "conditioner.embedders.1.model.logit_scale": torch.tensor(4.6),
        "denoiser.sigmas": torch.zeros(1000),
        "model_ema.decay": torch.tensor(0.9),
    }
    save_file({**load_file(single), **more}, tmp_path / "old.safetensors", read_metadata(single))
    old = load_model(str(tmp_path / "old.safetensors"), SDXL, **_tokenizers(folder))
    _assert_equal(old, sdxl)
    again = load_file(save_model(old, tmp_path / "again", "safetensors"))
    assert again["conditioner.embedders.1.model.logit_scale"] == torch.tensor(4.6)  # belongs to the encoder's file
    assert again.keys() == {*load_file(single), "conditioner.embedders.1.model.logit_scale"}
    shutil.copytree(folder, tmp_path / "old")
    weights = tmp_path / "old" / "text_encoder" / "model.safetensors"
    state = {**load_file(weights), "text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(state, weights, {"format": "pt"})
    for name in ("tokenizer", "tokenizer_2"):  # published with vocab.json and merges.txt alone
        (tmp_path / "old" / name / "tokenizer.json").unlink()
    _assert_equal(load_model(str(tmp_path / "old"), SDXL), sdxl)


# Configurations from shapes ------------------------------------------------------------------------------------------


def test_configurations_of_the_published_sdxl_follow_from_its_shapes():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        assert UNetConfig(**unet_sizes(UNet(UNetConfig()).state_dict())) == UNetConfig()
        vae = AutoencoderKL(
            block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
            up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
        )  # fmt: skip
        found = vae_config(vae.state_dict(), 0.13025, 1024)
        assert found["block_out_channels"] == (128, 256, 512, 512)
        assert (found["layers_per_block"], found["latent_channels"], found["scaling_factor"]) == (2, 4, 0.13025)
        first = CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_hidden_layers=12, num_attention_heads=12)
        found = clip_config(CLIPTextModel(first).state_dict(), hidden_act="quick_gelu")
        assert (found["num_attention_heads"], found["num_hidden_layers"], found["vocab_size"]) == (12, 12, 49408)
        assert (found["intermediate_size"], found["max_position_embeddings"]) == (3072, 77)
        second = CLIPTextConfig(
            hidden_size=1280, intermediate_size=5120, num_hidden_layers=32, num_attention_heads=20, projection_dim=1280
        )
        state = CLIPTextModelWithProjection(second).state_dict()
        found = clip_config(state, hidden_act="gelu")
        assert (found["num_attention_heads"], found["num_hidden_layers"], found["projection_dim"]) == (20, 32, 1280)


def test_a_model_of_sdxls_size_has_the_published_files_tensors():
    from diffusers import AutoencoderKL
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    with torch.device("meta"):
        names = single_file.join(
            Model(
                SDXL,
                UNet(),
                AutoencoderKL(
                    block_out_channels=(128, 256, 512, 512), down_block_types=("DownEncoderBlock2D",) * 4,
                    up_block_types=("UpDecoderBlock2D",) * 4, layers_per_block=2,
                ),
                (
                    CLIPTextModel(CLIPTextConfig(hidden_size=768, num_hidden_layers=12)),
                    CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=1280, num_hidden_layers=32)),
                ),
                (),
                dict(SDXL.scheduler),
            )
        )  # fmt: skip
    # sd_xl_base_1.0.safetensors holds 2515; position_ids of CLIP-L and logit_scale of bigG are no parameters here.
    assert len(names) == 2515 - 2
    for name in (
        "model.diffusion_model.output_blocks.2.2.conv.weight",
        "model.diffusion_model.input_blocks.8.1.transformer_blocks.9.ff.net.0.proj.weight",
        "first_stage_model.decoder.up.3.upsample.conv.bias",
        "first_stage_model.encoder.mid.attn_1.proj_out.weight",
        "conditioner.embedders.0.transformer.text_model.encoder.layers.11.mlp.fc2.bias",
        "conditioner.embedders.1.model.transformer.resblocks.31.attn.in_proj_weight",
        "conditioner.embedders.1.model.text_projection",
    ):
        assert name in names


# VAE and tokenizers apart --------------------------------------------------------------------------------------------


def _as_file(state, path: Path, like: Path | None = None) -> str:
    """The tensors as a file, with the metadata of another that was written here."""
    from safetensors.torch import save_file

    metadata = read_metadata(like) if like else None
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, path, metadata)
    return str(path)


def test_the_vae_can_be_another_in_every_form(sdxl, folder, single, tmp_path):
    from diffusers import AutoencoderKL
    from safetensors.torch import load_file

    torch.manual_seed(11)
    other = AutoencoderKL.from_config(sdxl.vae.config)
    other.save_pretrained(tmp_path / "alone")
    save_model(Model(**{**vars(sdxl), "vae": other}), tmp_path / "whole", "safetensors")
    stability = {
        k: v for k, v in load_file(tmp_path / "whole.safetensors").items() if k.startswith("first_stage_model")
    }
    bare = {name.removeprefix("first_stage_model."): tensor for name, tensor in stability.items()}
    old = {
        name.replace(".to_q.", ".query.").replace(".to_k.", ".key.").replace(".to_v.", ".value.")
        .replace(".to_out.0.", ".proj_attn."): tensor
        for name, tensor in other.state_dict().items()
    }  # fmt: skip
    pipeline = save_model(Model(**{**vars(sdxl), "vae": other}), tmp_path / "pipeline", "diffusers")
    for source in (
        str(tmp_path / "alone"),
        str(pipeline),
        str(tmp_path / "whole.safetensors"),
        _as_file(stability, tmp_path / "a.safetensors", single),
        _as_file(bare, tmp_path / "b.safetensors", single),
        _as_file(other.state_dict(), tmp_path / "c.safetensors", single),
        _as_file(old, tmp_path / "d.safetensors", single),
    ):
        loaded = load_vae(source, SDXL, torch.float32).state_dict()
        assert loaded.keys() == other.state_dict().keys()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in other.state_dict().items()), source
    for model in (
        load_model(str(folder), SDXL, vae=str(tmp_path / "alone")),
        load_model(str(single), SDXL, vae=str(tmp_path / "alone"), **_tokenizers(folder)),
    ):
        assert torch.equal(model.vae.decoder.conv_in.weight, other.decoder.conv_in.weight)
        assert torch.equal(model.unet.state_dict()["out.2.weight"], sdxl.unet.state_dict()["out.2.weight"])


def test_a_plain_clip_tokenizer_given_for_the_second_encoder_pads_as_openclip(folder):
    model = load_model(str(folder), SDXL, tokenizers=(None, str(folder / "tokenizer")))
    assert model.tokenizers[0].pad_token_id == model.tokenizers[0].eos_token_id
    assert model.tokenizers[1].pad_token_id == 0


def test_a_tokenizer_of_another_model_is_refused(folder, tmp_path):
    shutil.copytree(folder / "tokenizer", tmp_path / "large")
    content = json.loads((tmp_path / "large" / "tokenizer.json").read_text())
    vocabulary = content["model"]["vocab"]
    vocabulary.update({f"more{number}": len(vocabulary) + number for number in range(50)})
    (tmp_path / "large" / "tokenizer.json").write_text(json.dumps(content))
    (tmp_path / "large" / "vocab.json").write_text(json.dumps(vocabulary))
    with pytest.raises(InputError, match="--tokenizer1_path"):
        load_model(str(folder), SDXL, tokenizers=(str(tmp_path / "large"),))


# Scheduler and metadata ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "diffusers"])
def test_prediction_type_and_scaling_factor_come_back(sdxl, folder, tmp_path, form):
    import copy

    vae = copy.deepcopy(sdxl.vae)
    vae.register_to_config(scaling_factor=0.5)
    scheduler = {**sdxl.scheduler_config, "prediction_type": "v_prediction", "rescale_betas_zero_snr": True}
    model = Model(**{**vars(sdxl), "vae": vae, "scheduler_config": scheduler})
    again = load_model(str(save_model(model, tmp_path / "v", form)), SDXL, **_tokenizers(folder))
    assert again.prediction_type == "v_prediction"
    assert again.scheduler_config["rescale_betas_zero_snr"] is True
    assert again.vae.config.scaling_factor == 0.5
    assert sdxl.prediction_type == "epsilon"


def test_the_fields_marks_of_v_prediction_are_understood(single, folder, tmp_path):
    from safetensors.torch import load_file, save_file

    tensors = {**load_file(single), "v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)}
    metadata = {key: value for key, value in read_metadata(single).items() if key != "modelspec.prediction_type"}
    save_file(tensors, tmp_path / "v.safetensors", metadata)
    model = load_model(str(tmp_path / "v.safetensors"), SDXL, **_tokenizers(folder))
    assert model.prediction_type == "v_prediction"
    assert model.scheduler_config["rescale_betas_zero_snr"] is True


def test_safetensors_carry_modelspec_metadata_with_the_hash_of_their_tensors(sdxl, tmp_path):
    import hashlib

    spec = modelspec(title="tiny", resolution_wh_px=(64, 96), prediction_type="epsilon", author="someone", license=None)
    path = save_model(sdxl, tmp_path / "tiny", "safetensors", metadata=spec)
    found = read_metadata(path)
    assert found["modelspec.sai_model_spec"] == "1.0.0"
    assert found["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert found["modelspec.implementation"].endswith("generative-models")
    assert (found["modelspec.title"], found["modelspec.resolution"]) == ("tiny", "64x96")
    assert (found["modelspec.prediction_type"], found["modelspec.author"]) == ("epsilon", "someone")
    assert "modelspec.license" not in found
    content = path.read_bytes()
    body = content[8 + int.from_bytes(content[:8], "little") :]
    assert found["modelspec.hash_sha256"] == "0x" + hashlib.sha256(body).hexdigest()


@pytest.mark.parametrize("form", ["safetensors", "diffusers_safetensors"])
def test_without_room_for_it_nothing_is_written_and_the_earlier_one_stays(sdxl, tmp_path, monkeypatch, form):
    written = save_model(sdxl, tmp_path / "model", form)
    size = sum(path.stat().st_size for path in tmp_path.rglob("*") if path.is_file())
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    assert size * 0.9 < saved_bytes(sdxl) <= size
    monkeypatch.setattr("shutil.disk_usage", lambda folder: SimpleNamespace(free=saved_bytes(sdxl)))
    with pytest.raises(
        TrainingError, match=rf"the checkpoint model needs \d+ bytes \([\d.]+ GB\), {saved_bytes(sdxl)}"
    ):
        save_model(sdxl, tmp_path / "model", form)
    assert written.exists() and {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before


def test_metadata_that_modelspec_does_not_know_is_refused():
    with pytest.raises(TypeError, match="colour"):
        modelspec(title="a", resolution_wh_px=(1, 1), prediction_type="v", colour="red")
    with pytest.raises(InputError, match="sample"):
        modelspec(title="a", resolution_wh_px=(1, 1), prediction_type="sample")


def test_what_is_written_can_be_read_by_whom_the_umask_lets(folder, single, tmp_path):
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    for path in (single, *(path for path in folder.rglob("*") if path.is_file())):
        assert path.stat().st_mode == mode, path


# Refusals ------------------------------------------------------------------------------------------------------------


class _Runs:
    """A pickle of this calls os.system when it is read by Python's own reader."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


@pytest.mark.parametrize("zipped", [True, False])
def test_a_pickle_that_would_run_code_is_refused_and_does_not_run(tmp_path, zipped):
    mark = tmp_path / "it-ran"
    path = tmp_path / "bad.ckpt"
    torch.save({"state_dict": _Runs(f"touch {mark}")}, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(InputError, match=r"bad\.ckpt: refused.*posix\.system"):
        load_model(str(path), SDXL)
    assert not mark.exists()
    path.write_bytes(pickle.dumps(_Runs(f"touch {mark}")))
    with pytest.raises(InputError, match=r"bad\.ckpt"):
        load_model(str(path), SDXL)
    assert not mark.exists()


@pytest.mark.parametrize("form", ["safetensors", "ckpt"])
@pytest.mark.parametrize("kept", [0, 5, 1000, -1])
def test_a_file_cut_off_is_refused(sdxl, tmp_path, form, kept):
    path = save_model(sdxl, tmp_path / "cut", form)
    content = path.read_bytes()
    path.write_bytes(content[: kept if kept >= 0 else len(content) - 100])
    with pytest.raises(InputError, match=r"damaged|cut off"):
        load_model(str(path), SDXL)


def _spoiled(single: Path, path: Path, change) -> str:
    from safetensors.torch import load_file, save_file

    tensors = load_file(single)
    change(tensors)
    save_file(tensors, path, read_metadata(single))
    return str(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("model.diffusion_model.time_embed.0.bias"), r"1 tensors are missing \(time_embed\.0\.bias\)"),
        (lambda t: t.update({"model.diffusion_model.new": torch.zeros(1)}), r"do not belong there \(new\)"),
        (lambda t: t.update({"strange.thing": torch.zeros(1)}), r"no part of SDXL \(strange\.thing\)"),
        (
            lambda t: t.update({"model.diffusion_model.time_embed.0.bias": torch.zeros(3)}),
            r"time_embed\.0\.bias: \(3,\) instead of \(256,\)",
        ),
        (lambda t: t.pop("conditioner.embedders.1.model.token_embedding.weight"), "text encoder 2 lacks"),
        (
            lambda t: [t.pop(name) for name in list(t) if name.startswith("first_stage_model.")],
            r"nothing under first_stage_model.*--vae",
        ),
    ],
)
def test_what_is_missing_or_too_much_is_listed(single, folder, tmp_path, change, message):
    path = _spoiled(single, tmp_path / "spoiled.safetensors", change)
    with pytest.raises(InputError, match=rf"(?s)spoiled\.safetensors.*{message}"):
        load_model(path, SDXL, **_tokenizers(folder))


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (["lora_unet_down_blocks_0.lora_down.weight", "lora_unet_down_blocks_0.alpha"], "a LoRA"),
        (["model.diffusion_model.out.2.weight", "cond_stage_model.transformer.text_model.x"], "Stable Diffusion 1"),
        (["model.diffusion_model.out.2.weight", "cond_stage_model.model.ln_final.weight"], "Stable Diffusion 2"),
        (["model.diffusion_model.out.2.weight", "conditioner.embedders.0.model.ln_final.weight"], "SDXL refiner"),
        (["first_stage_model.decoder.conv_in.weight"], "a VAE alone"),
        (["layers.0.weight"], "unknown kind"),
    ],
)
def test_another_kind_of_file_is_named(tmp_path, names, kind):
    path = _as_file({name: torch.zeros(1) for name in names}, tmp_path / "other.safetensors")
    with pytest.raises(InputError, match=rf"other\.safetensors.*{kind}"):
        load_model(path, SDXL)


def test_paths_that_hold_no_model_are_explained(single, folder, tmp_path):
    with pytest.raises(InputError, match="no such file or folder"):
        load_model(str(tmp_path / "nowhere"), SDXL)
    with pytest.raises(InputError, match=r"unet/config\.json.*tiny\.safetensors"):
        load_model(str(single.parent), SDXL)
    shutil.copytree(folder, tmp_path / "sd1")
    shutil.rmtree(tmp_path / "sd1" / "text_encoder_2")
    with pytest.raises(InputError, match=r"text_encoder_2/config\.json.*StableDiffusionXLPipeline"):
        load_model(str(tmp_path / "sd1"), SDXL)
    shutil.rmtree(tmp_path / "sd1")
    shutil.copytree(folder, tmp_path / "sd1")
    (tmp_path / "sd1" / "vae" / "diffusion_pytorch_model.safetensors").unlink()
    with pytest.raises(InputError, match="no weights there"):
        load_model(str(tmp_path / "sd1"), SDXL)
    with pytest.raises(InputError, match="--save_model_as"):
        save_model(load_model(str(folder), SDXL), tmp_path / "x", "onnx")


# Complete or absent --------------------------------------------------------------------------------------------------


def _tree(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_an_existing_model_stays_when_writing_fails_and_goes_when_it_succeeds(sdxl, tmp_path, form, monkeypatch):
    import copy

    save_model(sdxl, tmp_path / "last", form)
    before = _tree(tmp_path)
    changed = copy.deepcopy(sdxl)
    torch.nn.init.zeros_(changed.vae.decoder.conv_out.bias)

    def full(path: Path, *_):
        path.write_bytes(b"half of it")
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_write, "_write_safetensors", lambda tensors, path, *_: full(path))
        patch.setattr(checkpoint_write, "_write_pickle", lambda content, path: full(path))
        with pytest.raises(InputError, match=r"last.*No space left"):
            save_model(changed, tmp_path / "last", form)
        assert _tree(tmp_path) == before
        with pytest.raises(InputError, match="No space left"):
            save_model(changed, tmp_path / "new", form)
        assert _tree(tmp_path) == before
    save_model(changed, tmp_path / "last", form)
    after = _tree(tmp_path)
    assert after.keys() == before.keys()
    assert after != before


def test_what_a_killed_run_left_is_no_model_and_is_cleared_away(sdxl, tmp_path):
    (tmp_path / ".last.partial").mkdir()
    (tmp_path / ".last.partial" / "junk").write_text("x")
    save_model(sdxl, tmp_path / "last", "diffusers")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == ["last"]
    assert not (tmp_path / "last" / "junk").exists()


def test_a_file_in_the_way_of_a_folder_stays(sdxl, tmp_path):
    (tmp_path / "last").write_text("mine")
    with pytest.raises(InputError, match="in the way"):
        save_model(sdxl, tmp_path / "last", "diffusers")
    assert (tmp_path / "last").read_text() == "mine"


def test_weights_that_may_not_be_read_are_not_said_to_be_damaged(sdxl, tmp_path, monkeypatch):
    written = save_model(sdxl, tmp_path / "model", "safetensors")
    real = Path.open

    def refuse(self, *arguments, **more):
        if self == written:
            raise PermissionError(13, "Permission denied")
        return real(self, *arguments, **more)

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(InputError, match=r"model\.safetensors: cannot be read \(Permission denied\)"):
        read_weights(written)
