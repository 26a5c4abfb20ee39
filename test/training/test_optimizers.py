"""Optimizer and learning-rate schedules against torch's and against curves worked by hand."""

import math

import pytest
import torch
from torch import nn

from library.errors import InputError
from library.training.optimizers import ParameterGroup, make_lr_schedule, make_optimizer, parse_optimizer_args


def weights(seed=0):
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(7, 5, generator=random)), nn.Parameter(torch.randn(3, generator=random))]


@pytest.mark.parametrize("optimizer_type", ["AdamW", "adamw", "oss"])
def test_adamw_steps_as_torchs_plain_one(optimizer_type):
    ours, peers = weights(), weights()
    groups = [ParameterGroup("unet", ours[:1], 1e-2), ParameterGroup("text_encoder1", ours[1:], 1e-3)]
    optimizer = make_optimizer(optimizer_type, groups, ["weight_decay=0.1", "betas=0.8,0.9"])
    peer = torch.optim.AdamW(
        [{"params": peers[:1], "lr": 1e-2}, {"params": peers[1:], "lr": 1e-3}],
        weight_decay=0.1, betas=(0.8, 0.9), foreach=False, fused=False,
    )  # fmt: skip
    random = torch.Generator().manual_seed(1)
    for _ in range(5):
        for mine, other in zip(ours, peers, strict=True):
            mine.grad = torch.randn(mine.shape, generator=random)
            other.grad = mine.grad.clone()
        optimizer.step()
        peer.step()
    for mine, other in zip(ours, peers, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize(
    ("optimizer_type", "arguments", "message"),
    [
        ("Lion", [], "--optimizer_type 'Lion'.*AdamW, oss"),
        ("AdamW", ["weight_decay"], "--optimizer_args 'weight_decay' is not NAME=VALUE"),
        ("AdamW", ["weight_decay=abc"], "--optimizer_args 'weight_decay=abc'"),
        ("AdamW", ["momentum=0.9"], "--optimizer_args momentum: AdamW takes betas"),
        ("AdamW", ["lr=1"], "--optimizer_args lr"),
        ("AdamW", ["betas=2,3"], "--optimizer_args: AdamW refuses"),
        ("AdamW", ["differentiable=True"], "--optimizer_args: AdamW refuses"),
    ],
)
def test_a_bad_optimizer_setting_is_named(optimizer_type, arguments, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(optimizer_type, [ParameterGroup("unet", weights(), 1e-3)], arguments)


def test_arguments_are_python_literals():
    assert parse_optimizer_args(["betas=0.9,0.95", "amsgrad=True", "eps=1e-6"]) == {
        "betas": (0.9, 0.95), "amsgrad": True, "eps": 1e-6,
    }  # fmt: skip


def curve(name, steps=20, warmup=0, cycles=1, power=1.0, lr=1.0):
    optimizer = make_optimizer(
        "AdamW", [ParameterGroup("unet", weights(), lr), ParameterGroup("te", weights(), lr / 10)], []
    )
    schedule = make_lr_schedule(name, optimizer, steps, warmup, cycles, power)
    rates = []
    for _ in range(steps):
        rates.append([group["lr"] for group in optimizer.param_groups])
        optimizer.step()
        schedule.step()
    assert all(math.isclose(a, 10 * b) for a, b in rates)
    return [a for a, _ in rates]


def test_curves_are_those_of_their_formulas():
    steps = range(20)
    assert curve("constant") == [1.0] * 20
    assert curve("constant_with_warmup", warmup=4) == pytest.approx([min(s / 4, 1) for s in steps])
    assert curve("linear") == pytest.approx([1 - s / 20 for s in steps])
    assert curve("cosine") == pytest.approx([0.5 * (1 + math.cos(math.pi * s / 20)) for s in steps])
    assert curve("cosine_with_restarts", cycles=2) == pytest.approx(
        [0.5 * (1 + math.cos(math.pi * (2 * s / 20 % 1))) for s in steps]
    )
    assert curve("polynomial", power=2) == pytest.approx([(1 - 1e-7) * (1 - s / 20) ** 2 + 1e-7 for s in steps])


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"name": "cosine", "warmup": 21}, "--lr_warmup_steps=21 is longer"),
        ({"name": "polynomial", "lr": 1e-8}, "--lr_scheduler=polynomial"),
    ],
)
def test_a_schedule_that_cannot_be_is_named(settings, message):
    with pytest.raises(InputError, match=message):
        curve(**settings)
