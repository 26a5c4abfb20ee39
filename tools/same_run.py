#!/usr/bin/env python
"""Compare the runs of two checkouts, which must train the same: the gate of a change of structure.

    git worktree add ../before HEAD~1 && python tools/same_run.py ../before

Both train the demo's model for a few steps in several settings, with the same interpreter, on the CPU and on the
simulated NPU. metrics.jsonl (its times, speeds and run ids left out) and every checkpoint must be equal bit for bit. It
ends with status 1 if they differ.
"""

import argparse
import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
TIMED = {"images_per_second", "images_per_second_without_wait", "data_wait_seconds", "memory_bytes", "time", "run"}
COMMON = (
    "--resolution=64,64", "--enable_bucket", "--min_bucket_reso=48", "--max_bucket_reso=80", "--bucket_reso_steps=8",
    "--caption_extension=.txt", "--train_batch_size=2", "--seed=3", "--learning_rate=1e-3",
    "--max_data_loader_n_workers=0",
)  # fmt: skip
CASES = {
    "plain": ("--max_train_steps=4", "--shuffle_caption", "--caption_dropout_rate=0.3"),
    "text encoders, v, averages": (
        "--max_train_steps=3", "--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate_te2=1e-3",
        "--v_parameterization", "--zero_terminal_snr", "--use_ema", "--save_model_as=safetensors",
        "--save_every_n_steps=2", "--gradient_checkpointing", "--lr_scheduler=cosine",
    ),
    "caches, fused backward": (
        "--max_train_steps=3", "--cache_latents", "--cache_text_encoder_outputs", "--fused_backward_pass",
        "--optimizer_type=AdaFactor", "--optimizer_args", "relative_step=False", "scale_parameter=False",
    ),
}  # fmt: skip
ON_NPU = {
    "npu, fp16": (
        "--max_train_steps=3", "--mixed_precision=fp16", "--enable_npu_flash_attention", "--gradient_checkpointing",
        "--train_text_encoder", "--learning_rate_te1=1e-3", "--learning_rate_te2=1e-3",
    ),
}  # fmt: skip


def train(checkout: Path, inputs: Path, out: Path, flags: tuple[str, ...], on_npu: bool) -> dict[str, str]:
    """Digests of what a run has written, by file; its metrics without times."""
    command = [
        sys.executable, "sdxl_pretrain.py", f"--pretrained_model_name_or_path={inputs / 'model'}",
        f"--train_data_dir={inputs / 'data'}", f"--output_dir={out}", *COMMON, *flags,
    ]  # fmt: skip
    if on_npu:
        command = [sys.executable, "test/npu_sim/environment.py", *command]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=checkout, env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(
            f"{checkout}: {' '.join(command)} ended with {done.returncode}:\n{(done.stdout + done.stderr)[-3000:]}"
        )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    found = {"metrics.jsonl": json.dumps([{k: v for k, v in line.items() if k not in TIMED} for line in lines])}
    for path in sorted(out.rglob("*")):
        if path.suffix in (".safetensors", ".bin", ".ckpt"):
            found[str(path.relative_to(out))] = _digest(path)
    return found


def _digest(path: Path) -> str:
    """SHA-256 of a file; of a safetensors file's tensors alone, for its metadata may hold a date."""
    content = path.read_bytes()
    if path.suffix == ".safetensors":
        content = content[8 + int.from_bytes(content[:8], "little") :]
    return hashlib.sha256(content).hexdigest()


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("other", type=Path, help="the checkout to compare with")
    parser.add_argument("--work", type=Path, default=ROOT / "test/output/same_run", help="(%(default)s)")
    parser.add_argument("--no_npu", action="store_true", help="the CPU alone")
    args = parser.parse_args()
    inputs = args.work / "inputs"
    for part in ("data", "model"):
        if not (inputs / part).exists():
            subprocess.run(
                [sys.executable, f"tools/demo/make_{part}.py", f"--out={inputs / part}"], cwd=ROOT, check=True
            )
    different = 0
    for name, flags in {**CASES, **({} if args.no_npu else ON_NPU)}.items():
        results = []
        for checkout in (args.other.resolve(), ROOT):
            out = args.work / f"{len(results)}-{name.replace(' ', '-')}"
            subprocess.run(["rm", "-rf", str(out)], check=True)
            results.append(train(checkout, inputs, out, flags, name in ON_NPU))
        unequal = sorted(
            key for key in results[0].keys() | results[1].keys() if results[0].get(key) != results[1].get(key)
        )
        different += bool(unequal)
        print(
            f"{name}: {'DIFFERENT: ' + ', '.join(unequal) if unequal else f'same ({len(results[0])} files)'}",
            flush=True,
        )
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
