"""--blocks_to_swap from the command line on the simulated NPU: the run without it, bit for bit, in less memory."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from npu_sim.environment import environment, reason_to_skip  # noqa: E402

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))

STEPS = 4
SWAP = "--blocks_to_swap=6"


@pytest.fixture(scope="module")
def train(tiny_sdxl_folder, small_shard, tmp_path_factory):
    """Runs the script in a process of its own; returns (output folder, metrics, what it printed)."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.txt"
    prompts.write_text("a red photo --w 64 --h 48 --s 2 --l 3 --d 7\n")

    def run(*arguments, launcher=(), batch=2, out=None, status=0):
        out = out or tmp_path_factory.mktemp("out")
        command = [
            sys.executable, *launcher, str(ROOT / "sdxl_pretrain.py"),
            f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={small_shard}", "--resolution=64",
            "--caption_extension=.txt", "--max_data_loader_n_workers=0", "--seed=1", f"--max_train_steps={STEPS}",
            "--learning_rate=1e-3", f"--train_batch_size={batch}", "--save_model_as=safetensors",
            f"--output_dir={out}", f"--sample_prompts={prompts}", *arguments,
        ]  # fmt: skip
        # The first Ascend 910 writes attention out, as the simulated device does, and the estimate knows it.
        env = {**environment(), "NPU_SIM_NAME": "Ascend910A"}
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        printed = done.stdout + done.stderr
        assert done.returncode == status, printed[-6000:]
        metrics = out / "metrics.jsonl"
        lines = [json.loads(line) for line in metrics.read_text().splitlines()] if metrics.exists() else []
        return out, [line for line in lines if "loss" in line], printed

    return run


def assert_same_run(one, other):
    """Losses, norms, every file of weights and every picture."""
    (folder, lines, _), (other_folder, other_lines, _) = one, other
    for key in ("loss", "grad_norm", "loss_scale"):
        assert [line[key] for line in lines] == [line[key] for line in other_lines]
    for path in folder.glob("*.safetensors"):
        weights, other_weights = load_file(path), load_file(other_folder / path.name)
        assert [name for name in weights if not torch.equal(weights[name], other_weights[name])] == []
    pictures, others = (sorted((out / "sample").glob("*.png")) for out in (folder, other_folder))
    assert [path.read_bytes() for path in pictures] == [path.read_bytes() for path in others]


ALL_OF_IT = (
    "--train_text_encoder", "--use_ema", "--gradient_accumulation_steps=2", "--validation_split=0.2",
    "--validate_every_n_steps=2", "--sample_at_first", "--sample_every_n_steps=2", "--lr_scheduler=cosine",
)  # fmt: skip


@pytest.mark.all
def test_a_run_with_all_that_goes_along_is_the_run_without_and_states_go_on_either_way(train):
    plain, swapped = train(*ALL_OF_IT), train(*ALL_OF_IT, SWAP, "--save_state_every_n_steps=2")
    assert "blocks swapped: 6 of" in swapped[2] and (plain[0] / "last-ema.safetensors").exists()
    assert len(list((plain[0] / "sample").glob("*.png"))) == 3
    assert_same_run(plain, swapped)
    assert swapped[1][-1]["memory_bytes"] < plain[1][-1]["memory_bytes"]
    out = swapped[0]
    for gone in (*out.glob(f"at-step{STEPS:08d}-state"), *out.glob("last*.safetensors"), *out.glob("sample")):
        gone.rename(out.parent / f"gone-{out.name}-{gone.name}")
    resumed = train(*ALL_OF_IT, "--resume=auto", out=out)
    assert "2 steps are done" in resumed[2]
    for name in ("last.safetensors", "last-ema.safetensors"):
        weights, expected = load_file(out / name), load_file(plain[0] / name)
        assert [key for key in expected if not torch.equal(weights[key], expected[key])] == []


@pytest.mark.all
@pytest.mark.parametrize("arguments", [["--mixed_precision=fp16"], ["--gradient_checkpointing"]])
def test_memory_falls_as_the_dry_run_says(train, arguments):
    plain, swapped = train(*arguments), train(*arguments, SWAP)
    assert_same_run(plain, swapped)
    for flags, (_, lines, _) in (([], plain), ([SWAP], swapped)):
        _, _, printed = train(*arguments, *flags, "--dry_run")
        predicted = float(re.search(r"estimated device memory of a step: ([\d.]+)", printed)[1])
        assert predicted * 2**30 == pytest.approx(lines[-1]["memory_bytes"], rel=0.1)


@pytest.mark.all
def test_two_processes_swap_with_the_update_in_backward(train):
    torchrun = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")
    fused = ["--fused_backward_pass", "--optimizer_type=AdaFactor"]
    fused += ["--optimizer_args", "relative_step=False", "scale_parameter=False"]
    assert_same_run(*(train(*fused, *flags, launcher=torchrun, batch=1) for flags in ([], [SWAP])))


@pytest.mark.all
def test_more_blocks_than_there_are_is_an_error_that_says_how_many(train):
    _, _, printed = train("--blocks_to_swap=99", status=2)
    assert re.search(r"--blocks_to_swap=99: this model's U-Net has \d+ blocks", printed)
