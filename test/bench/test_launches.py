"""The count of launches and waits, and what it holds the loop to: the host waits for the device once a step."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "test"))

from npu_sim.environment import reason_to_skip  # noqa: E402


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_launches", ROOT / "bench" / "launches.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_views_launch_nothing_and_reading_waits(bench):
    counting = bench.Counting("cpu")
    with counting:
        x = torch.ones(2, 3)
        y = x.view(3, 2).t()
        assert counting.taken() == {"launches": 1, "waits": 0}
        y.add_(1)
        assert counting.taken() == {"launches": 1, "waits": 0}
        assert float(y.sum()) == 12
        assert counting.taken() == {"launches": 2, "waits": 1}


@pytest.mark.skipif(reason_to_skip() is not None, reason=str(reason_to_skip()))
@pytest.mark.parametrize(
    ("name", "waits"),
    [
        ("fp32", 1),
        pytest.param("fp32, fused_backward_pass", 2, marks=pytest.mark.all),  # the loss, before weights change
        pytest.param("fp16, loss scaling", 3, marks=pytest.mark.all),  # whether it overflowed, the scale for the log
    ],
)
def test_the_host_waits_for_the_device_once_a_step(bench, tiny_sdxl_folder, small_shard, tmp_path, name, waits):
    flags = bench.training_flags(tiny_sdxl_folder, small_shard, tmp_path / "out")
    found = bench.in_child("--run", *flags, *bench.RUNS[name])
    assert found["waits"] == waits, found
    assert found["launches"] > 500
