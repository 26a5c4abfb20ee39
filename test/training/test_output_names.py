"""What a run refuses to write: over what it reads, over what no run has written, two things under one name."""

import os
import shutil
from pathlib import Path

import pytest
from PIL import Image

import sdxl_pretrain
from library.errors import InputError
from library.models.files.own_checkpoint import MARK, is_own_checkpoint
from library.models.files.write import save_model
from library.own_folder import is_own
from library.training import output_names
from library.training.due import loop_options
from library.training.inputs import input_paths
from library.training.output_names import check_written_names
from library.training.state.names import step_name


@pytest.fixture
def place(tmp_path):
    """A data set, a base model in both forms, and an output folder, all in one folder."""
    for folder in ("data", "base", "tokenizer", "out"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "model_index.json").write_text("{}")
    (tmp_path / "base.safetensors").write_bytes(b"weights")
    (tmp_path / "prompts.txt").write_text("a cat\n")
    (tmp_path / "captions.json").write_text("{}")
    return tmp_path


def check(place, *arguments, data="data", model="base", out="out"):
    command = [
        f"--pretrained_model_name_or_path={place / model}", f"--train_data_dir={place / data}",
        f"--output_dir={place / out}", "--max_train_steps=10", "--resolution=64", *arguments,
    ]  # fmt: skip
    return check_written_names(sdxl_pretrain.SCRIPT.options(command))


def refused(place, *arguments, **more):
    """The error's text; nothing has been changed."""
    before = sorted(place.rglob("*"))
    with pytest.raises(InputError) as error:
        check(place, *arguments, **more)
    assert sorted(place.rglob("*")) == before
    return str(error.value)


AS_FOLDER, AS_FILE = "--save_model_as=diffusers", "--save_model_as=safetensors"

INPUTS = {  # what lies in the output folder, the flag that names it, the other flags, what is said
    "the data": ("dogs", "train_data_dir", (AS_FOLDER, "--output_name=dogs"), "is {}, where this run writes the final"),
    "data in a checkpoint": ("dogs/a/b", "train_data_dir", (AS_FOLDER, "--output_name=dogs"), "lies in {}, where"),
    "data of an average": ("last-ema", "train_data_dir", (AS_FOLDER, "--use_ema"), "the final checkpoint of the"),
    "data among pictures": ("sample", "train_data_dir", ("--sample_prompts={prompts}",), "the sample pictures"),
    "data of a later step": (
        "at-step00000006", "train_data_dir", (AS_FOLDER, "--save_every_n_steps=3"), "writes a checkpoint"
    ),
    "regularisation images": ("epoch-000002", "reg_data_dir", (AS_FOLDER, "--save_every_n_epochs=2"), "--reg_data_dir"),
    "the base model": ("m.safetensors", "pretrained_model_name_or_path", (AS_FILE, "--output_name=m"), "the final"),
    "the VAE": ("last/vae", "vae", (AS_FOLDER,), "--vae"),
    "a tokenizer": ("last/tokenizer", "tokenizer1_path", (AS_FOLDER,), "--tokenizer1_path"),
    "captions": ("at-step00000004-state/c.json", "in_json", (), "--in_json"),
    "prompts": ("metrics.jsonl", "sample_prompts", (), "the metrics"),
    "prompts called as figures are": ("x.log", "sample_prompts", ("--case_name=x",), "the run's figures"),
    "data being written": (".last.partial", "train_data_dir", (AS_FOLDER,), "the final checkpoint"),
}  # fmt: skip


def test_prompts_may_stand_beside_their_pictures_as_other_programs_put_them(place):
    prompts = put(place, "sample/prompt.txt", "sample_prompts")
    assert check(place, f"--sample_prompts={prompts}") == []


def put(place, name, flag, content=b"a cat\n"):
    """An input in the output folder."""
    path = place / "out" / name
    if flag in ("in_json", "sample_prompts") or path.suffix == ".safetensors":
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    else:
        path.mkdir(parents=True)
    return path


