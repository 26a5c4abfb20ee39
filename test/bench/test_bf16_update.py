"""The benchmark of bf16 updates runs, and tells what the ways hold and achieve."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

BENCH = Path(__file__).resolve().parents[2] / "bench"


@pytest.mark.all
def test_it_tells_what_each_update_holds_and_achieves():
    command = [sys.executable, BENCH / "bf16_update.py", "--rows=8", "--rounds=2", "--steps=20"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    held = {way: round(one["bytes_a_parameter"], 1) for way, one in found["costs"].items()}
    assert held == {"torch AdamW, fp32": 16, "torch AdamW, bf16": 8, "stochastic": 8, "kahan": 10, "nearest": 8}
    for rate, ends in found["achieved"].items():
        share = {way: end[0] for way, end in ends.items()}
        assert abs(share["stochastic"] - 1) < 0.1, rate
        assert share["nearest"] < (0.9 if rate == "0.0001" else 0.3), rate
