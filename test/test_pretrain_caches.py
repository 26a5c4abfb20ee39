"""sdxl_pretrain.py with caches of latents and of text-encoder outputs, against the same runs without."""

import copy
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

    monkeypatch.setattr("library.training.encoders.encode_moments", encode)
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
    assert len(list(train.data.glob("*_te_outputs.npz"))) == 10
    blocks = [path.parent.parent.name for path in (train.data / ".encoding_cache").rglob("*.safetensors")]
    assert sorted(blocks) == ["latents", "text_encoder_outputs"]  # of the shard alone


@pytest.mark.all
def test_a_run_of_other_settings_in_between_changes_nothing_for_the_first(train, encoded):
    disk = ("--cache_latents_to_disk", "--cache_text_encoder_outputs_to_disk")
    status, first, printed = train(*disk, out="first")
    assert status == 0, printed
    status, _, printed = train(*disk, "--resolution=96", "--flip_aug", "--caption_prefix=a photo of", out="second")
    assert status == 0 and "0 entries kept, 15 computed" in printed, printed
    encoded.clear()
    status, again, printed = train(*disk, "--skip_cache_check", out="again")
    assert status == 0 and "15 entries kept, 0 computed" in printed and "16 entries kept, 0 computed" in printed
    assert not encoded and losses(again) == losses(first) and same_weights(again, first)


def test_mirrored_images_and_sample_pictures_are_as_without_a_cache(train, tmp_path):
    (tmp_path / "prompts.txt").write_text("a red cat --w 32 --h 32 --s 1 --l 2 --d 7\n")
    common = (
        "--flip_aug", "--weighted_captions", "--max_train_steps=4", f"--sample_prompts={tmp_path / 'prompts.txt'}",
        "--sample_every_n_steps=4",
    )  # fmt: skip
    status, plain, printed = train(*common, out="plain")
    assert status == 0, printed
    status, cached, printed = train(
        *common, "--cache_latents_to_disk", "--cache_text_encoder_outputs", "--vae_batch_size=2", out="cached"
    )
    assert status == 0, printed
    assert losses(cached) == losses(plain)
    one, other = ([np.asarray(Image.open(path)) for path in sorted(out.rglob("*.png"))] for out in (plain, cached))
    assert len(one) == 1 and np.array_equal(one[0], other[0])
    file = np.load(train.data / "0_0064x0064_sdxl.npz")
    assert file["latents_flipped"].shape == file["latents"].shape == (4, 32, 32)


@pytest.mark.parametrize(
    ("flags", "named"),
    [
        (("--cache_latents", "--random_crop"), ("--cache_latents ", "--random_crop")),
        (("--cache_latents_to_disk", "--color_aug"), ("--cache_latents_to_disk", "--color_aug")),
        (("--cache_text_encoder_outputs", "--shuffle_caption"), ("--cache_text_encoder_outputs ", "--shuffle_caption")),
        (("--cache_text_encoder_outputs", "--enable_wildcard"), ("--enable_wildcard",)),
        (("--cache_text_encoder_outputs", "--train_text_encoder"), ("--train_text_encoder",)),
        (("--skip_cache_check",), ("--skip_cache_check", "--cache_latents_to_disk")),
        (("--text_encoder_batch_size=2",), ("--text_encoder_batch_size", "--cache_text_encoder_outputs")),
    ],
)
def test_what_stands_against_a_cache_is_an_error_that_names_both(train, flags, named):
    status, _, printed = train(*flags)
    assert status == 2
    assert all(flag in printed for flag in named), printed


def test_a_cache_that_cannot_fit_into_memory_is_refused(train, monkeypatch):
    monkeypatch.setattr("library.training.cache_filling._available_bytes", lambda: 100_000)
    status, _, printed = train("--cache_latents")
    assert status == 2 and "--cache_latents_to_disk" in printed and "GiB" in printed
    status, _, printed = train("--cache_latents_to_disk", "--max_train_steps=1")
    assert status == 0, printed


def test_another_vae_and_sd_scripts_files_are_told(train, tmp_path, vae):
    text = "--cache_text_encoder_outputs_to_disk"
    status, _, printed = train("--cache_latents_to_disk", text, "--max_train_steps=1")
    assert status == 0 and "15 computed" in printed and "16 computed" in printed
    other = copy.deepcopy(vae)
    torch.nn.init.normal_(other.encoder.conv_in.weight, std=0.1)
    other.save_pretrained(tmp_path / "vae")
    (train.data / "2_0064x0064_sdxl.npz").unlink()
    latents = {"latents": np.ones((4, 32, 32), np.float32), "original_size": [64, 64], "crop_ltrb": [0, 0, 64, 64]}
    np.savez(train.data / "2.npz", **latents)
    with np.load(train.data / "2_te_outputs.npz") as file:
        outputs = {key: file[key] for key in ("hidden_state1", "hidden_state2", "pool2")}
    np.savez(train.data / "2_te_outputs.npz", **outputs)
    common = ("--cache_latents_to_disk", text, "--max_train_steps=1", f"--vae={tmp_path / 'vae'}")
    status, _, printed = train(*common, "--skip_cache_check", out="unchecked")
    assert status == 0 and "1 entries kept, 14 computed" in printed, printed
    assert printed.count("1 .npz of another program are used as they are") == 2
    assert "text_encoder_outputs: 16 entries kept, 0 computed" in printed
    status, _, printed = train(*common, out="checked")
    assert status == 0 and "14 entries kept, 1 computed" in printed, printed
    assert "do not say of which image" in printed and "do not say of which caption" in printed
    assert "text_encoder_outputs: 15 entries kept, 1 computed" in printed