@pytest.mark.parametrize("kind", INPUTS)
@pytest.mark.parametrize("spelling", ["plain", "relative", "through a link"])
def test_what_is_read_is_not_written_over(place, monkeypatch, kind, spelling):
    name, flag, flags, said = INPUTS[kind]
    path = put(place, name, flag)
    if spelling == "relative":
        monkeypatch.chdir(place / "base")
        path = Path(os.path.relpath(path.parent)) / ".." / path.parent.name / path.name
    elif spelling == "through a link":
        (place / "link").symlink_to(path)
        path = place / "link"
    flags = [one.format(prompts=place / "prompts.txt") for one in flags]
    error = refused(place, *flags, f"--{flag}={path}")
    top = place / "out" / name.split("/")[0]
    assert said.format(top) in error and str(path) in error and ("choose another" in error or "move it" in error)


def test_what_a_link_in_the_output_folder_leads_to_is_not_written_over(place):
    (place / "out" / "sample").symlink_to(place / "data")
    sampling = f"--sample_prompts={place / 'prompts.txt'}"
    assert "sample leads to --train_data_dir" in refused(place, sampling)
    assert check(place) == []  # no pictures, no harm
    (place / "out" / "sample").unlink()
    (place / "elsewhere").mkdir()
    (place / "out" / "sample").symlink_to(place / "elsewhere")
    assert check(place, sampling) == []
    os.link(place / "base.safetensors", place / "out" / "last.safetensors")
    assert "last.safetensors leads to --pretrained" in refused(place, model="base.safetensors")


@pytest.mark.parametrize("link", ["unet", "unet/model.safetensors", "model_index.json"])
def test_what_links_in_the_model_lead_to_is_not_written_over(place, link):
    """Not of a link to where a user keeps his runs, which no model is read from."""
    written = place / "out" / "last" / link
    written.parent.mkdir(parents=True)
    written.write_bytes(b"")
    model = place / "m3"
    model.mkdir()
    (model / "runs").symlink_to(place / "out")
    (model / link).parent.mkdir(exist_ok=True)
    (model / link).symlink_to(written)
    said = f"{model / link} lies in {place / 'out' / 'last'}, where this run writes the final checkpoint"
    assert said in refused(place, AS_FOLDER, model="m3")
    assert check(place, AS_FOLDER, "--output_name=other", model="m3") == []


def test_a_name_of_other_case_is_the_same_where_the_file_system_says_so(place, monkeypatch):
    (place / "out" / "Dogs").mkdir()
    named = (AS_FOLDER, "--output_name=dogs")
    assert check(place, *named, data="out/Dogs") == []
    monkeypatch.setattr(output_names, "_ignores_case", lambda folder: True)
    assert "is {}, where".format(place / "out" / "Dogs") in refused(place, *named, data="out/Dogs")
    monkeypatch.undo()
    same = output_names._identity
    monkeypatch.setattr(output_names, "_identity", lambda path: same(Path(str(path).replace("dOGS", "Dogs"))))
    assert output_names._ignores_case(place / "out")


@pytest.mark.parametrize("model", ["base", "base.safetensors"])
def test_the_output_folder_may_lie_in_the_data_but_not_be_it_or_lie_in_the_model(place, model):
    assert check(place, out="data/out", model=model) == []
    assert "is the folder of --train_data_dir" in refused(place, out="data", model=model)
    (place / "link").symlink_to(place / "data")
    assert "is the folder of --train_data_dir" in refused(place, out="link", model=model)
    if model == "base":
        assert "lies in --pretrained_model_name_or_path" in refused(place, out="base/out")


NAMES = {
    "pictures": ("--output_name=sample", AS_FOLDER, "--sample_prompts={prompts}"),
    "metrics": ("--output_name=metrics.jsonl", AS_FOLDER),
    "abandoned": ("--output_name=abandoned", AS_FOLDER),
    "lock": ("--output_name=.lock", AS_FOLDER),
    "TensorBoard": ("--output_name=logs", AS_FOLDER, "--logging_dir={logs}"),
    "the launcher's log": ("--case_name=train_0",),
}


