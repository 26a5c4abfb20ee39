"""sdxl_pretrain.py on the simulated NPU, from the command line to its files: what it does on the CPU it does there, in
one process and in two, in fp32 and in fp16 with loss scaling, fused attention and gradient checkpointing.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(HERE))

from npu_sim.environment import environment, reason_to_skip  # noqa: E402

pytestmark = pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))

STEPS = 3
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2")


@pytest.fixture(scope="module")
def train(tiny_sdxl_folder, small_shard, tmp_path_factory):
    """Runs the script in processes of its own; returns (output folder, metrics, what it printed)."""

    def run(env, *arguments, launcher=(), out=None):
        out = out or tmp_path_factory.mktemp("out")
        command = [
            sys.executable, *launcher, str(ROOT / "sdxl_pretrain.py"),
            f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={small_shard}", "--resolution=64",
            "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
            "--caption_extension=.txt", "--max_data_loader_n_workers=0", "--seed=1", f"--max_train_steps={STEPS}",
            "--learning_rate=1e-3", "--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate_te2=1e-3",
            "--train_batch_size=2", f"--gradient_accumulation_steps={1 if launcher else 2}",
            "--save_model_as=safetensors", f"--output_dir={out}",
            *arguments, "--optimizer_args", "eps=1e-3",  # Adam turns gradients that are rounding noise into whole steps
        ]  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=300)
        printed = done.stdout + done.stderr
        assert done.returncode == 0, printed[-6000:]
        return out, [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()], printed

    return run


@pytest.fixture(scope="module")
def on_cpu(train):
    return train({**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)})


def assert_same_training(one, other, rtol):
    """The same losses, gradient norms and final weights."""
    (folder, lines, _), (other_folder, other_lines, _) = one, other
    assert len(lines) == len(other_lines) == STEPS
    for line, other_line in zip(lines, other_lines, strict=True):
        assert other_line["loss"] == pytest.approx(line["loss"], rel=rtol)
        assert other_line["grad_norm"] == pytest.approx(line["grad_norm"], rel=20 * rtol)
    weights, other_weights = (load_file(path / "last.safetensors") for path in (folder, other_folder))
    assert weights.keys() == other_weights.keys()
    for name, weight in weights.items():
        torch.testing.assert_close(
            other_weights[name], weight, rtol=rtol, atol=20 * rtol, msg=lambda m, n=name: f"{n}: {m}"
        )


def test_fp32_training_equals_the_cpus(train, on_cpu):
    on_npu = train(environment())
    assert "device: Ascend910B3 x 1" in on_npu[2]
    assert "float32 on npu" in on_npu[2] and "on cpu" not in on_npu[2]
    assert_same_training(on_cpu, on_npu, rtol=1e-5)
    # Tensors on the device, not the process: far less than Python with torch holds, more than weights and both moments.
    parameters = sum(weight.numel() for weight in load_file(on_npu[0] / "last.safetensors").values())
    assert 3 * 4 * parameters < on_npu[1][-1]["memory_bytes"] < on_cpu[1][-1]["memory_bytes"]


def test_two_processes_train_as_one(train, on_cpu):
    double = train(environment(), launcher=TORCHRUN)
    assert "device: Ascend910B3 x 2" in double[2]
    assert_same_training(on_cpu, double, rtol=1e-5)


def test_fp16_with_fused_attention_and_checkpointing_trains_samples_and_saves(train, on_cpu, tmp_path):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red photo --w 64 --h 48 --s 2 --l 3 --d 7\n")
    out, lines, printed = train(
        environment(),
        "--mixed_precision=fp16", "--enable_npu_flash_attention", "--gradient_checkpointing",
        f"--sample_prompts={prompts}", "--sample_at_first", f"--sample_every_n_steps={STEPS}",
        "--optimizer_type=oss", launcher=TORCHRUN,
    )  # fmt: skip
    assert "sharding: oss" in printed and "patched fairscale.optim.oss:OSS.zero_grad" in printed
    attention = [line for line in printed.splitlines() if "attention: " in line and " on npu" in line]
    assert attention and all("attention: npu, float16 on npu" in line for line in attention)
    assert [line["updated"] for line in lines] == [True] * STEPS
    assert [line["loss_scale"] for line in lines] == [2.0**7] * STEPS
    for line, exact in zip(lines, on_cpu[1], strict=True):
        assert line["loss"] == pytest.approx(exact["loss"], rel=2e-3)
        assert line["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)
    weights, exact = (load_file(folder / "last.safetensors") for folder in (out, on_cpu[0]))
    for name, weight in weights.items():
        assert weight.dtype == torch.float32, name
        torch.testing.assert_close(weight, exact[name], rtol=0, atol=5e-3, msg=lambda m, n=name: f"{n}: {m}")
    samples = sorted((out / "sample").glob("*.png"))
    assert [Image.open(path).size for path in samples] == [(64, 48)] * 2
    assert "Final Performance images/sec" in printed


@pytest.mark.all
def test_compiled_blocks_train_as_plain_ones_with_fused_attention_between_their_graphs(train, on_cpu):
    compiled = ["--torch_compile", "--dynamo_backend=aot_eager"]
    assert_same_training(on_cpu, train(environment(), *compiled), rtol=1e-5)
    half = ["--mixed_precision=fp16", "--enable_npu_flash_attention", "--gradient_checkpointing"]
    _, plain, _ = train(environment(), *half)
    _, lines, printed = train(environment(), *half, *compiled)
    assert "by aot_eager" in printed and "attention between their graphs: npu" in printed
    assert any("attention: npu, float16 on npu" in line for line in printed.splitlines())
    for line, exact in zip(lines, plain, strict=True):
        assert line["loss"] == pytest.approx(exact["loss"], rel=2e-3)
        assert line["grad_norm"] == pytest.approx(exact["grad_norm"], rel=5e-2)


def test_fp16_with_oss_goes_on_from_a_state_as_if_it_had_not_stopped(train):
    """Loss scale, schedule and each process's share of the moments come back: the same weights, bit for bit."""
    arguments = ["--mixed_precision=fp16", "--optimizer_type=oss", "--lr_scheduler=cosine"]
    out, lines, _ = train(environment(), *arguments, "--save_state_every_n_steps=1", launcher=TORCHRUN)
    for name in (f"at-step{STEPS:08d}-state", "last.safetensors"):
        (out / name).rename(out / f"gone.{name}")
    _, resumed, printed = train(environment(), *arguments, "--resume=auto", launcher=TORCHRUN, out=out)
    assert f"{STEPS - 1} steps are done" in printed
    assert [line["loss"] for line in resumed] == [line["loss"] for line in lines]
    assert [line["loss_scale"] for line in resumed] == [line["loss_scale"] for line in lines]
    weights, expected = (load_file(out / f"{prefix}last.safetensors") for prefix in ("", "gone."))
    assert [name for name in expected if not torch.equal(weights[name], expected[name])] == []


