"""The benchmark of merged products: what it times gives the same numbers both ways, for SDXL's layers."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_merged_products", ROOT / "bench" / "merged_products.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_both_ways_give_the_gradients_of_autograd(bench):
    layers = bench.make_layers(tokens=5, width=7, outs=(3, 4, 3))
    x = layers.x_MK.clone().requires_grad_()
    weights = [weight.clone().requires_grad_() for weight in layers.weights]
    outputs = [torch.nn.functional.linear(x, weight) for weight in weights]
    torch.autograd.backward(outputs, layers.grads)
    expected = {
        "output": torch.cat(outputs, dim=1),
        "gathering": torch.cat(layers.grads, dim=1),
        "to input": x.grad,
        "to weights": torch.cat([weight.grad for weight in weights]),
    }
    expected["to weights, kept memory"] = expected["to weights"]
    one, each = bench.merged(layers), bench.separate(layers)
    for part, run in one.items():
        torch.testing.assert_close(run(), expected[part])
    torch.testing.assert_close(torch.cat(each["output"](), dim=1), expected["output"])
    torch.testing.assert_close(each["to input"](), expected["to input"])
    torch.testing.assert_close(torch.cat(each["to weights"]()), expected["to weights"])


def test_sums_hold_each_part_once(bench):
    found = bench.measure(bench.make_layers(tokens=5, width=7, outs=(3, 4)), rounds=2)
    assert set(found["merged"]) == {*bench.IN_SUM, "to weights, kept memory", "sum"}
    assert set(found["separate"]) == {"output", "to input", "to weights", "sum"}
    assert set(found["merged / separate"]) == set(found["separate"])


def test_the_layers_are_sdxls(bench):
    tokens, width, outs = bench.cases()["keys and values of 70 layers"]
    assert (tokens, width) == (77, 2048)
    assert sorted(set(outs)) == [640, 1280]
    assert (outs.count(640), outs.count(1280)) == (2 * 10, 2 * 60)
