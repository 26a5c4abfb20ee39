"""The benchmark of a whole run: what it makes of the times of stages and steps."""

import importlib.util
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parents[2] / "bench" / "end_to_end.py"


def test_what_is_neither_arithmetic_nor_waiting_is_the_loops_own():
    spec = importlib.util.spec_from_file_location("bench_end_to_end", PATH)
    bench = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(bench)
    clock = bench.Clock(started=0.0)
    clock.ends = {"imports": 2.0, "data": 2.5, "model": 4.0, "first step": 5.0, "other steps": 9.0, "save": 9.5}
    clock.waits = [1.0] * 3 + [0.1] * 4 + [5.0]
    clock.between = [3.0] * 3 + [0.9] * 4  # the last step ends the run and not by asking for another batch
    clock.parts = {"loss": [0.3] * 8, "backward": [0.4] * 8, "clip": [0.05] * 8, "optimizer": [0.1] * 8}
    found = bench.summary(clock)
    assert found["stages_s"] == {
        "imports": 2.0, "data": 0.5, "model": 1.5, "first step": 1.0, "other steps": 4.0, "save": 0.5,
    }  # fmt: skip
    assert found["start_s"] == 5.0
    assert found["loop_ms"] == pytest.approx(50)
    assert found["loop_share"] == pytest.approx(0.05 / 0.9)
    assert found["wait_share"] == pytest.approx(0.1)
    assert found["images_per_second_of"] == pytest.approx(1.0)
