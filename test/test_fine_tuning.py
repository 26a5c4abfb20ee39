"""sdxl_train.py and fine_tune.py: each family trains whole, its checkpoint is what diffusers opens; rates by block."""

import json

import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors.torch import load_file

import fine_tune
import sdxl_train
from library.errors import InputError
from library.families import SD1, SD2, SDXL
from library.models.files.layout import read_layout
from library.models.files.modelspec import modelspec
from library.models.files.read import load_model
from library.models.files.write import save_model
from library.training.recipes.full import block_groups

SCRIPTS = {"sd1": fine_tune, "sd2_v": fine_tune, "sdxl": sdxl_train}
VALIDATION = "loss/validation/step_average"
FAMILIES = {"sd1": SD1, "sd2_v": SD2, "sdxl": SDXL}


@pytest.fixture(scope="module")
def folders(sd1, sd2_v, sdxl, tmp_path_factory):
    """Each family's tiny model as a diffusers folder."""
    base = tmp_path_factory.mktemp("models")
    found = {}
    for name, model in (("sd1", sd1), ("sd2_v", sd2_v), ("sdxl", sdxl)):
        metadata = modelspec(title=name, resolution_wh_px=(64, 64), prediction_type=model.prediction_type)
        found[name] = save_model(model, base / name, "diffusers_safetensors", None, metadata)
    return found


@pytest.fixture
def fine_tuned(folders, small_shard, tmp_path):
    """Runs a family's script in this process; returns its status and output folder."""

    def run(name, *arguments, out="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        status = SCRIPTS[name].main(
            [
                f"--pretrained_model_name_or_path={folders[name]}", f"--train_data_dir={small_shard}",
                "--resolution=64", "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128",
                "--bucket_reso_steps=16", "--caption_extension=.txt", f"--output_dir={tmp_path / out}",
                "--max_data_loader_n_workers=0", "--seed=1", "--train_batch_size=4", *arguments,
            ]
        )  # fmt: skip
        return status, tmp_path / out

    return run


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.parametrize("name", ["sd1", "sd2_v", "sdxl"])
def test_each_family_trains_and_diffusers_opens_its_checkpoint(fine_tuned, folders, name):
    previews = ("--sample_at_first", f"--sample_prompts={prompts(folders)}")
    measured = ("--validation_split=0.25", "--validate_every_n_steps=8")
    training = ("--max_train_steps=24", "--learning_rate=3e-3", "--train_text_encoder")
    status, out = fine_tuned(name, *training, *previews, *measured)
    assert status == 0
    losses = [line[VALIDATION] for line in metrics(out) if VALIDATION in line]
    assert len(losses) == 3 and losses[2] < losses[0]  # at fixed timesteps and noise
    assert len(list((out / "sample").glob("*.png"))) == 1
    pipeline_class = StableDiffusionXLPipeline if name == "sdxl" else StableDiffusionPipeline
    pipeline = pipeline_class.from_pretrained(out / "last", local_files_only=True)
    ours = load_model(str(out / "last"), FAMILIES[name])
    before = load_model(str(folders[name]), FAMILIES[name])
    assert pipeline.scheduler.config.prediction_type == ours.prediction_type == before.prediction_type
    for encoder, old in zip(ours.text_encoders, before.text_encoders, strict=True):
        assert not torch.equal(encoder.get_input_embeddings().weight, old.get_input_embeddings().weight)
    with torch.no_grad():
        ids = pipeline.tokenizer(["a cat"], padding="max_length", return_tensors="pt").input_ids
        hidden = pipeline.text_encoder(ids).last_hidden_state
        width = ours.unet.config.context_dim
        context = torch.nn.functional.pad(hidden, (0, width - hidden.shape[-1]))
        latents, t = torch.randn(1, 4, 16, 16), torch.tensor([500])
        added = {}
        vector = None
        if name == "sdxl":
            pooled, sizes = torch.randn(1, 128), torch.tensor([[64.0, 64, 0, 0, 64, 64]])
            added = {"added_cond_kwargs": {"text_embeds": pooled, "time_ids": sizes}}
            vector = SDXL.vector(pooled, sizes)
        theirs = pipeline.unet(latents, t, context, **added).sample
        assert (ours.unet(latents, t, context, vector) - theirs).abs().max() < 1e-4 * theirs.abs().max()