def test_a_torch_npu_that_cannot_be_imported_is_an_error_that_says_what_to_do(tiny_sdxl_folder, small_shard, tmp_path):
    """As where CANN's environment is not set: the package is there, its import fails."""
    env = environment()
    del env["NPU_SIM_LIBRARY"]
    command = [sys.executable, "sdxl_pretrain.py", f"--pretrained_model_name_or_path={tiny_sdxl_folder}"]
    arguments = [
        f"--train_data_dir={small_shard}",
        "--resolution=64",
        "--max_train_steps=1",
        f"--output_dir={tmp_path}",
    ]
    done = subprocess.run([*command, *arguments], cwd=ROOT, env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2
    assert "error: torch_npu is installed but cannot be imported" in done.stderr and "set_env.sh" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.all
def test_the_demo_learns_on_the_npu(tmp_path):
    """The launcher's demo in fp16 with fused attention: about six minutes, judged by its pictures."""
    command = [
        "bash",
        "test/pretrain_full_1m_1p_sdxl.sh",
        "--demo",
        "--mixed_precision=fp16",
        f"--output_dir={tmp_path}",
    ]
    env = {**environment(), "PYTHON": sys.executable}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=3600)
    printed = done.stdout + done.stderr
    assert done.returncode == 0, printed[-4000:]
    assert "device: Ascend910B3 x 1" in printed
    assert "attention: npu, float16 on npu" in printed


@pytest.mark.all
def test_bf16_weights_are_rounded_there_too(train, on_cpu):
    out, lines, printed = train(
        environment(),
        "--mixed_precision=bf16", "--full_bf16", "--save_state_on_train_end", "--optimizer_type=oss",
        launcher=TORCHRUN,
    )  # fmt: skip
    assert "weights, gradients and optimizer state in bf16, update: stochastic" in printed
    for line, exact in zip(lines, on_cpu[1], strict=True):
        assert line["loss"] == pytest.approx(exact["loss"], rel=2e-2)
    state = load_file(out / "last-state" / "rank00000-of-00002.training.safetensors")
    assert {one.dtype for name, one in state.items() if one.dim()} == {torch.bfloat16}


def test_no_operator_is_new(train, tmp_path):
    """What training, sampling, and a network module beside a frozen U-Net launch on the NPU is in a list.

    An operator that is not in it may be one that CANN lacks for a dtype, or that is slow there: look at it, then add it
    to test/npu_sim/dispatched_operators.txt. One that torch_npu has no kernel for ends its run already.
    """
    (tmp_path / "prompts.txt").write_text("a red photo --w 64 --h 48 --s 2 --l 3 --d 7\n")
    env = {**environment(), "NPU_SIM_DISPATCHED": str(tmp_path / "operators.txt")}
    train(
        env,
        "--mixed_precision=bf16", "--full_bf16", "--use_ema", "--v_parameterization", "--zero_terminal_snr",
        "--gradient_checkpointing", f"--sample_prompts={tmp_path / 'prompts.txt'}", "--sample_at_first",
    )  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-q", str(HERE / "npu_sim" / "inside" / "networks.py")]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    known, registered = (
        set(re.findall(r"^\w\S*$", (HERE / "npu_sim" / f"{name}_operators.txt").read_text(), re.MULTILINE))
        for name in ("dispatched", "registered")
    )
    assert sorted(set((tmp_path / "operators.txt").read_text().split()) - known) == []
    assert known <= registered
