"""The demo by its command: `bash test/pretrain_full_1m_1p_sdxl.sh --demo`."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def run_demo(out, *arguments, timeout_seconds):
    return subprocess.run(
        ["bash", "test/pretrain_full_1m_1p_sdxl.sh", "--demo", f"--output_dir={out}", *arguments],
        cwd=ROOT, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=timeout_seconds,
    )  # fmt: skip


def counts(printed):
    """How many pictures show the colour asked for, before and after training."""
    before = re.search(r"before training: (\d+) of 16 show the colour asked for", printed)
    after = re.search(r"^(\d+) of 16 show the colour asked for", printed, re.MULTILINE)
    assert before and after, printed[-3000:]
    return int(before.group(1)), int(after.group(1))


def test_a_demo_cut_short_goes_all_the_way_and_fails_its_judgement(tmp_path):
    done = run_demo(tmp_path, "--max_train_steps=4", timeout_seconds=600)
    printed = done.stdout + done.stderr
    assert done.returncode == 1, printed[-3000:]
    before, after = counts(printed)
    assert before < 8 and after < 8  # 2 of 16 by chance
    assert "------------------ Final result ------------------" in printed
    out = tmp_path / "0"
    for name in (
        "last.safetensors",
        "samples_before_after.png",
        "train_0.log",
        "metrics.jsonl",
        "SDXL_bs16_1p_acc.log",
    ):
        assert (out / name).is_file(), sorted(path.name for path in out.iterdir())
    assert len(list((out / "sample").glob("*.png"))) == 32


@pytest.mark.all
def test_the_demo_shows_the_colours_that_its_prompts_ask_for(tmp_path):
    done = run_demo(tmp_path, timeout_seconds=1800)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    before, after = counts(done.stdout)
    assert before <= 6
    assert after >= 12