def prompts(folders):
    """A prompt file with one small picture."""
    path = folders["sd1"].parent / "prompts.txt"
    path.write_text("a red cat --w 64 --h 64 --s 2 --d 1\n")
    return path


def test_an_sdxl_model_is_refused_by_the_older_families_script_and_the_other_way_round(fine_tuned, folders, capfd):
    for script, other in ((fine_tune, "sdxl"), (sdxl_train, "sd1")):
        AcceleratorState._reset_state(reset_partial_state=True)
        flags = [f"--train_data_dir={folders['sd1'].parent}", "--resolution=64", "--output_dir=/nonexistent/x"]
        assert script.main([f"--pretrained_model_name_or_path={folders[other]}", *flags, "--dry_run"]) == 2
    capfd.readouterr()
    status, _ = fine_tuned("sd1", "--max_train_steps=1", f"--pretrained_model_name_or_path={folders['sdxl']}")
    assert status == 2
    assert "SDXL" in capfd.readouterr().err


def test_clip_skip_trains_what_it_conditions_on_and_freezes_the_rest(fine_tuned, folders):
    status, out = fine_tuned(
        "sd1", "--max_train_steps=2", "--learning_rate=1e-2", "--clip_skip=2", "--train_text_encoder"
    )
    assert status == 0
    ours, before = (load_model(str(path), SD1).text_encoders[0].state_dict() for path in (out / "last", folders["sd1"]))
    changed = {key for key in before if not torch.equal(ours[key], before[key])}
    assert any(".layers.1." in key for key in changed) and "final_layer_norm.weight" in " ".join(changed)
    assert not any(".layers.2." in key for key in changed)


def test_v2_is_checked_against_the_file(fine_tuned, capfd):
    status, _ = fine_tuned("sd1", "--max_train_steps=1", "--v2")
    assert status == 2
    assert "--v2" in capfd.readouterr().err


def test_a_resume_with_another_layer_is_refused(fine_tuned, capfd):
    steps = ("--max_train_steps=2", "--save_state_on_train_end")
    assert fine_tuned("sd1", *steps)[0] == 0
    assert fine_tuned("sd1", "--max_train_steps=3", "--resume=auto", "--clip_skip=2")[0] == 2
    assert "what is learned differs" in capfd.readouterr().err


def test_blocks_have_rates_of_their_own_and_rate_0_freezes(sdxl, fine_tuned, folders):
    """Against a count by hand: the tiny U-Net has 6 input blocks, 3 layers in the middle, 6 output blocks."""
    count = 2 + len(sdxl.unet.input_blocks) + 3 + len(sdxl.unet.output_blocks)
    rates = ["0"] * count
    rates[0], rates[2], rates[-1] = "1e-3", "2e-3", "3e-3"
    status, out = fine_tuned(
        "sdxl", "--max_train_steps=1", f"--block_lr={','.join(rates)}", "--save_model_as=safetensors"
    )
    assert status == 0
    (line,) = metrics(out)
    assert line["lr"] == {
        "unet_block00": 1e-3, "unet_block02": 2e-3, f"unet_block{count - 1:02d}": 3e-3,
    }  # fmt: skip
    after = load_file(out / "last.safetensors")
    before = load_model(str(folders["sdxl"]), SDXL).unet.state_dict()
    prefix = "model.diffusion_model."
    changed = {
        key.split(".")[0] + "." + key.split(".")[1]
        for key in before
        if not torch.equal(after[prefix + key], before[key])
    }
    assert {name.split(".")[0] for name in changed} == {"time_embed", "label_emb", "input_blocks", "out"}
    assert {name for name in changed if name.startswith("input_blocks")} == {"input_blocks.1"}


def test_as_many_rates_as_blocks_or_one(sdxl):
    with pytest.raises(InputError, match="--block_lr has 2 rates"):
        block_groups(sdxl.unet, [1e-3, 1e-3])
    groups = block_groups(sdxl.unet, [1e-3])
    assert [group.name for group in groups] == ["unet"]  # as without the flag, so that states fit
    assert len(groups[0].parameters) == len(list(sdxl.unet.parameters()))
    assert block_groups(sdxl.unet, ()) == []