@pytest.mark.parametrize("kind", NAMES)
def test_two_things_do_not_get_one_name(place, monkeypatch, kind):
    monkeypatch.setenv("WORKER_LOG", str(place / "out" / "train_0"))
    arguments = [one.format(prompts=place / "prompts.txt", logs=place / "out" / "logs") for one in NAMES[kind]]
    error = refused(place, *arguments)
    assert "the run would write both" in error and arguments[0].split("=")[0] in error


def test_a_name_that_is_too_long_with_what_is_added_is_refused_in_bytes(place):
    assert "bytes longer than file systems take" in refused(place, f"--output_name={'犬' * 80}")
    assert check(place, f"--output_name={'d' * 150}") == []


def test_a_thing_of_the_wrong_kind_is_found_before_training(place):
    out = place / "out"
    for name, is_folder, arguments in (
        ("last.safetensors", True, (AS_FILE,)),
        ("at-step00000004.safetensors", True, (AS_FILE, "--save_every_n_steps=2")),
        ("last", False, (AS_FOLDER,)),
        ("metrics.jsonl", True, ()),
        ("x.log", True, ("--case_name=x",)),
        ("run.config.toml", True, ()),
        ("last-state", False, ("--save_state",)),
        ("sample", False, (f"--sample_prompts={place / 'prompts.txt'}",)),
        ("abandoned", False, ()),
    ):
        (out / name).mkdir() if is_folder else (out / name).touch()
        kind = "a folder" if is_folder else "a file"
        assert f"{out / name} is {kind}, and this run writes" in refused(place, *arguments)
        (out / name).rmdir() if is_folder else (out / name).unlink()
    (out / "at-step00000005.safetensors").mkdir()  # of no step that is saved
    assert check(place, AS_FILE, "--save_every_n_steps=2") == []
    out.rmdir() if not list(out.iterdir()) else shutil.rmtree(out)
    out.touch()
    assert "is no folder" in refused(place)


def test_what_no_run_has_written_is_refused_and_what_one_has_is_named(place, sdxl):
    out = place / "out"
    written = save_model(sdxl, out / "dogs", "diffusers_safetensors")
    named = ("--output_name=dogs", AS_FOLDER, "--case_name=x")
    assert check(place, *named) == []  # it will be moved aside
    (out / "x.log").write_text("Network = SDXL\n")
    assert check(place, *named, "--resume=auto") == [out / "dogs", out / "x.log"]
    (written / "unet" / "notes.txt").write_text("mine")
    assert f"{out / 'dogs'} holds unet/notes.txt, which no run has written" in refused(place, *named)
    (written / "unet" / "notes.txt").unlink()
    (written / "model_index.json").write_text("{}")
    assert "dogs holds model_index.json, which no run" in refused(place, *named)
    shutil.rmtree(written)
    shutil.copytree(place / "base", written)
    assert f"{out / 'dogs'} was not written by a run" in refused(place, *named)
    (out / "x.log").write_text("Dear diary\n")
    assert "x.log was not written by a run" in refused(place, "--case_name=x")
    (out / "run.config.toml").write_text("seed = 1\n")
    assert "run.config.toml was not written by a run" in refused(place)
    shutil.copy(place / "base.safetensors", out / "last.safetensors")
    (out / "run.config.toml").unlink()
    assert "last.safetensors was not written by a run" in refused(place, AS_FILE)


