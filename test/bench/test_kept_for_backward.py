"""The count of what is kept for backward, against a network whose saved tensors are known."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    sys.path.insert(0, str(ROOT / "bench"))
    spec = importlib.util.spec_from_file_location("bench_kept_for_backward", ROOT / "bench" / "kept_for_backward.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_each_storage_counts_once_and_weights_do_not(bench, monkeypatch):
    """A linear layer keeps its input, the exponential its output, which is its square's input, too."""
    layer = nn.Linear(3, 5, device="meta")
    x = torch.zeros(2, 3, device="meta")
    monkeypatch.setattr(bench, "make_network", lambda kind, case: (layer, lambda batch: layer(x).exp().square()))
    assert bench.kept_bytes("ours", bench.SMALL, (8, 8), 1) == 4 * (2 * 3 + 2 * 5)


def test_ours_keeps_less_than_diffusers(bench):
    ours, theirs = (bench.kept_bytes(kind, bench.SMALL, (16, 16), 2) for kind in bench.KINDS)
    assert 0 < ours < 0.7 * theirs
