"""The benchmark of growth: exponents are those of power laws, pictures are XML that shows them."""

import importlib.util
import re
import sys
import xml.etree.ElementTree as ET
from dataclasses import replace
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]
PAGES = ROOT / "docs" / "measurements"


def load(name):
    spec = importlib.util.spec_from_file_location(f"bench_{name}", ROOT / "bench" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look there
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def plot():
    return load("log_plot")


def test_a_power_law_is_found_and_noise_around_it_averages_out(plot):
    law = plot.fit([(x, 3 * x**1.5) for x in (1, 2, 4, 8)])
    assert law.exponent == pytest.approx(1.5)
    assert law.factor == pytest.approx(3)
    assert plot.fit([(1, 10), (10, 5), (10, 20)]).exponent == pytest.approx(0)  # half and twice: the middle of the logs


@pytest.mark.parametrize("points", [[(1, 2)], [(1, 2), (1, 3)], [(1, 2), (2, 0)]])
def test_what_has_no_power_law_is_refused(plot, points):
    with pytest.raises(ValueError, match="two different x"):
        plot.fit(points)


@pytest.mark.parametrize(("low", "high"), [(1, 8), (4096, 262144), (3.2, 3.3), (0.07, 4000)])
def test_ticks_enclose_the_points(plot, low, high):
    marks = plot.ticks(low, high)
    assert marks[0] <= low
    assert high <= marks[-1]
    assert len(marks) >= 2


def test_a_picture_shows_every_point_in_its_place_and_the_exponents(plot):
    series = [plot.Series("A & <B>", ((1, 10), (10, 100), (100, 1000))), plot.Series("C", ((1, 20), (100, 20)))]
    root = ET.fromstring(plot.log_plot("Time & size", "images", "ms", series))
    texts = [text.text for text in root.findall(".//{*}text")]
    assert "A & <B>: fitted exponent 1.00" in texts
    assert "Time & size" in texts
    circles = [(float(dot.get("cx")), float(dot.get("cy"))) for dot in root.findall(".//{*}circle")]
    assert len(circles) == 5
    (x1, y1), (x2, y2), (x3, y3) = circles[:3]
    assert x2 - x1 == pytest.approx(x3 - x2, abs=0.2)  # decades are equally far apart
    assert y1 - y2 == pytest.approx(y2 - y3, abs=0.2)
    assert y3 < y1  # more is further up
    width, height = float(root.get("width")), float(root.get("height"))
    assert all(0 < x < width and 0 < y < height for x, y in circles)


def test_micro_batches_add_up_to_one_step():
    bench = load("growth")
    case = replace(bench.CASE, config=bench.unet_steps.TINY)
    once, twice = bench.Steps(case), bench.Steps(case)
    before = [parameter.detach().clone() for parameter in once.parameters]
    assert float(once.take(bench.Load(8, 1, 1))) == pytest.approx(2 * float(twice.take(bench.Load(8, 1, 2))))
    for one, other, start in zip(once.parameters, twice.parameters, before, strict=True):
        assert torch.equal(one, other)
        assert not torch.equal(one, start)


def test_the_page_and_its_pictures_tell_of_the_same_run():
    bench = load("growth")
    page = (PAGES / "growth.md").read_text(encoding="utf-8")
    for growth in bench.GROWTHS:
        name = f"growth_{growth.name}.svg"
        assert f"({name})" in page
        texts = [text.text or "" for text in ET.parse(PAGES / name).getroot().findall(".//{*}text")]
        shown = [found[1] for text in texts if (found := re.search(r"fitted exponent (-?[\d.]+)$", text))]
        rows = [line for line in page.splitlines() if line.startswith(f"| {growth.title} |")]
        assert [row.split("|")[4].strip() for row in rows] == shown
        assert shown
