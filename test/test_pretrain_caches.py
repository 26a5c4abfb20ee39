"""sdxl_pretrain.py with caches of latents and of text-encoder outputs, against the same runs without."""

import io
import json
import shutil
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from PIL import Image
from safetensors.torch import load_file

import sdxl_pretrain
from library.models import vae as vae_module


def picture(number, size):
    colours = np.random.default_rng(number).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(colours).resize(size, Image.Resampling.BICUBIC).save(file, "PNG")
    return file.getvalue()


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """A folder of 10 images of two aspect ratios, of which one cannot be decoded, and a shard of 6 more."""
    folder = tmp_path_factory.mktemp("images")
    for number in range(10):
        content = picture(number, ((64, 64), (96, 48))[number % 2])
        (folder / f"{number}.png").write_bytes(content[:-40] if number == 3 else content)
        (folder / f"{number}.txt").write_text(f"a photo, of number {number}")
    with tarfile.open(folder / "00000.tar", "w") as tar:
        for number in range(6):
            for name, content in ((f"{number}.png", picture(50 + number, (64, 64))), (f"{number}.txt", b"a red cat")):
                member = tarfile.TarInfo(name)
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def train(tiny_sdxl_folder, images, tmp_path, capfd):
    """Runs the script on a copy of the images; returns (exit status, output folder, what it printed)."""
    data = tmp_path / "data"
    shutil.copytree(images, data)

    def run(*arguments, out="out"):
        AcceleratorState._reset_state(reset_partial_state=True)
        status = sdxl_pretrain.main(
            [
                f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={data}", "--resolution=64",
                "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
                "--caption_extension=.txt", f"--output_dir={tmp_path / out}", "--max_data_loader_n_workers=0",
                "--seed=1", "--learning_rate=1e-3", "--train_batch_size=2", "--max_train_steps=6",
                "--save_model_as=safetensors", "--max_bad_samples=0.2", "--caption_dropout_rate=0.3", *arguments,
            ]
        )  # fmt: skip
        printed = capfd.readouterr()
        return status, tmp_path / out, printed.out + printed.err

    run.data = data
    return run


@pytest.fixture
def encoded(monkeypatch):
    """How many images go through the VAE while caching or training."""
    seen = []
    real = vae_module.encode_moments

    def encode(vae, images_BHWC, **options):
        seen.append(len(images_BHWC))
        return real(vae, images_BHWC, **options)

    monkeypatch.setattr("library.training.sdxl_encoders.encode_moments", encode)
    return seen


def losses(out):
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [(line["loss"], line["grad_norm"]) for line in lines]


def same_weights(one: Path, other: Path) -> bool:
    mine, theirs = (load_file(folder / "last.safetensors") for folder in (one, other))
    return all(torch.equal(mine[name], theirs[name]) for name in theirs)


def test_training_from_a_cache_is_training_without_bit_for_bit(train, encoded):
    status, plain, printed = train(out="plain")
    assert status == 0, printed
    for out, flags in {
        "memory": ("--cache_latents", "--cache_text_encoder_outputs"),
        "disk": ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk"),
        "again": ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk", "--skip_cache_check"),
    }.items():
        encoded.clear()
        status, cached, printed = train(*flags, out=out)
        assert status == 0, printed
        assert losses(cached) == losses(plain), out
        assert same_weights(cached, plain), out
        assert (cached / "quarantine.jsonl").read_text() == (plain / "quarantine.jsonl").read_text()
        assert sum(encoded) == (0 if out == "again" else 15), out
