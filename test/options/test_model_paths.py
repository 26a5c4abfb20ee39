"""Models that are not there, or are something else, are told before anything is imported; all of them at once."""

import re
import subprocess
import sys
from pathlib import Path

import pytest
from safetensors.torch import save

import fine_tune
import sdxl_pretrain
from library.options.named_paths import problems_of_paths
from library.options.parse import make_options, parse
from library.options.values import values_of

ROOT = Path(__file__).parents[2]


def problems(model, *words, script=sdxl_pretrain) -> list[str]:
    """What is said of the models among a script's flags."""
    script = script.SCRIPT
    parsed = parse(
        script.flags,
        script.name,
        [f"--pretrained_model_name_or_path={model}", "--output_dir=o", "--resolution=64", *words],
    )
    said = problems_of_paths(script.flags, values_of(make_options(script.flags, parsed)))
    return [problem for problem in said if "data" not in problem]


@pytest.fixture
def here(tmp_path, monkeypatch):
    """A folder with a model in it, as the current one."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "sdxl" / "unet").mkdir(parents=True)
    (tmp_path / "models" / "sdxl" / "unet" / "config.json").write_text("{}")
    (tmp_path / "models" / "a.safetensors").write_bytes(save({}))
    return tmp_path


@pytest.mark.parametrize("source", ["models/sdxl", "./models/sdxl", "models/a.safetensors", "owner/name"])
def test_what_is_there_and_names_of_the_hub_pass(here, source):
    assert problems(source, "--vae=owner/vae") == []


@pytest.mark.parametrize(
    ("source", "said"),
    [
        ("models/none", "'models' is here and has no 'none'"),
        ("owner/name.safetensors", "not spelt as a hub name"),
        ("/models/none", "no such file or folder"),
        ("a/b/c", "no such file or folder"),
        ("models", r"has no unet/config\.json.*give one of them: a\.safetensors"),
        ("dead", "it is a link to .*nowhere, and nothing is there"),
        ("/dev/null", "it is neither a file nor a folder"),
        ("page.ckpt", "is a web page"),
    ],
)
def test_what_is_not_there_is_said(here, source, said):
    (here / "dead").symlink_to(here / "nowhere")
    (here / "page.ckpt").write_text("<html>")
    (problem,) = problems(source)
    assert problem.startswith("--pretrained_model_name_or_path ")
    assert re.search(said, problem)


def test_a_folder_that_was_cloned_without_git_lfs_is_said_to_be_that(here):
    part = here / "models" / "sdxl" / "unet"
    (part / "model.fp16.safetensors").write_text("version 1 of git-lfs\noid sha256:12\nsize 5135149760\n")
    (problem,) = problems("models/sdxl")
    assert problem.startswith(
        "--pretrained_model_name_or_path models/sdxl/unet/model.fp16.safetensors: is a pointer of"
    )
    (part / "model.safetensors").write_bytes(save({}))  # another form of the same weights that is whole
    assert problems("models/sdxl") == []


def test_all_are_said_at_once(here):
    words = ("--vae=models/sdxl", "--tokenizer1_path=/none/at/all", f"--tokenizer2_path={here / 'models'}")
    starts = (
        "--pretrained_model_name_or_path models/none: 'models' is here",
        "--vae models/sdxl: no VAE there",
        "--tokenizer1_path /none/at/all: no such file",
        f"--tokenizer2_path {here / 'models'}: no tokenizer there",
    )
    said = problems("models/none", *words)
    assert len(said) == len(starts) and all(map(str.startswith, said, starts)), said
    (said_of_one,) = problems("models/sdxl", "--tokenizer_path=/none/at/all", script=fine_tune)
    assert said_of_one.startswith("--tokenizer_path /none/at/all: no such file")


def test_a_wrong_path_ends_a_script_before_torch_is_imported(tmp_path):
    code = (
        "import sys, sdxl_pretrain\n"
        f"status = sdxl_pretrain.main(['--pretrained_model_name_or_path=/none', '--train_data_dir={tmp_path}', "
        f"'--output_dir={tmp_path / 'out'}', '--resolution=64'])\n"
        "assert not {'torch', 'diffusers', 'transformers'} & set(sys.modules), 'imported'\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and "--pretrained_model_name_or_path /none: no such file" in done.stderr, done.stderr