def test_a_run_goes_on_beside_checkpoints_that_it_does_not_write_again(place, sdxl):
    """A file of the user's in one of them, or a link to where it was moved, is in no way of a run that goes on."""
    out, saving = place / "out", (AS_FOLDER, "--save_every_n_steps=2")
    written = save_model(sdxl, out / "at-step00000002", "diffusers")
    (written / "README.md").write_text("mine")
    (out / "at-step00000004").symlink_to(place / "tokenizer")
    assert check(place, *saving, "--resume=auto") == []
    assert "at-step00000002 holds README.md, which no run" in refused(place, *saving)
    shutil.copytree(written, out / "last")  # the end of the run replaces it
    assert "last holds README.md, which no run" in refused(place, *saving, "--resume=auto")


@pytest.mark.parametrize("form", ["safetensors", "ckpt", "diffusers", "diffusers_safetensors"])
def test_a_checkpoint_is_known_as_its_own_also_when_moved_and_no_other_is(sdxl, tmp_path, form):
    written = save_model(sdxl, tmp_path / "model", form)
    assert is_own_checkpoint(written)
    moved = written.rename(tmp_path / ("elsewhere" + written.suffix))
    assert is_own_checkpoint(moved)
    (tmp_path / "link").symlink_to(moved)
    assert not is_own_checkpoint(tmp_path / "link")
    if moved.is_dir():
        (moved / "mine.txt").touch()
    else:
        moved.write_bytes(moved.read_bytes().replace(MARK.encode(), b"x" * len(MARK)))
    assert not is_own_checkpoint(moved)


def test_a_folder_that_is_replaced_keeps_what_no_run_has_written(sdxl, tmp_path, caplog):
    written = save_model(sdxl, tmp_path / "last", "diffusers")
    (written / "vae" / "mine.txt").write_text("mine")
    save_model(sdxl, tmp_path / "last", "diffusers")
    assert (tmp_path / "last.kept" / "vae" / "mine.txt").read_text() == "mine"
    assert is_own(tmp_path / "last") and "kept as" in caplog.text
    save_model(sdxl, tmp_path / "last", "diffusers")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last", "last.kept"]


@pytest.mark.parametrize("form", ["safetensors", "diffusers"])
def test_retention_removes_checkpoints_of_runs_alone(place, sdxl, form, caplog, monkeypatch):
    """Not the user's, by whatever name; not what the run reads; not one with something of the user's in it."""
    monkeypatch.setenv("HOME", str(place))
    out = place / "out"
    written = {step: save_model(sdxl, out / step_name("m", step), form) for step in (1, 2, 3, 9)}
    ending = written[1].suffix
    user = out / f"m-step00000004{ending}"
    user.mkdir()
    (out / f"m-step5{ending}").mkdir()  # named alike, by no run
    if not ending:
        (written[3] / "mine.txt").touch()
    options = sdxl_pretrain.SCRIPT.options(
        [
            f"--pretrained_model_name_or_path=~/out/{written[2].name}", f"--train_data_dir={place / 'data'}",
            f"--output_dir={out}", "--output_name=m", "--save_every_n_steps=1", "--save_last_n_steps=1",
            "--resolution=64",
        ]
    )  # fmt: skip
    data = type("Data", (), {"global_batch": 1, "samples": 1, "left_out": ()})()
    loop_options(options, data, 10).forget_checkpoints(written[9], step_name("m", 9))
    kept = {step for step, path in written.items() if path.exists()}
    assert kept == ({2, 9} if ending else {2, 3, 9})
    assert user.exists() and (out / f"m-step5{ending}").exists()
    assert f"{user}: not removed" in caplog.text


def test_sample_pictures_in_the_data_are_no_data(train, tmp_path, capfd):
    """Not where the output folder lies in the data, and not where a link in the data leads to it."""
    data, outside = tmp_path / "data", tmp_path / "outside"
    data.mkdir()
    for number in range(4):
        Image.new("RGB", (64, 64), (60 * number, 0, 0)).save(data / f"{number}.png")
        (data / f"{number}.txt").write_text("a cat")
    (data / "link").symlink_to(outside)
    for out in (data / "out", outside):
        (out / "sample").mkdir(parents=True)
        Image.new("RGB", (64, 64)).save(out / "sample" / "picture.png")
        arguments = ("--gradient_accumulation_steps=1", "--max_train_steps=2", "--lr_warmup_steps=0", "--dry_run")
        if out == outside:
            shutil.rmtree(data / "out")
        assert train(out, *arguments, data=data) == 0
        assert "num examples: 4" in capfd.readouterr().err