def test_full_bf16_writes_frozen_layers_as_they_were(fine_tuned, folders):
    """The layer that --clip_skip leaves out lies beside layers that train in bf16: it was rounded with them."""
    bf16 = ("--full_bf16", "--mixed_precision=bf16")
    status, out = fine_tuned("sd1", "--max_train_steps=1", "--clip_skip=2", "--train_text_encoder", *bf16)
    assert status == 0
    ours, before = (load_model(str(path), SD1).text_encoders[0].state_dict() for path in (out / "last", folders["sd1"]))
    for name, old in before.items():
        if ".layers.2." in name:
            assert torch.equal(ours[name], old), name
            assert (
                not old.any()
                or name.endswith(("bias", "norm1.weight", "norm2.weight"))
                or not torch.equal(old, old.bfloat16().float())
            )
        else:
            assert torch.equal(ours[name], ours[name].bfloat16().float()), name


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_full_bf16_writes_frozen_blocks_as_they_were(sdxl, fine_tuned, folders, form):
    rates = ["0"] * (1 + len(sdxl.unet.input_blocks) + 3 + len(sdxl.unet.output_blocks)) + ["1e-3"]
    bf16 = ("--full_bf16", "--mixed_precision=bf16", f"--save_model_as={form}")
    status, out = fine_tuned("sdxl", "--max_train_steps=1", f"--block_lr={','.join(rates)}", *bf16)
    assert status == 0
    path = out / ("last.safetensors" if form == "safetensors" else "last")
    tokenizers = (str(folders["sdxl"] / "tokenizer"), str(folders["sdxl"] / "tokenizer_2"))
    ours = load_model(str(path), SDXL, tokenizers=tokenizers).unet.state_dict()
    before = load_model(str(folders["sdxl"]), SDXL).unet.state_dict()
    assert {name for name in before if not torch.equal(ours[name], before[name])} == {
        "out.0.weight", "out.0.bias", "out.2.weight", "out.2.bias",
    }  # fmt: skip
    assert torch.equal(ours["out.2.weight"], ours["out.2.weight"].bfloat16().float())


@pytest.mark.parametrize("given", ["x", "1e-3,", "-1", "0,0"])
def test_rates_that_are_none_are_refused_before_anything_loads(fine_tuned, capfd, given):
    assert fine_tuned("sdxl", "--max_train_steps=1", f"--block_lr={given}")[0] == 2
    assert "--block_lr" in capfd.readouterr().err


@pytest.mark.parametrize("form", ["diffusers_safetensors", "safetensors"])
@pytest.mark.parametrize("name", ["sd1", "sd2_v", "sdxl"])
def test_what_is_not_for_the_model_is_said_before_the_data_are_looked_at(request, folders, tmp_path, capfd, name, form):
    """The data folder is empty, which is an error as soon as it is indexed."""
    model = request.getfixturevalue(name)
    (tmp_path / "empty").mkdir()
    path = folders[name]
    if form == "safetensors":
        metadata = modelspec(title=name, resolution_wh_px=(64, 64), prediction_type=model.prediction_type)
        path = save_model(model, tmp_path / name, form, None, metadata)
    layout, unet = read_layout(str(path), [FAMILIES[name]]), model.unet
    blocks = 2 + len(unet.input_blocks) + len(unet.middle_block) + len(unet.output_blocks)
    layers = [len(encoder.text_model.encoder.layers) if hasattr(encoder, "text_model") else len(encoder.encoder.layers)
              for encoder in model.text_encoders]  # fmt: skip
    assert layout.family is FAMILIES[name] and layout.unet_blocks == blocks
    assert all(0 <= counted - used <= 1 for counted, used in zip(layout.encoder_layers, layers, strict=True))
    wrong = {"sd1": ["--v2", "--clip_skip=9"], "sd2_v": ["--clip_skip=99"], "sdxl": [f"--block_lr={'1e-5,' * blocks}1"]}
    AcceleratorState._reset_state(reset_partial_state=True)
    status = SCRIPTS[name].main(
        [f"--pretrained_model_name_or_path={path}", f"--train_data_dir={tmp_path / 'empty'}", "--resolution=64",
         f"--output_dir={tmp_path / 'out'}", *wrong[name]]
    )  # fmt: skip
    said = [line for line in capfd.readouterr().err.splitlines() if line.startswith("error: ")]
    assert status == 2 and len(said) == len(wrong[name])
    assert all(word.partition("=")[0] in line for word, line in zip(wrong[name], said, strict=True))
