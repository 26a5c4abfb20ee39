"""sdxl_pretrain.py from the command line to its files, on a tiny SDXL and small shards."""

import io
import json
import re
import shutil
import tarfile
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

import sdxl_pretrain
from library.families import SDXL
from library.models.files.read import load_model
from library.models.text import Tokens
from library.training import build
from library.training.engine.sharding import Replicated
from library.training.task import Task

COLOURS = {"red": (220, 40, 40), "blue": (40, 60, 220), "green": (40, 180, 70)}


PARTS = {
    "U-Net": lambda model: model.unet,
    "VAE": lambda model: model.vae,
    "text encoder 1": lambda model: model.text_encoders[0],
    "text encoder 2": lambda model: model.text_encoders[1],
}


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """Two shards of 12 pictures, 4 of each aspect ratio, captions in .txt and .json, no sidecars."""
    folder = tmp_path_factory.mktemp("shards")
    sizes = [(64, 64), (96, 48), (48, 96)]
    for shard in range(2):
        with tarfile.open(folder / f"{shard:05d}.tar", "w") as tar:
            for number in range(12):
                name, colour = list(COLOURS.items())[number % 3]
                width, height = sizes[number // 4]
                image = io.BytesIO()
                Image.new("RGB", (width, height), colour).save(image, "JPEG")
                facts = {"caption": f"a {name} picture", "width": width, "height": height}
                members = {
                    "jpg": image.getvalue(),
                    "txt": facts["caption"].encode(),
                    "json": json.dumps(facts).encode(),
                }
                for extension, content in members.items():
                    member = tarfile.TarInfo(f"{shard:05d}{number:04d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


@pytest.fixture
def train(tiny_sdxl_folder, shards, tmp_path, capfd):
    """Runs the script on the tiny model; returns (exit status, output folder, what it printed)."""

    def run(*arguments, out="out", data=shards):
        AcceleratorState._reset_state(reset_partial_state=True)
        status = sdxl_pretrain.main(
            [
                f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={data}", "--resolution=64",
                "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
                "--caption_extension=.txt", f"--output_dir={tmp_path / out}", "--max_data_loader_n_workers=0",
                "--seed=1",                "--learning_rate=1e-3", *arguments,
            ]
        )  # fmt: skip
        printed = capfd.readouterr()
        return status, tmp_path / out, printed.out + printed.err

    return run


def metrics(folder):
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def samples_seen(monkeypatch):
    """Names of the samples of every step, as the loss sees them."""
    seen = []
    real = Task.loss

    def loss(self, module, batch):
        seen.append((batch.step, tuple(batch.names)))
        return real(self, module, batch)

    monkeypatch.setattr(Task, "loss", loss)
    return seen


def test_a_run_leaves_weights_samples_metrics_and_the_final_block(train, tmp_path, tiny_sdxl_folder):
    (tmp_path / "prompts.txt").write_text(
        "a red picture --w 64 --h 48 --s 2 --l 3 --d 7\na blue picture --w 64 --h 64 --s 1 --l 1\n"
    )
    status, out, printed = train(
        "--train_batch_size=2", "--max_train_steps=4", "--save_every_n_steps=2", "--save_model_as=safetensors",
        "--output_name=tiny", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_at_first",
        "--sample_every_n_steps=4", "--sample_sampler=euler", "--case_name=SDXL_bs2_1p_acc",
        f"--logging_dir={tmp_path / 'logs'}",
    )  # fmt: skip
    assert status == 0, printed
    names = {path.name for path in out.glob("*.safetensors")}
    assert names == {"tiny-step00000002.safetensors", "tiny-step00000004.safetensors", "tiny.safetensors"}
    again = sdxl_pretrain.SCRIPT.options([f"--config_file={out / 'tiny.config.toml'}"])
    assert (again.saving.save_every_n_steps, again.preview.sample_sampler, again.run.seed) == (2, "euler", 1)
    block = printed[printed.index("------------------ Final result ------------------") :].splitlines()
    assert block[1].startswith("Final Performance images/sec : ") and float(block[1].split(":")[1]) > 0
    assert float(block[2].removeprefix("Final Train Loss : ")) > 0
    case = dict(line.split(" = ") for line in (out / "SDXL_bs2_1p_acc.log").read_text().splitlines())
    assert case["ActualFPS"] == block[1].split(": ")[1]
    assert case["ActualLoss"] == block[2].split(": ")[1]
    lines = metrics(out)
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert all(line["loss"] > 0 and line["grad_norm"] > 0 and line["images_per_second"] > 0 for line in lines)
    samples = sorted((out / "sample").glob("*.png"))
    assert [Image.open(path).size for path in samples] == [(64, 48), (64, 64)] * 2
    assert samples[0].name.startswith("tiny_") and samples[0].name.endswith("_000000_00_7.png")
    assert list((tmp_path / "logs").rglob("events.out.tfevents.*"))


def test_regularisation_images_train_with_their_weight(train, shards, monkeypatch):
    """The loss of a batch is the mean of its samples' own, each times its weight."""
    compared = []
    real = Task.loss

    def loss(self, module, batch):
        found = real(self, module, batch)
        with torch.no_grad():
            alone = [real(self, module, replace(batch, loss_weights_B=one)) for one in torch.eye(len(batch))]
        weights = [0.5 if "/reg/" in name else 1.0 for name in batch.names]
        compared.append((weights, found.item(), sum(w * float(one) for w, one in zip(weights, alone, strict=True))))
        return found

    monkeypatch.setattr(Task, "loss", loss)
    reg = shards.parent / "reg"
    shutil.copytree(shards, reg, dirs_exist_ok=True)
    arguments = ("--train_batch_size=3", "--max_train_steps=2", f"--reg_data_dir={reg}", "--prior_loss_weight=0.5")
    status, _, printed = train(*arguments)
    assert status == 0, printed
    assert any(len(set(weights)) == 2 for weights, _, _ in compared)
    assert all(found == pytest.approx(expected, rel=1e-5) for _, found, expected in compared)


def pictures(folder, count, caption):
    """Small pictures of one size, each with the same caption."""
    for number in range(count):
        Image.new("RGB", (64, 64), (25 * number, 40, 90)).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text(caption)
    return folder


def test_weighted_captions_reach_the_loss_from_the_workers(train, shards, tmp_path, monkeypatch):
    """With trained text encoders and accumulation; the loss is that of the weights, and of the ids without brackets."""
    pictures(tmp_path, 4, "a (red:1.3) cat")
    found = []
    real = Task.loss

    def loss(self, module, batch):
        with torch.no_grad():
            without = real(self, module, replace(batch, tokens=Tokens(batch.tokens.ids)))
        found.append(((*batch.tokens.ids, *batch.tokens.weights), without.item(), real(self, module, batch)))
        return found[-1][2]

    monkeypatch.setattr(Task, "loss", loss)
    status, _, printed = train(
        "--train_batch_size=2", "--max_train_steps=1", "--gradient_accumulation_steps=2", "--train_text_encoder",
        "--weighted_captions", "--max_data_loader_n_workers=1", data=tmp_path,
    )  # fmt: skip
    assert status == 0, printed
    assert len(found) == 2
    for (ids1, ids2, weights1, weights2), without, with_weights in found:
        assert ids1.shape == ids2.shape == weights1.shape == weights2.shape == (2, 1, 77)
        for weights in (weights1, weights2):
            assert (weights == 1.3).sum() == 2 and (weights == 1).sum() == 2 * 76
        assert with_weights.item() != without


def test_validation_is_written_down_and_changes_nothing(train, tmp_path):
    """Weights with it and without are the same bit for bit, and so are the numbers of a run that was resumed."""
    common = ("--train_batch_size=1", "--max_train_steps=3", "--validation_split=0.5", "--save_model_as=safetensors")
    data = pictures(tmp_path, 4, "a cat")
    often = ("--validate_every_n_steps=1", f"--logging_dir={tmp_path / 'logs'}", "--save_state_every_n_steps=2")
    for out, more in (("often", often), ("never", ("--validate_every_n_steps=99",))):
        status, _, printed = train(*common, *more, out=out, data=data)
        assert status == 0, printed
    one, other = (load_file(tmp_path / out / "last.safetensors") for out in ("often", "never"))
    assert all(torch.equal(one[name], other[name]) for name in one)
    lines = metrics(tmp_path / "often")
    found = [line for line in lines if "loss/validation/step_average" in line]
    assert [line["step"] for line in found] == [1, 2, 3]
    losses = [line["loss/validation/step_average"] for line in found]
    assert len(set(losses)) == 3
    averages = [line["average_loss"] for line in lines if "average_loss" in line]
    divergences = [line["loss/validation/step_divergence"] for line in found]
    assert divergences == pytest.approx([loss - trained for loss, trained in zip(losses, averages, strict=True)])
    assert not any("validation" in name for line in metrics(tmp_path / "never") for name in line)
    assert any(b"loss/validation/step_average" in path.read_bytes() for path in (tmp_path / "logs").rglob("events*"))

    state = tmp_path / "often" / "at-step00000002-state"
    status, _, printed = train(*common, *often, f"--resume={state}", out="often", data=data)
    assert status == 0, printed
    again = [line for line in metrics(tmp_path / "often") if "loss/validation/step_average" in line]
    runs = [{line.pop("run") for line in lines} for lines in (found, again)]
    assert again == found and runs[0] < runs[1]  # all but the last by the first start


def test_numbers_of_two_moments_compare(train, tmp_path):
    """At a learning rate of 0 they are the same: each is the mean over the images, in any batches and from caches."""
    data = pictures(tmp_path, 7, "a cat")
    numbers = []
    caches = ("--cache_latents", "--cache_text_encoder_outputs")
    for out, batch, more in (("few", 2, ()), ("many", 3, caches)):
        arguments = (
            f"--train_batch_size={batch}",
            "--max_train_epochs=2",
            "--validation_split=0.5",
            "--learning_rate=0",
        )
        status, folder, printed = train(*arguments, *more, out=out, data=data)
        assert status == 0, printed
        numbers += [
            line["loss/validation/epoch_average"] for line in metrics(folder) if "loss/validation/epoch_average" in line
        ]
    assert len(numbers) == 4
    assert numbers == pytest.approx([numbers[0]] * 4, rel=1e-5)
    assert numbers[0] == numbers[1]


ENCODER_1_ALONE = (
    "--learning_rate=0", "--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate_te2=0",
)  # fmt: skip


def test_what_rate_0_freezes_has_no_gradient_and_no_state(train, monkeypatch):
    """The norm that is clipped is that of what trains."""
    norms = []
    real = Replicated.clip

    def clip(self, max_norm):
        assert self.bare_module.unet.out[2].weight.grad is None
        gradients = [one.grad for one in self.bare_module.trained_encoders[0] if one.grad is not None]
        norms.append(torch.stack([one.norm() for one in gradients]).norm().item())
        return real(self, max_norm)

    monkeypatch.setattr(Replicated, "clip", clip)
    state = ("--save_state_on_train_end", "--gradient_checkpointing")
    status, folder, printed = train("--train_batch_size=2", "--max_train_steps=2", *ENCODER_1_ALONE, *state, out="te")
    assert status == 0, printed
    found = metrics(folder)
    assert [line["grad_norm"] for line in found] == pytest.approx(norms, rel=1e-5)
    assert [list(line["lr"]) for line in found] == [["text_encoder1"]] * 2
    with safe_open(folder / "last-state" / "rank00000-of-00001.training.safetensors", "pt") as saved:
        assert not [name for name in saved.keys() if "unet" in name]  # noqa: SIM118
    estimated = [line for line in printed.splitlines() if "number of trainable parameters" in line]
    assert len(estimated) == 1 and "train unet" not in printed


def test_what_is_asked_to_train_trains_and_nothing_else_does(train, tiny_sdxl_folder):
    before = load_model(str(tiny_sdxl_folder), SDXL)
    common = ("--train_batch_size=2", "--max_train_steps=2", "--save_model_as=diffusers_safetensors")
    for out, arguments, unet_trains, te1_trains, te2_trains in (
        ("unet", (), True, False, False),
        ("both", ("--train_text_encoder", "--learning_rate_te1=1e-3"), True, True, True),
        ("second", ("--train_text_encoder", "--learning_rate_te1=0"), True, False, True),
        ("first alone", ENCODER_1_ALONE, False, True, False),
    ):
        status, folder, printed = train(*common, *arguments, out=out)
        assert status == 0, printed
        after = load_model(str(folder / "last"), SDXL)
        parts = (("U-Net", unet_trains), ("text encoder 1", te1_trains), ("text encoder 2", te2_trains), ("VAE", False))
        frozen = [f"the {part}" if part == "U-Net" else part for part, trains in parts[:3] if not trains]
        assert (f"frozen: {', '.join(frozen)}" if frozen else "checkpoints as") in printed
        for part, trains in parts:
            old, new = PARTS[part](before).state_dict(), PARTS[part](after).state_dict()
            assert all(torch.equal(old[key], new[key]) for key in old) != trains, (out, part)


def test_the_same_command_gives_the_same_weights_with_any_number_of_workers(train):
    common = (
        "--train_batch_size=2", "--max_train_steps=3", "--save_model_as=safetensors", "--shuffle_caption",
        "--caption_dropout_rate=0.3",
    )  # fmt: skip
    weights = []
    for out, workers in (("a", 0), ("b", 0), ("c", 2)):
        _, folder, _ = train(*common, f"--max_data_loader_n_workers={workers}", out=out)
        weights.append(load_file(folder / "last.safetensors"))
    first, *others = weights
    assert all(torch.equal(first[key], other[key]) for other in others for key in first)


def test_accumulated_batches_are_the_large_batch(train, monkeypatch, tmp_path):
    """One picture four times a step: which samples stand together depends on the batch size."""
    data = pictures(tmp_path, 1, "a cat")
    seen, weights = samples_seen(monkeypatch), []
    for out, batch, accumulation in (("large", 4, 1), ("small", 1, 4)):
        arguments = (
            f"--train_batch_size={batch}",
            f"--gradient_accumulation_steps={accumulation}",
            "--max_train_steps=3",
        )
        # SGD-like epsilon: Adam turns the sign of a gradient that is rounding noise into a whole step
        _, folder, _ = train(
            *arguments, "--dataset_repeats=4", "--save_model_as=safetensors", "--optimizer_args", "eps=1e-3",
            out=out, data=data,
        )  # fmt: skip
        weights.append((load_file(folder / "last.safetensors"), metrics(folder)))
    (large, large_metrics), (small, small_metrics) = weights
    assert sum((names for _, names in seen[:3]), ()) == sum((names for _, names in seen[3:]), ())
    for one, four in zip(large_metrics, small_metrics, strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-4)
    for key, value in large.items():
        torch.testing.assert_close(small[key], value, rtol=1e-5, atol=2e-6)


def test_epochs_count_full_batches_and_name_their_checkpoints(train):
    status, out, printed = train(
        "--train_batch_size=4", "--max_train_epoch=3", "--save_every_n_epochs=1", "--save_model_as=safetensors"
    )
    assert status == 0, printed
    assert "override steps. steps for 3 epochs is 18" in printed  # 24 images, 8 in each of three buckets
    assert len(metrics(out)) == 18
    assert [line["epoch"] for line in metrics(out)] == [1] * 6 + [2] * 6 + [3] * 6
    names = {path.name for path in out.glob("*.safetensors")}
    assert names == {"epoch-000001.safetensors", "epoch-000002.safetensors", "last.safetensors"}


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_half_precision_trains_and_keeps_what_does_not_train_bit_for_bit(train, tiny_sdxl_folder, precision):
    arguments = ("--train_batch_size=1", "--max_train_steps=1", "--train_text_encoder", "--learning_rate_te1=0")
    status, out, printed = train(*arguments, f"--mixed_precision={precision}")
    assert status == 0, printed
    assert metrics(out)[0]["updated"]
    before, after = load_model(str(tiny_sdxl_folder), SDXL), load_model(str(out / "last"), SDXL)
    for part in ("VAE", "text encoder 1"):
        old, new = PARTS[part](before).state_dict(), PARTS[part](after).state_dict()
        assert all(torch.equal(old[key], new[key]) for key in old), part
    assert not torch.equal(before.unet.out[2].weight, after.unet.out[2].weight)


@pytest.mark.parametrize(("arguments", "dtype"), [(["--no_half_vae"], torch.float32), ([], torch.bfloat16)])
def test_the_vae_computes_in_fp32_where_asked(train, monkeypatch, tmp_path, arguments, dtype):
    seen = set()
    for name in ("encode", "decode"):
        real = getattr(AutoencoderKL, name)

        def watched(self, x, *rest, real=real, **named):
            seen.add((self.decoder.conv_in(torch.zeros(1, 4, 2, 2, dtype=self.dtype)).dtype, x.dtype))
            return real(self, x, *rest, **named)

        monkeypatch.setattr(AutoencoderKL, name, watched)
    (tmp_path / "prompts.txt").write_text("red --w 32 --h 32 --s 1\n")
    sampling = (f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_at_first")
    half = ("--train_batch_size=1", "--max_train_steps=1", "--mixed_precision=bf16")
    assert train(*half, *sampling, *arguments)[0] == 0
    assert seen == {(dtype, dtype)}


@pytest.mark.parametrize("form", ["diffusers_safetensors", "safetensors"])
def test_what_the_model_was_trained_to_predict_goes_into_its_checkpoint(train, tiny_sdxl_folder, form):
    arguments = ("--train_batch_size=1", "--max_train_steps=1", "--v_parameterization", "--zero_terminal_snr")
    status, out, printed = train(*arguments, f"--save_model_as={form}")
    assert status == 0, printed
    path = out / ("last.safetensors" if form == "safetensors" else "last")
    tokenizers = f"{tiny_sdxl_folder}/tokenizer", f"{tiny_sdxl_folder}/tokenizer_2"
    config = load_model(str(path), SDXL, tokenizers=tokenizers).scheduler_config
    assert config["prediction_type"] == "v_prediction"
    assert config["rescale_betas_zero_snr"] is True


def test_a_dry_run_tells_the_plan_and_trains_nothing(train):
    status, out, printed = train("--train_batch_size=4", "--max_train_steps=7", "--dry_run", "--gradient_checkpointing")
    assert status == 0, printed
    for line in (
        "total optimization steps: 7",
        "number of trainable parameters",
        "bucket 0: resolution",
        "estimated device memory",
    ):
        assert line in printed
    assert "Final result" not in printed
    assert not list(out.rglob("*"))


def test_a_dry_run_tells_what_a_limit_of_memory_has_recomputed(train):
    limited = ("--gradient_checkpointing", "--checkpoint_policy=auto", "--checkpoint_memory_gb=64")
    status, _, printed = train("--train_batch_size=4", "--max_train_steps=7", "--dry_run", *limited)
    assert status == 0, printed
    (line,) = [line for line in printed.splitlines() if "checkpoint policy: auto" in line]
    (estimated,) = [line for line in printed.splitlines() if "estimated device memory" in line]
    assert " 0 of " in line and "64 GiB" in line  # all fits, so nothing is
    assert re.search(r"estimated ([\d.]+) GiB", line)[1] in estimated


@pytest.mark.all
def test_a_run_with_a_limit_of_memory_is_the_run_without(train):
    arguments = ("--train_batch_size=4", "--max_train_steps=2", "--save_model_as=safetensors")
    status, plain, printed = train(*arguments, out="plain")
    assert status == 0, printed
    expected = load_file(plain / "last.safetensors")
    peaks = []
    for checkpointing in ((), ("--gradient_checkpointing",)):
        printed = train(*arguments, "--dry_run", *checkpointing)[2]
        peaks.append(float(re.search(r"estimated device memory of a step: ([\d.]+)", printed)[1]))
    between = f"--checkpoint_memory_gb={sum(peaks) / 2:.4f}"
    status, limited, printed = train(*arguments, "--gradient_checkpointing", "--checkpoint_policy=auto", between)
    assert status == 0, printed
    chosen, blocks = map(int, re.search(r"auto, (\d+) of (\d+) blocks", printed).groups())
    assert 0 < chosen < blocks
    found = load_file(limited / "last.safetensors")
    assert found.keys() == expected.keys() and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--optimizer_type=Lyon"], "--optimizer_type 'Lyon'"),
        (["--fused_backward_pass", "--gradient_accumulation_steps=2"], "--gradient_accumulation_steps=2"),
        (["--fused_backward_pass", "--mixed_precision=fp16"], "--mixed_precision=bf16 or no"),
        (["--full_bf16"], "--full_bf16 trains bf16 weights, and --mixed_precision=no computes with others"),
        (["--full_bf16", "--mixed_precision=fp16"], "add --mixed_precision=bf16"),
        (["--bf16_update=kahan", "--mixed_precision=bf16"], "--bf16_update has nothing to act on without --full_bf16"),
        (["--fused_backward_pass", "--sharding=zero1"], "--sharding=zero1"),
        (["--blocks_to_swap=2"], "the CPU is what computes here"),
        (["--checkpoint_policy=auto", "--checkpoint_memory_gb=9"], "without --gradient_checkpointing"),
        (["--gradient_checkpointing", "--checkpoint_policy=auto"], "add --checkpoint_memory_gb"),
        (["--gradient_checkpointing", "--checkpoint_memory_gb=9"], "without --checkpoint_policy=auto"),
        (
            ["--gradient_checkpointing", "--checkpoint_policy=auto", "--checkpoint_memory_gb=0.001"],
            "--checkpoint_memory_gb=0.001: with every block checkpointed",
        ),
        (["--optimizer_type=AdaFactor", "--sharding=fsdp"], "--sharding=fsdp"),
        (["--train_batch_size=100"], "24"),
        (["--resolution=64", "--bucket_reso_steps=12"], "bucket_reso_steps"),
        (["--learning_rate_te1=1e-5"], "--train_text_encoder"),
        (["--sample_at_first"], "--sample_prompts"),
        (["--sample_prompts=/no/such/file.txt"], "/no/such/file.txt"),
        (["--zero_terminal_snr"], "--v_parameterization"),
        (["--pretrained_model_name_or_path=/no/such/model"], "/no/such/model"),
        (["--lr_warmup_steps=10", "--lr_scheduler=constant"], "constant_with_warmup"),
        (
            ["--lr_warmup_steps=999", "--lr_scheduler=cosine", "--max_train_epochs=1", "--dry_run"],
            "--lr_warmup_steps=999",
        ),
        (["--logging_dir=/dev/null/logs"], "--logging_dir"),
        (["--output_dir=/dev/null/out"], "--output_dir"),
        (["--tokenizer1_path=/no/such/tokenizer"], "/no/such/tokenizer"),
    ],
)
def test_bad_input_is_named_and_ends_with_status_2(train, arguments, message):
    status, _, printed = train("--train_batch_size=2", "--max_train_steps=1", *arguments)
    error = next(line for line in printed.splitlines() if line.startswith("error: "))
    assert status == 2
    assert message in error
    assert "Traceback" not in printed and "Final result" not in printed


def test_a_disk_without_room_for_the_end_is_found_at_the_start(train, monkeypatch):
    monkeypatch.setattr("library.disk_space.shutil.disk_usage", lambda folder: SimpleNamespace(free=5 << 20))
    status, _, printed = train("--max_train_steps=1")
    assert status == 2
    assert "what this run saves at the least, optimizer state not counted, needs " in printed
    assert "running training" not in printed


def test_an_empty_folder_says_what_was_looked_for(train, tmp_path):
    (tmp_path / "empty").mkdir()
    status, _, printed = train(data=tmp_path / "empty")
    assert status == 2
    assert str(tmp_path / "empty") in printed and ".tar" in printed and ".jpg" in printed


def test_a_loss_that_is_never_finite_fails_the_run_without_a_block(train, monkeypatch):
    monkeypatch.setattr(Task, "loss", lambda self, module, batch: module.unet.out[2].bias.sum() * float("nan"))
    status, out, printed = train("--train_batch_size=2", "--max_train_steps=9")
    assert status == 1
    assert "training stopped: loss not finite at step 3" in printed
    assert "Final result" not in printed
    assert not list(out.glob("last*"))


def test_bad_samples_are_listed_and_counted_and_too_many_stop_the_run(train, shards, tmp_path):
    """Three images without their end, one caption that is no text, one sample without image, among 24."""
    broken = tmp_path / "broken"
    broken.mkdir()
    for path in sorted(shards.glob("*.tar")):
        with tarfile.open(path) as old, tarfile.open(broken / path.name, "w") as new:
            for member in old:
                content = old.extractfile(member).read()
                if member.name in ("000000001.jpg", "000000006.jpg", "000010004.jpg"):
                    content = content[: len(content) // 2]
                if member.name == "000010002.txt":
                    content = b"a caf\xe9"  # cp1252
                if member.name != "000010007.jpg":
                    member.size = len(content)
                    new.addfile(member, io.BytesIO(content))
    common = ("--train_batch_size=4", "--max_train_steps=7", "--save_model_as=safetensors")
    status, out, printed = train(*common, "--max_bad_samples=0.2", data=broken)
    assert status == 0, printed
    listed = [json.loads(line) for line in (out / "quarantine.jsonl").read_text().splitlines()]
    assert [(line["step"], line["sample"].rpartition(":")[2]) for line in listed[:2]] == [
        (0, "000010002"),
        (0, "000010007"),
    ]
    assert "caption is not UTF-8" in listed[0]["reason"] and "no image" in listed[1]["reason"]
    assert {(line["sample"], line["reason"].partition(":")[0]) for line in listed[2:]} == {
        (f"{broken}/00000.tar:000000001", "OSError"),
        (f"{broken}/00000.tar:000000006", "OSError"),
        (f"{broken}/00001.tar:000010004", "OSError"),
    }
    block = printed[printed.index("--- Final result ---") :]
    assert "\nSamples replaced (quarantine.jsonl) : 3\n" in block
    assert "\nSamples left out of the index (quarantine.jsonl) : 2\n" in block
    assert "replaced=3" in printed
    assert metrics(out)[-1]["quarantined"] == 3

    status, out, printed = train(*common, "--max_bad_samples=0.085", data=broken, out="stopped")
    assert status == 1
    assert "training stopped: --max_bad_samples 0.085: 2 of" in printed
    assert "× OSError: image file is truncated" in printed
    assert "Final result" not in printed

    status, _, printed = train(*common, data=broken, out="refused")
    assert status == 2
    assert "error: --max_bad_samples 0.01: 2 of 24 samples (8.33%)" in printed
    assert "no image" in printed and "caption is not UTF-8" in printed


def alpha_images(folder, alpha):
    """Two pictures of random colours with the same alpha channel, of 0 or 1 a pixel."""
    folder.mkdir()
    for number in range(2):
        colours = np.random.default_rng(number).integers(0, 256, (64, 64, 3), dtype=np.uint8)
        pixels = np.concatenate([colours, np.full((64, 64, 1), 255, np.uint8) * alpha[..., None]], axis=-1)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        (folder / f"{number}.txt").write_text("a picture")
    return folder


def test_masks_of_two_halves_share_the_loss_of_the_whole(train, tmp_path):
    left = np.repeat(np.arange(64)[None] < 32, 64, axis=0)
    losses = {}
    for name, alpha in (("whole", left | True), ("left", left), ("right", ~left)):
        data = alpha_images(tmp_path / f"data_{name}", alpha)
        arguments = ("--alpha_mask", "--masked_loss", "--max_train_steps=1", "--train_batch_size=2")
        _, folder, printed = train(*arguments, data=data, out=name)
        losses[name] = metrics(folder)[0]["loss"]
    assert losses["left"] + losses["right"] == pytest.approx(losses["whole"], rel=1e-4), printed
    assert min(losses.values()) > 0.2 * losses["whole"]
    status, _, printed = train("--masked_loss", data=data)
    assert status == 2
    assert "--masked_loss has no masks" in printed and "--alpha_mask" in printed


def test_the_data_is_shown_instead_of_trained_on_and_no_weights_are_read(train, monkeypatch, tmp_path):
    def load(*args, **kwargs):
        raise AssertionError("the model is loaded")

    seen = samples_seen(monkeypatch)
    size = ("--max_train_steps=3", "--train_batch_size=2", "--gradient_accumulation_steps=2")
    train(*size, "--flip_aug", out="trained")
    names = [name for _, step_names in seen for name in step_names]
    monkeypatch.setattr(build, "load_model", load)
    status, folder, printed = train("--debug_dataset", *size, "--flip_aug")
    assert status == 0, printed
    assert [str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()] == [
        "debug_dataset/index.html"
    ]
    page = (folder / "debug_dataset" / "index.html").read_text()
    assert re.findall(r"<dt>name</dt><dd>(.*?)</dd>", page) == names  # twelve, in the order of training
    assert len(names) == 12
    assert re.findall(r"<dt>tokens</dt><dd>(\d+) of (\d+)", page)[0][1] == "75"
    assert train("--debug_dataset", "--dry_run")[0] == 2
