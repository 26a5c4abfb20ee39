"""Optimizer and learning-rate schedules against torch's and against curves worked by hand."""

import json
import math
import sys

import pytest
import torch
from torch import nn

from library.errors import InputError
from library.options.optimizer import LR_SCHEDULERS
from library.training.engine.optimizers import (
    ParameterGroup,
    choose_optimizer,
    make_lr_schedule,
    make_optimizer,
    parse_optimizer_args,
)
from library.training.state.tensor_rows import make_part, read_state
from library.training.state.tree import pack, unpack

OWN_RATES = ["relative_step=False", "scale_parameter=False"]


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
        ("Lyon", [], "--optimizer_type 'Lyon' is not known; it is AdamW, oss, AdaFactor"),
        ("no_such_package.Adam", [], "needs the package no_such_package.*install it"),
        ("torch.nn.Linear", [], "torch.nn.Linear is no optimizer"),
        ("torch.optim.NoSuch", [], "torch.optim.NoSuch is no optimizer"),
        ("LBFGS", [], "'LBFGS' is not supported: it computes the loss several times"),
        ("PagedAdamW8bit", [], "'PagedAdamW8bit' is not supported.*AdamW8bit"),
        ("Muon", [], "--optimizer_args: Muon refuses them"),  # it takes matrices alone
        ("AdamW", ["weight_decay"], "--optimizer_args 'weight_decay' is not NAME=VALUE"),
        ("AdamW", ["weight_decay=abc"], "--optimizer_args 'weight_decay=abc'"),
        ("AdamW", ["weight_decay=0.1", "weight_decay =0.2"], "weight_decay is given twice"),
        ("AdamW", ["momentum=0.9"], "--optimizer_args momentum: AdamW takes betas"),
        ("AdamW", ["lr=1"], "--optimizer_args lr"),
        ("AdamW", ["betas=2,3"], "--optimizer_args: AdamW refuses"),
        ("AdamW", ["differentiable=True"], "--optimizer_args: AdamW refuses"),
    ],
)
def test_a_bad_optimizer_setting_is_named(optimizer_type, arguments, message):
    with pytest.raises(InputError, match=message):
        make_optimizer(optimizer_type, [ParameterGroup("unet", weights(), 1e-3)], arguments)


def shazeer_and_stern(weight, gradients, rate):
    """Adafactor without momentum and relative steps, algorithm 4 and section 6 of 1804.04235, in double precision."""
    weight = weight.double().clone()
    rows = columns = 0
    for step, gradient in enumerate(gradients, start=1):
        beta = 1 - step**-0.8
        squared = gradient.double() ** 2 + 1e-30
        rows = beta * rows + (1 - beta) * squared.sum(1, keepdim=True)
        columns = beta * columns + (1 - beta) * squared.sum(0, keepdim=True)
        update = gradient.double() / (rows @ columns / rows.sum()).sqrt()
        weight -= rate * update / update.pow(2).mean().sqrt().clamp(min=1.0)
    return weight


