"""Models by hub name, against a small stand-in of the hub on the loopback interface."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from library.errors import InputError
from library.families import SDXL
from library.models.files import hub
from library.models.files.read import load_model, load_tokenizers, load_vae
from library.models.files.weight_files import choose_weights, files_of
from library.models.files.write import save_model
from test.models.files.hub_server import Hub

SCRIPT = """
import sys, time, urllib.error, urllib.request
from library.errors import InputError
from library.families import SDXL
from library.models.files.read import load_model

def attempt(*arguments, **options):
    try:
        model = load_model(*arguments, SDXL, **options)
        sums = [part.weight.double().sum().item() for part in (model.unet.out[2], model.vae.decoder.conv_in)]
        print("loaded", *sums)
    except InputError as error:
        print("refused", str(error).replace(chr(10), " "))

endpoint = sys.argv[1]
attempt("tiny/sdxl", vae="tiny/vae")
attempt("tiny/absent")
attempt(sys.argv[2])
urllib.request.urlopen(endpoint + "/stop").read()
while True:  # until nobody answers
    try:
        urllib.request.urlopen(endpoint, timeout=5)
    except urllib.error.HTTPError:
        time.sleep(0.05)
    except OSError:
        break
attempt("tiny/sdxl", vae="tiny/vae")
attempt("tiny/other")
"""


@pytest.fixture(scope="module")
def report(sdxl, tmp_path_factory):
    """What one process says: online, for a wrong name, for a single file, and twice with the hub gone."""
    base = tmp_path_factory.mktemp("hub")
    pipeline = save_model(sdxl, base / "pipeline", "diffusers_safetensors")
    save_model(sdxl, base / "again", "diffusers")
    for component in ("unet", "vae"):  # the same weights once more, as hubs have them
        name = "diffusion_pytorch_model.bin"
        (base / "again" / component / name).rename(pipeline / component / name)
    (pipeline / "README.md").write_text("hello")
    single = save_model(sdxl, base / "single", "safetensors")
    server = Hub(
        {
            "tiny/sdxl": pipeline,
            "tiny/vae": pipeline / "vae",
            "openai/clip-vit-large-patch14": pipeline / "tokenizer",
            "laion/CLIP-ViT-bigG-14-laion2B-39B-b160k": pipeline / "tokenizer",
        }
    )
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGINGFACE_"))},
        "HF_ENDPOINT": server.endpoint,
        "HF_HOME": str(base / "home"),
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "NO_PROXY": "127.0.0.1",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(Path(hub.__file__).parents[3]),
    }
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, server.endpoint, str(single)],
        env=environment, capture_output=True, text=True, timeout=240, cwd=base,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if line.startswith(("loaded", "refused"))]
    return {"lines": lines, "downloaded": server.downloaded, "endpoint": server.endpoint, "home": base / "home"}


def test_a_hub_name_is_downloaded_and_loaded(report, sdxl):
    expected = [sdxl.unet.out[2].weight.double().sum().item(), sdxl.vae.decoder.conv_in.weight.double().sum().item()]
    assert [float(word) for word in report["lines"][0].split()[1:]] == pytest.approx(expected, rel=1e-9)


def test_only_what_is_needed_is_downloaded(report):
    unneeded = [name for name in report["downloaded"] if name.endswith((".bin", "README.md"))]
    assert unneeded == []
    assert "tiny/sdxl/unet/diffusion_pytorch_model.safetensors" in report["downloaded"]
    assert any((report["home"] / "hub").iterdir())


def test_a_name_that_the_hub_does_not_know_is_refused(report):
    line = report["lines"][1]
    assert line.startswith("refused --pretrained_model_name_or_path tiny/absent: ")
    assert "no such model repository" in line
    assert report["endpoint"] in line


def test_a_single_file_takes_the_tokenizers_that_sdxl_was_trained_with(report):
    assert report["lines"][2].split()[0] == "loaded"
    assert "openai/clip-vit-large-patch14/tokenizer.json" in report["downloaded"]


def test_offline_the_cache_serves(report):
    assert report["lines"][3] == report["lines"][0]


def test_offline_and_not_cached_says_what_was_looked_for_and_the_way_out(report):
    line = report["lines"][4]
    assert line.startswith("refused --pretrained_model_name_or_path tiny/other: ")
    assert "cannot be reached" in line
    assert report["endpoint"] in line
    assert "local path" in line
    assert "HF_HOME" in line


def test_a_mistyped_path_is_not_asked_of_the_hub(monkeypatch):
    monkeypatch.setattr(hub, "snapshot", lambda *_: pytest.fail("asked the hub"))
    names = (
        "models/sdxl/base",
        "./sdxl",
        "sdxl",
        "/nowhere/model",
        "models/sdxl/",
        "./models/sdxl",
        "sd/xl.safetensors",
    )
    for source in names:
        with pytest.raises(InputError, match="no such file or folder"):
            load_model(source, SDXL)


def test_a_missing_path_in_a_folder_that_is_here_is_not_asked_of_the_hub(monkeypatch, tmp_path):
    """The hub may have a model of that name, of a stranger; the family's own tokenizers are not meant as paths."""
    monkeypatch.setattr(hub, "snapshot", lambda *_: pytest.fail("asked the hub"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models").mkdir()
    for load in (lambda: load_model("models/sdxl", SDXL), lambda: load_vae("models/sdxl", SDXL, torch.float32)):
        with pytest.raises(InputError, match="models/sdxl: 'models' is here and has no 'sdxl'"):
            load()
    with pytest.raises(InputError, match="models/clip: 'models' is here"):
        load_tokenizers("whatever", SDXL, ("models/clip", "models/clip"))
    (tmp_path / "openai").mkdir()
    (tmp_path / "model.safetensors").touch()
    monkeypatch.setattr(hub, "snapshot", lambda name, *_: (_ for _ in ()).throw(LookupError(name)))
    with pytest.raises(LookupError, match="openai/clip-vit-large-patch14"):
        load_tokenizers(str(tmp_path / "model.safetensors"), SDXL)


def test_full_precision_is_chosen_before_a_variant_and_safetensors_before_pickles():
    stem = "diffusion_pytorch_model"
    safe, half, pickled = f"{stem}.safetensors", f"{stem}.fp16.safetensors", f"{stem}.bin"
    assert choose_weights([pickled, half, safe]) == safe
    assert choose_weights([half, pickled]) == pickled
    assert choose_weights([half]) == half
    assert choose_weights(["model.safetensors", "pytorch_model.bin"]) == "model.safetensors"
    assert choose_weights(["config.json"]) is None


def test_an_index_brings_its_own_shards_only():
    stem = "diffusion_pytorch_model"
    whole = [f"{stem}-0000{n}-of-00002.safetensors" for n in (1, 2)]
    half = [f"{stem}.fp16-0000{n}-of-00002.safetensors" for n in (1, 2)]
    pickled = [f"{stem}-0000{n}-of-00002.bin" for n in (1, 2)]
    names = [*whole, *half, *pickled, f"{stem}.safetensors.index.json", f"{stem}.safetensors.index.fp16.json"]
    assert files_of(f"{stem}.safetensors.index.json", names) == [f"{stem}.safetensors.index.json", *whole]
    assert files_of(f"{stem}.safetensors.index.fp16.json", names) == [f"{stem}.safetensors.index.fp16.json", *half]


def test_a_pipelines_needed_files():
    names = [
        "README.md", "model_index.json", "sd_xl_base_1.0.safetensors", "scheduler/scheduler_config.json",
        "tokenizer/vocab.json", "tokenizer/merges.txt", "tokenizer_2/vocab.json", "unet/config.json",
        "unet/diffusion_pytorch_model.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet/model.onnx", "vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors", "vae_1_0/config.json",
    ]  # fmt: skip
    unneeded = {
        "README.md", "sd_xl_base_1.0.safetensors", "unet/diffusion_pytorch_model.fp16.safetensors", "unet/model.onnx",
        "vae_1_0/config.json",
    }  # fmt: skip
    assert set(hub.pipeline_files(names)) == set(names) - unneeded
    assert set(hub.vae_files(names)) == {"vae/config.json", "vae/diffusion_pytorch_model.fp16.safetensors"}


def test_of_a_pipeline_with_one_text_encoder_what_tells_its_family_comes_with_the_tokenizer():
    names = [
        "v1-5-pruned.ckpt", "model_index.json", "scheduler/scheduler_config.json", "tokenizer/vocab.json",
        "tokenizer/merges.txt", "unet/config.json", "unet/diffusion_pytorch_model.bin", "vae/config.json",
        "vae/diffusion_pytorch_model.bin", "text_encoder/config.json", "text_encoder/pytorch_model.bin",
        "safety_checker/config.json", "safety_checker/pytorch_model.bin", "feature_extractor/preprocessor_config.json",
    ]  # fmt: skip
    wanted = hub.pipeline_files(names)
    assert set(names) - set(wanted) == {
        "v1-5-pruned.ckpt", "safety_checker/config.json", "safety_checker/pytorch_model.bin",
        "feature_extractor/preprocessor_config.json",
    }  # fmt: skip
    small = hub.pipeline_tokenizer_files(names)
    assert {"tokenizer/vocab.json", "unet/config.json", "text_encoder/config.json", "model_index.json"} <= set(small)
    assert not [name for name in small if name.endswith(".bin")]
