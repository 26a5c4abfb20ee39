"""The benchmark of a training step: both networks do the same work, and all products of a step are counted."""

import importlib.util
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from accelerate.state import AcceleratorState

PATH = Path(__file__).resolve().parents[2] / "bench" / "train_step.py"


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("bench_train_step", PATH)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def case(bench):
    return bench.Case(bench.TINY, (8, 8), 1, torch.float32, torch.device("cpu"), gradient_checkpointing=False)


@pytest.fixture(autouse=True)
def own_accelerator():
    """Ours takes its precision from the process's, which other tests set."""
    AcceleratorState._reset_state(reset_partial_state=True)
    yield
    AcceleratorState._reset_state(reset_partial_state=True)


def test_both_take_the_same_steps(bench, case):
    """Losses over three steps agree, so weights, batch, clipping and optimizer do, and they fall."""
    ours = bench.make_step("ours", case)
    theirs = bench.make_step("diffusers", case)
    losses = [(float(ours()), float(theirs())) for _ in range(3)]
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-5)
    assert losses[2][0] < losses[0][0]


def test_compiled_networks_take_the_same_steps(bench, case):
    compiled = replace(case, dynamo_backend="eager")
    assert compiled.kinds == ("ours", "diffusers", "ours compiled", "diffusers compiled")
    steps = [bench.make_step(kind, compiled) for kind in compiled.kinds]
    losses = [[float(step()) for step in steps] for _ in range(2)]
    assert all(one == pytest.approx(row[0], rel=1e-5) for row in losses for one in row)


def test_backward_takes_the_whole_step_and_frees_each_gradient(bench, case):
    """The losses are diffusers', whose gradients' norms are below 1, where clipping does nothing."""
    fused, theirs = bench.make_step("ours fused", case), bench.make_step("diffusers", case)
    losses = []
    for _ in range(3):  # without `update`, which only forgets norms
        losses.append((float(fused.forward_backward()), float(theirs())))
        assert all(parameter.grad is None for parameter in fused.network.parameters())
    for one, other in losses:
        assert one == pytest.approx(other, rel=1e-6)
    assert losses[2][0] < losses[0][0]


def test_forward_and_both_products_of_backward_are_recorded_and_run_again(bench):
    layer, convolution = torch.nn.Linear(6, 3), torch.nn.Conv2d(2, 4, 3)
    x, image = torch.randn(5, 6, requires_grad=True), torch.randn(1, 2, 8, 8, requires_grad=True)
    with bench.ProductRecorder() as recorder:
        for _ in range(2):
            (F.gelu(layer(x)).sum() + convolution(image).sum()).backward()
    replay, calls = bench.product_replay(recorder, torch.device("cpu"))
    assert calls == 2 * (3 + 2)  # a convolution's backward is one call
    with bench.ProductRecorder() as again:
        replay()
    assert sum(again.calls.values()) == calls


def test_figures_are_one_json_object_of_processes_that_take_turns(bench, case, capsys):
    arguments = ["--size=tiny", "--latent=8x8", "--batch=1", "--device=cpu", "--fused_backward_pass"]
    result = bench.measure(arguments, replace(case, fused_backward_pass=True), steps=2, warmup=0)
    json.dumps(result)
    assert result["loss_relative_difference"] < 1e-5
    assert result["loss"]["ours fused"] == result["loss"]["ours"]
    assert {"ours", "ours fused", "diffusers", "products"} <= set(result["ms"])
    peaks = {kind: memory["peak"] for kind, memory in result["memory_bytes"].items()}
    assert result["memory_ratio"]["ours fused"] == peaks["ours fused"] / peaks["diffusers"] > 0
    bench.print_table(result)
    printed = capsys.readouterr().out
    assert "fused step, ours / diffusers'" in printed and "peak memory, ours fused / diffusers'" in printed


def test_the_floating_point_operations_are_three_forwards_of_diffusers_network(bench, case):
    from torch.utils.flop_counter import FlopCounterMode
    from unet_steps import make_inputs

    network = bench.make_step("diffusers", case).network.to("meta")  # where attention is products, which it counts
    batch = make_inputs(bench.replace(case, device=torch.device("meta")))
    added = {"text_embeds": batch.pooled_BP, "time_ids": batch.sizes_B6}
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network(batch.x_BCHW, batch.t_B, batch.context_BTX, added_cond_kwargs=added)
    assert bench.model_flops(case) == pytest.approx(3 * counter.get_total_flops(), rel=1e-3)


def test_the_share_of_a_known_peak_is_said_in_half_precision_alone(bench, case, monkeypatch):
    monkeypatch.setattr(bench, "model_flops", lambda case: 4e12)
    monkeypatch.setattr(bench.devices, "device_name", lambda device: "NVIDIA A100-SXM4-80GB")
    ms = {kind: {"median": 50.0} for kind in case.kinds}
    half = bench.speed_figures(bench.replace(case, dtype=torch.bfloat16), ms)
    assert half["tflops"]["ours"] == pytest.approx(80) and half["mfu"]["ours"] == pytest.approx(80 / 312)
    assert "mfu" not in bench.speed_figures(case, ms)


@pytest.mark.all
def test_where_the_device_holds_one_network_each_has_it_for_itself(bench, case):
    arguments = ["--size=tiny", "--latent=8x8", "--batch=1", "--device=cpu"]
    result = bench.measure(arguments, case, steps=4, warmup=0, apart=True)
    assert result["loss_relative_difference"] < 1e-5
    assert {"ours", "diffusers", "products"} <= set(result["ms"])
