"""A run that goes on from a training state is the run that was not stopped, through sdxl_pretrain.py and its files."""

import os
import shutil
import signal
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from library.training import preview
from library.training.state.resume import log_changed_options, versions
from library.training.task import Task
from test.conftest import STEPS
from test.data.shard_server import ShardServer
from test.training_runs import assert_same_weights, lines, state_of

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def undisturbed(train, tmp_path_factory):
    """A run to the end that saves a state after every step."""
    out = tmp_path_factory.mktemp("undisturbed")
    assert train(out, "--save_state_every_n_steps=1", "--logging_dir", str(out / "logs")) == 0
    return out


def stopped_after(step: int, undisturbed: Path, out: Path) -> Path:
    """What a run that was killed after a step leaves: states to there, metrics a little beyond."""
    out.mkdir()
    for done in range(1, step + 1):
        shutil.copytree(undisturbed / state_of(done), out / state_of(done))
    written = (undisturbed / "metrics.jsonl").read_text().splitlines(keepends=True)
    (out / "metrics.jsonl").write_text("".join(written[: step + 2]) + '{"step": 99, "lo')
    return out


@contextmanager
def recorded():
    """What each micro-batch shows, as (step, number, names, captions), in a list that fills while a run trains."""
    seen = []
    real = Task.loss

    def loss(self, module, batch):
        seen.append((batch.step, batch.micro, tuple(batch.names), tuple(batch.captions)))
        return real(self, module, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Task, "loss", loss)
        yield seen


@pytest.fixture(scope="module")
def shown(train, tmp_path_factory):
    """What a run to the end shows that saves no state."""
    with recorded() as seen:
        assert train(tmp_path_factory.mktemp("whole")) == 0
    return seen


@pytest.mark.parametrize("step", [1, 3, STEPS - 1])
def test_a_resumed_run_is_the_run_that_was_not_stopped(train, undisturbed, shown, tmp_path, step):
    out = stopped_after(step, undisturbed, tmp_path / "resumed")
    with recorded() as seen:
        assert train(out, "--resume=auto", "--save_state_on_train_end") == 0
    assert seen == [one for one in shown if one[0] >= step]
    assert_same_weights(out, undisturbed)
    assert_same_weights(out, undisturbed, "last-ema.safetensors")
    assert lines(out) == lines(undisturbed)
    ends = [
        load_file(folder / "rank00000-of-00001.training.safetensors")
        for folder in (out / "last-state", undisturbed / state_of(STEPS))
    ]
    assert ends[0].keys() == ends[1].keys() and all(torch.equal(ends[0][key], ends[1][key]) for key in ends[0])