def test_a_run_refuses_before_it_loads_and_leaves_all_as_it_was(train, tmp_path, small_shard, capfd):
    out = tmp_path / "out"
    shutil.copytree(small_shard, out / "dogs")
    before = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert train(out, AS_FOLDER, "--output_name=dogs", data=out / "dogs") == 2
    assert {path: path.read_bytes() for path in out.rglob("*") if path.is_file()} == before
    assert f"error: --train_data_dir {out / 'dogs'} is {out / 'dogs'}, where this run" in capfd.readouterr().err


def test_what_a_killed_run_was_writing_goes_and_the_checkpoint_that_it_replaced_comes_back(train, tmp_path, sdxl):
    """Of this run's checkpoints; what is called alike, and is none of them, stays."""
    out = tmp_path / "out"
    out.mkdir()
    save_model(sdxl, out / "last", "diffusers").rename(out / ".last.previous")
    (out / ".at-step00000002.partial").mkdir()
    (out / ".at-step00000002.partial" / "junk").touch()
    for name in (".dogs.partial", ".at-step00000003.partial"):
        (out / name).mkdir()
    arguments = (AS_FOLDER, "--save_every_n_steps=2", "--max_train_steps=2", "--lr_warmup_steps=0")
    assert train(out, *arguments, "--gradient_accumulation_steps=1") == 0
    assert not (out / ".last.previous").exists() and not (out / ".at-step00000002.partial").exists()
    assert (out / ".dogs.partial").is_dir() and (out / ".at-step00000003.partial").is_dir()
    assert is_own_checkpoint(out / "abandoned" / "before-attempt-1" / "last")


def test_a_tilde_that_no_shell_has_seen_is_the_home_folder(place, monkeypatch):
    monkeypatch.setenv("HOME", str(place))
    options = sdxl_pretrain.SCRIPT.options(
        [
            "--pretrained_model_name_or_path=~/base.safetensors", "--train_data_dir=~/data", "--output_dir=~/out",
            "--logging_dir=~/logs", "--resolution=64", "--output_name=base",
        ]
    )  # fmt: skip
    assert options.saving.output_dir == place / "out" and options.logs.logging_dir == place / "logs"
    assert options.data.subsets[0].train_data_dir == place / "data"
    (place / "base.safetensors").rename(place / "out" / "base.safetensors")
    (place / "base.safetensors").symlink_to(place / "out" / "base.safetensors")
    with pytest.raises(InputError, match=r"where this run writes the final checkpoint"):
        check_written_names(options)


def test_what_a_run_reads_is_what_its_flags_name_as_paths_for_every_subset(place, monkeypatch):
    """Not the output folder, and no text that happens to be the name of a file here."""
    monkeypatch.setenv("HOME", str(place))
    monkeypatch.chdir(place)
    (place / "more").mkdir()
    (place / "sets.toml").write_text(
        "[[datasets]]\nresolution = 64\n[[datasets.subsets]]\nimage_dir = '~/data'\n[[datasets.subsets]]\n"
        "image_dir = '~/more'\n"
    )
    options = sdxl_pretrain.SCRIPT.options(
        [
            "--pretrained_model_name_or_path=~/base.safetensors", "--dataset_config=~/sets.toml", "--vae=base",
            "--output_dir=out", "--output_name=tokenizer", "--sample_prompts=~/prompts.txt",
        ]
    )  # fmt: skip
    found = {path.resolve() for path in input_paths(options)}
    names = ("base.safetensors", "sets.toml", "data", "more", "base", "prompts.txt")
    assert found == {place / name for name in names}
