"""The benchmark of --sharding: its bytes are those of the formulas, and the page's; what counts them misses nothing."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "measurements" / "sharding.md"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    return load("sharding")


@pytest.fixture(scope="module")
def measured():
    """Memory on two processes: the printed lines and the JSON line."""
    command = [sys.executable, str(ROOT / "bench" / "sharding.py"), "--processes", "2", "--steps", "0"]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, timeout=300, env=env)
    assert done.returncode == 0, done.stderr[-4000:]
    *lines, last = done.stdout.splitlines()
    return lines, json.loads(last)


def test_the_pages_bytes_are_those_of_now(measured):
    rows = [line for line in measured[0] if line.startswith("| 2 | ")]
    page = PAGE.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 5
    for row in rows:
        assert row in page, f"run python bench/sharding.py --write {PAGE.relative_to(ROOT)}"


def test_bytes_are_those_of_the_formulas(bench, measured):
    scaling, held = bench.scaling, measured[1]["results"][0]["bytes"]
    sizes = scaling.trained_sizes(bench.UNet(bench.CASE.config))
    for kind, method in {"none": "ddp", "oss": "oss", "zero1": "zero1", "fsdp": "fsdp"}.items():
        formula = scaling.state_bytes(method, sizes, 2)
        seen = held[kind]["weights"], held[kind]["backward"], held[kind]["state"]
        assert seen == pytest.approx(tuple(formula.values()), rel=2e-3), kind
    assert held["fsdp"]["rest"] < 1000 and held["none"]["rest"] == pytest.approx(4 * sizes.total, rel=2e-3)


def test_accumulating_costs_no_more_but_with_oss(bench, measured):
    held = measured[1]["results"][0]["bytes"]
    for kind in ("none", "zero1", "fsdp"):
        assert held[kind]["accumulating"] == pytest.approx(held[kind]["backward"], rel=1e-3), kind
    in_proportion = held[bench.OSS_IN_PROPORTION]
    assert in_proportion["accumulating"] > 1.9 * in_proportion["backward"] > 1.9 * 50 * in_proportion["rest"]


def test_storages_count_with_their_present_size_while_anything_holds_them(bench):
    with bench.Storages() as storages:
        linear = nn.Linear(10, 10, bias=False)
        view = torch.empty(1000)[:1]
        gone = torch.empty(5000)
        resized = torch.empty(300)
        resized.untyped_storage().resize_(0)
        meta = torch.empty(7, device="meta")
        del gone
    assert sorted(size for size in storages.alive().values() if size) == [400, 4000]
    assert linear.weight.untyped_storage()._cdata in storages.alive() and view.numel() == 1 and meta.is_meta
    del view
    assert sum(storages.alive().values()) == 400