def test_pictures_that_a_signal_has_cut_off_are_drawn_when_the_run_goes_on(train, tmp_path, monkeypatch):
    """Pixel by pixel those of a run that was left alone; what is drawn already is not drawn again."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red photo --w 32 --h 32 --s 1 --l 1\n" * 2)
    short = ("--max_train_steps=2", "--train_batch_size=1", "--gradient_accumulation_steps=1")
    flags = (*short, f"--sample_prompts={prompts}", "--sample_every_n_steps=1", "--save_state_every_n_steps=1")
    assert train(tmp_path / "whole", *flags) == 0
    out, real = tmp_path / "out", preview.write_file

    def stop(path, write):
        real(path, write)
        os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch:
        patch.setattr(preview, "write_file", stop)
        assert train(out, *flags) == 143
    first = {path: path.stat().st_mtime_ns for path in (out / "sample").iterdir()}
    assert [path.name.split("_", 1)[1] for path in first] == ["000001_00.png"]
    assert train(out, *flags, "--resume=auto") == 0
    assert {path: path.stat().st_mtime_ns for path in first} == first
    found, expected = (
        {path.name.split("_", 1)[1]: path.read_bytes() for path in (folder / "sample").iterdir()}
        for folder in (out, tmp_path / "whole")
    )
    assert len(list((out / "sample").iterdir())) == len(expected) == 4
    assert found == expected
    assert_same_weights(out, tmp_path / "whole")


def test_adafactor_in_backward_goes_on_as_if_it_had_not_stopped(train, tmp_path):
    arguments = [
        "--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
        "--fused_backward_pass", "--gradient_accumulation_steps=1", "--save_state_every_n_steps=3",
    ]  # fmt: skip
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(whole, *arguments) == 0
    out.mkdir()
    shutil.copytree(whole / state_of(3), out / state_of(3))
    assert train(out, *arguments, "--resume=auto") == 0
    assert_same_weights(out, whole)
    assert lines(out) == lines(whole)[3:]


BF16 = ["--mixed_precision=bf16", "--full_bf16", "--gradient_accumulation_steps=1", "--max_train_steps=4"]
IN_BACKWARD = ["--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False"]


@pytest.mark.parametrize(
    "arguments",
    [[], [*IN_BACKWARD, "--fused_backward_pass", "--bf16_update=kahan"]],
    ids=["AdamW, stochastic", "AdaFactor in backward, kahan"],
)
def test_bf16_weights_go_on_as_if_they_had_not_stopped(train, tmp_path, arguments, caplog):
    """Bit for bit: rounding at random hangs on the seed, the update and the place. Only --full_bf16 goes on with it."""
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(whole, *BF16, *arguments, "--save_state_every_n_steps=2") == 0
    out.mkdir()
    shutil.copytree(whole / state_of(2), out / state_of(2))
    assert train(out, *BF16, *arguments, "--resume=auto") == 0
    assert_same_weights(out, whole)
    assert_same_weights(out, whole, "last-ema.safetensors")
    assert lines(out) == lines(whole)[2:]
    saved = load_file(out / state_of(2) / "rank00000-of-00001.training.safetensors")
    precisions = {name.rpartition(".")[2]: tensor.dtype for name, tensor in saved.items()}
    assert precisions["weight"] == torch.bfloat16 and precisions["average"] == torch.float32
    without = [one for one in [*BF16, *arguments] if one != "--full_bf16" and "bf16_update" not in one]
    assert train(out, *without, "--resume=auto") == 2


@pytest.fixture(scope="module")
def streamed(small_shard, tmp_path_factory):
    """The pictures as three shards of a web server: their address."""
    folder = tmp_path_factory.mktemp("served")
    for number in range(3):
        shutil.copy(small_shard / "00000.tar", folder / f"{number:05d}.tar")
    server = ShardServer(folder)
    yield f"{server.address}/{{00000..00002}}.tar"
    server.stop()


def test_a_resumed_run_over_a_stream_is_the_run_that_was_not_stopped(train, streamed, tmp_path):
    stream = ("--stream_shuffle_buffer=9", "--max_data_loader_n_workers=1")
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert train(whole, *stream, "--save_state_every_n_steps=1", data=streamed) == 0
    stopped_after(3, whole, out)
    assert train(out, *stream, "--resume=auto", data=streamed) == 0
    assert_same_weights(out, whole)
    assert lines(out) == lines(whole)


@pytest.mark.all
def test_two_processes_go_on_over_a_stream(tiny_sdxl_folder, streamed, tmp_path):
    def run(out, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        done = subprocess.run(
            [
                *command, ROOT / "sdxl_pretrain.py", f"--pretrained_model_name_or_path={tiny_sdxl_folder}",
                f"--train_data_dir={streamed}", "--resolution=64", "--caption_extension=.txt", f"--output_dir={out}",
                "--seed=1", "--train_batch_size=2", "--stream_shuffle_buffer=9", "--save_state_every_n_steps=2",
                "--save_model_as=safetensors", "--max_data_loader_n_workers=1", "--resume=auto", *arguments,
            ],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=600,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    run(tmp_path / "whole", f"--max_train_steps={STEPS}", "--lr_scheduler=constant")
    run(tmp_path / "out", "--max_train_steps=2", "--lr_scheduler=constant")
    run(tmp_path / "out", f"--max_train_steps={STEPS}", "--lr_scheduler=constant")
    assert_same_weights(tmp_path / "out", tmp_path / "whole")


def test_the_newest_whole_state_resumes_and_the_log_says_what_was_passed_over(train, undisturbed, tmp_path, capfd):
    out = stopped_after(4, undisturbed, tmp_path / "out")
    with (out / state_of(4) / "rank00000-of-00001.training.safetensors").open("r+b") as file:
        file.seek(5000)
        byte = file.read(1)
        file.seek(5000)
        file.write(bytes([byte[0] ^ 1]))
    assert train(out, "--resume=auto") == 0
    printed = capfd.readouterr().err
    assert f"state passed over: {out / state_of(4)}" in printed and "its bytes have changed" in printed
    assert f"resumed from {out / state_of(3)}: 3 steps are done" in printed
    assert_same_weights(out, undisturbed)
    assert lines(out) == lines(undisturbed)


def test_resuming_from_nothing_is_a_start(train, undisturbed, tmp_path):
    assert train(tmp_path / "out", "--resume=auto") == 0
    assert_same_weights(tmp_path / "out", undisturbed)


def test_another_batch_size_would_put_other_samples_together_and_is_named(train, undisturbed, tmp_path, capfd):
    """Of the same global batch; how many processes share it may change, see the test of any number of processes."""
    out = stopped_after(3, undisturbed, tmp_path / "out")
    assert train(out, "--resume=auto", "--train_batch_size=1", "--gradient_accumulation_steps=4") == 2
    assert "--train_batch_size (2 then, 1 now)" in capfd.readouterr().err


def test_the_run_may_be_longer_than_it_was(train, undisturbed, tmp_path):
    out = stopped_after(STEPS, undisturbed, tmp_path / "out")
    assert train(out, "--resume=auto", f"--max_train_steps={STEPS + 2}", "--lr_scheduler=constant_with_warmup") == 0
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 3))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--seed=2", "--seed (1 then, 2 now)"),
        ("--train_batch_size=3", "the global batch: batch size × processes × accumulation (4 then, 6 now)"),
        ("--bucket_reso_steps=32", "the data or its buckets (fingerprint "),
        (f"--max_train_steps={STEPS - 4}", "3 steps are done, and the run is 2 steps long; raise --max_train_steps"),
        ("--optimizer_type=SGD", "it has the optimizer state of AdamW, which SGD cannot go on from"),
        ("--v_parameterization", "the prediction type (epsilon then, v_prediction now)"),
        ("--max_token_length=150", "the caption length in tokens (77 then, 150 now)"),
        ("--weighted_captions", "the weights in captions (not read then, read now)"),
        ("--learning_rate_te1=0", "text encoder 1 (trains then, frozen, weights "),
        ("--save_last_n_steps=5", "--save_last_n_steps has nothing to act on without --save_every_n_steps"),
    ],
)
def test_what_may_not_change_is_named(train, undisturbed, tmp_path, capfd, change, message):
    out = stopped_after(3, undisturbed, tmp_path / "out")
    before = sorted(path.name for path in out.iterdir())
    assert train(out, "--resume=auto", change) == 2
    assert message in capfd.readouterr().err
    assert set(before) <= {path.name for path in out.iterdir()}
    assert (out / state_of(3) / "manifest.json").exists()


def test_what_may_not_change_can_be_forced(train, undisturbed, tmp_path, capfd):
    out = stopped_after(3, undisturbed, tmp_path / "out")
    assert train(out, "--resume=auto", "--seed=2", "--resume_anyway") == 0
    assert "--resume_anyway" in capfd.readouterr().err
    assert [line["step"] for line in lines(out)] == list(range(1, STEPS + 1))


def test_a_folder_that_is_no_state_is_an_error(train, tmp_path, capfd):
    assert train(tmp_path / "out", f"--resume={tmp_path / 'nothing'}") == 2
    assert "no such folder; --resume takes the folder of a training state" in capfd.readouterr().err


@pytest.mark.all
def test_a_run_goes_on_on_any_number_of_processes_with_any_sharding(tiny_sdxl_folder, small_shard, tmp_path):
    """1 -> 2 with OSS -> 4 with FSDP2 -> 2 with ZeRO -> 1, a step each, against one process from start to end."""
    chain = [(1, "none", 1), (2, "oss", 2), (4, "fsdp", 3), (2, "zero1", 4), (1, "none", STEPS)]

    def run(out, processes, *arguments):
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={processes}"]
        done = subprocess.run(
            [
                *command, ROOT / "sdxl_pretrain.py", f"--pretrained_model_name_or_path={tiny_sdxl_folder}",
                f"--train_data_dir={small_shard}", "--resolution=64", "--enable_bucket", "--min_bucket_reso=32",
                "--max_bucket_reso=128", "--bucket_reso_steps=16", "--caption_extension=.txt", f"--output_dir={out}",
                "--max_data_loader_n_workers=0", "--seed=1", "--learning_rate=1e-3", "--train_text_encoder",
                "--train_batch_size=1", f"--gradient_accumulation_steps={4 // processes}", "--shuffle_caption",
                "--save_model_as=safetensors", *arguments,
                "--optimizer_args", "eps=1e-3",
            ],
            cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=900,
        )  # fmt: skip
        assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]

    run(tmp_path / "whole", 1, f"--max_train_steps={STEPS}")
    for processes, sharding, end in chain:
        run(tmp_path / "chain", processes, "--resume=auto", f"--sharding={sharding}", f"--max_train_steps={end}",
            "--save_state_every_n_steps=1")  # fmt: skip
    for mine, theirs in zip(lines(tmp_path / "chain"), lines(tmp_path / "whole"), strict=True):
        assert mine["step"] == theirs["step"]
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
    mine, theirs = (load_file(tmp_path / name / "last.safetensors") for name in ("chain", "whole"))
    for name, weight in theirs.items():
        torch.testing.assert_close(mine[name], weight, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def test_tensorboard_goes_on_in_its_folder_without_gap_or_double(train, undisturbed, tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    out = stopped_after(3, undisturbed, tmp_path / "out")
    shutil.copytree(undisturbed / "logs", out / "logs")  # to the last step
    assert train(out, "--resume=auto", f"--logging_dir={out / 'logs'}") == 0
    (board,) = (out / "logs").iterdir()
    events = EventAccumulator(str(board / "finetuning"))
    events.Reload()
    losses = events.Scalars("loss")
    assert [event.step for event in losses] == list(range(1, STEPS + 1))


def test_old_states_and_checkpoints_go_once_new_ones_are_there(train, tmp_path):
    out = tmp_path / "out"
    status = train(
        out, "--save_every_n_steps=1", "--save_last_n_steps=1", "--save_state", "--save_last_n_steps_state=2",
        "--max_train_steps=5",
    )  # fmt: skip
    assert status == 0
    names = {path.name for path in out.iterdir() if path.name != ".lock"}
    assert names == {
        "last.safetensors", "last-state", "metrics.jsonl", "run.config.toml", "at-step00000004.safetensors",
        "at-step00000005.safetensors",
        "last-ema.safetensors", "at-step00000004-ema.safetensors", "at-step00000005-ema.safetensors",
        state_of(3), state_of(4), state_of(5),
    }  # fmt: skip


def test_what_changed_since_the_state_is_said_and_flags_that_came_later_are_not(caplog):
    saved = SimpleNamespace(options={"max_train_steps": 10, "gone": 1}, versions=versions())
    log_changed_options(
        saved, {"max_train_steps": 20, "torch_compile": False, "blocks_to_swap": None, "full_bf16": True}
    )
    assert [record.getMessage().partition(": ")[2] for record in caplog.records] == [
        "option full_bf16, None -> True", "option gone, 1 -> None", "option max_train_steps, 10 -> 20",
    ]  # fmt: skip