@pytest.mark.parametrize("name", ["AdaFactor", "adafactor", "transformers.optimization.Adafactor"])
def test_adafactor_is_the_papers_and_goes_by_the_learning_rate_when_told_so(name):
    weight = weights()[0]
    gradients = [torch.randn(weight.shape, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    expected = shazeer_and_stern(weight.detach(), gradients, 1e-2)
    optimizer = make_optimizer(name, [ParameterGroup("unet", [weight], 1e-2)], OWN_RATES)
    for gradient in gradients:
        weight.grad = gradient
        optimizer.step()
    torch.testing.assert_close(weight.double(), expected, rtol=1e-5, atol=1e-6)
    assert sum(value.numel() for value in optimizer.state[weight].values() if torch.is_tensor(value)) == 7 + 5 + 1


def test_adafactor_left_to_itself_sets_its_own_rates():
    moved = []
    for rate in (1e-2, 1e-5):
        weight = weights()[0]
        optimizer = make_optimizer("AdaFactor", [ParameterGroup("unet", [weight], rate)], [])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        moved.append(weight.detach())
    assert torch.equal(*moved)
    assert choose_optimizer("AdaFactor", []).sets_its_own_rates
    assert not choose_optimizer("AdaFactor", OWN_RATES).sets_its_own_rates
    assert not choose_optimizer("AdamW", []).sets_its_own_rates


def test_any_optimizer_of_torch_is_taken_by_name_or_path():
    for name, kind in (("SGD", torch.optim.SGD), ("torch.optim.rmsprop.RMSprop", torch.optim.RMSprop)):
        assert choose_optimizer(name, []).kind is kind
    nesterov = make_optimizer("sgdnesterov", [ParameterGroup("unet", weights(), 0.1)], ["momentum=0.8"])
    assert (nesterov.defaults["nesterov"], nesterov.defaults["momentum"]) == (True, 0.8)


@pytest.mark.parametrize(
    ("name", "package"), [("AdamW8bit", "bitsandbytes"), ("Lion8bit", "bitsandbytes"), ("Lion", "lion-pytorch")]
)
def test_a_package_that_is_not_there_is_named(name, package, monkeypatch):
    for module in ("bitsandbytes", "bitsandbytes.optim", "lion_pytorch"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(InputError, match=f"--optimizer_type '{name}' needs the package {package} "):
        choose_optimizer(name, [])


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("AdamW", ["amsgrad=True"]),
        ("AdaFactor", OWN_RATES),
        ("AdaFactor", ["beta1=0.9"]),
        ("torch.optim.Adafactor", []),
        ("SGDNesterov", []),
        ("Adagrad", []),
        ("NAdam", []),
        ("AdamW8bit", []),
        ("Lion8bit", []),
        ("Lion", []),
    ],
)
def test_each_goes_on_bit_for_bit_from_what_a_training_state_holds(name, arguments):
    """Factored, block-wise and plain states, of matrices, vectors and kernels, large enough for 8 bits."""
    for prefix, package in (("Lion", "lion_pytorch"), ("AdamW8", "bitsandbytes"), ("Lion8", "bitsandbytes")):
        if name.startswith(prefix):
            pytest.importorskip(package)

    def step(parameters, optimizer, seeds):
        for seed in seeds:
            random = torch.Generator().manual_seed(seed)
            for parameter in parameters:
                parameter.grad = torch.randn(parameter.shape, generator=random)
            optimizer.step()

    def made(values):
        parameters = [nn.Parameter(value.clone()) for value in values]
        return parameters, make_optimizer(name, [ParameterGroup("unet", parameters, 1e-2)], arguments)

    shapes = [(96, 64), (17,), (8, 4, 3, 3)]
    whole, optimizer = made([torch.randn(shape, generator=torch.Generator().manual_seed(9)) for shape in shapes])
    step(whole, optimizer, range(3))
    tensors, plain = pack([make_part(parameter, optimizer) for parameter in whole])
    parts = unpack({key: value.clone() for key, value in tensors.items()}, json.loads(json.dumps(plain)))
    resumed, other = made([parameter.detach() for parameter in whole])
    for parameter, part in zip(resumed, parts, strict=True):
        read_state("w", parameter, other, [part])
    step(whole, optimizer, range(3, 6))
    step(resumed, other, range(3, 6))
    assert all(map(torch.equal, whole, resumed))


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


def test_any_schedule_goes_with_an_optimizer_that_sets_its_own_rates():
    """AdaFactor's default rate is None, where diffusers' polynomial begins."""
    group = ParameterGroup("unet", [torch.nn.Parameter(torch.ones(3))], 1e-3)
    for name in LR_SCHEDULERS:
        optimizer = make_optimizer("AdaFactor", [group], [])
        schedule = make_lr_schedule(name, optimizer, 10, 0, 1, 1.0)
        assert optimizer.defaults["lr"] is None
        assert schedule.get_last_lr() == [1e-3]
