"""The benchmark of decoding: its reference values are right, and its figures fit together."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from library.data.fit import Fit

PATH = Path(__file__).resolve().parents[2] / "bench" / "data.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_data", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_psnr_by_hand(bench):
    assert bench.psnr(np.full((2, 2), 10), np.full((2, 2), 20.0)) == pytest.approx(28.13, abs=0.01)  # 20·log10(255/10)
    assert bench.psnr(np.ones((2, 2)), np.ones((2, 2))) == 99


def test_a_picture_is_measured_at_the_scale_that_is_decoded(bench):
    data = bench.jpeg(bench.photo_like(240, 160, seed=0))
    case = bench.Case(data, (240, 160), (64, 64), Fit((96, 64), (16, 0)))
    row = bench.measure(case, None, rounds=1)
    assert row["decoded"] == (120, 80)
    assert row["psnr_db"]["ours"] > 35
    assert case.exact().shape == case.ours().shape == (64, 64, 3)
    totals = bench.sums([row, row])
    assert totals["share_of_decoding_speed"] == pytest.approx(row["ms"]["decoding"] / row["ms"]["ours"])
    json.dumps(row)


def test_the_loader_gives_its_speed(bench, tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "SIZES", ((600, 600), (900, 600)))
    pictures = [bench.jpeg(bench.photo_like(*size, seed=1)) for size in bench.SIZES]
    bench.write_shard(tmp_path / "00000.tar", pictures)
    assert bench.loader_speed(tmp_path, 512, 0, batches=1) > 0


def test_each_option_of_images_has_its_cost(bench):
    data = bench.jpeg(bench.photo_like(240, 160, seed=0))
    costs = bench.option_costs(bench.Case(data, (240, 160), (64, 64), Fit((96, 64), (16, 0))), rounds=1)
    assert {"flip_aug", "alpha_mask", "color_aug, hue", "color_aug, gamma", "resize_interpolation=area"} <= costs.keys()
    assert costs["color_aug, hue"] > 0
