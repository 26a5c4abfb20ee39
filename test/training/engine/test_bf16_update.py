"""bf16 weights that learn what fp32 weights learn, beside torch's own optimizers in fp32."""

import copy

import pytest
import torch
from torch import nn

from library.training.engine import bf16_update
from library.training.engine.bf16_update import REMAINDER, UPDATES_DONE, Bf16Update
from library.training.engine.optimizers import ParameterGroup, make_optimizer
from library.training.state.tensor_rows import make_part, read_state, read_weight

ADAFACTOR = ("AdaFactor", ["relative_step=False", "scale_parameter=False"])
KINDS = [
    ("AdamW", ["weight_decay=0.1"]), ADAFACTOR, ("SGDNesterov", []), ("Adagrad", []), ("NAdam", []), ("Rprop", []),
    ("ASGD", []), ("RMSprop", ["centered=True", "momentum=0.9"]),
]  # fmt: skip
SHAPES = [(40, 30), (7,), (3, 5, 3, 3)]


def parameters(dtype, seed=0):
    random = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(shape, generator=random).bfloat16().to(dtype)) for shape in SHAPES]


def optimizer_of(trained, kind=KINDS[0], how="stochastic", rate=1e-3, seed=0, **given):
    update = None if how is None else Bf16Update(how, seed)
    return make_optimizer(kind[0], [ParameterGroup("unet", trained, rate, **given)], kind[1], bf16=update)


def step(trained, optimizer, number):
    """Gradients that pull each weight towards a place, with noise, the same for weights of any precision."""
    random = torch.Generator().manual_seed(1000 + number)
    for parameter in trained:
        pull = parameter.detach().float() - 0.5
        parameter.grad = (pull + torch.randn(parameter.shape, generator=random)).bfloat16().to(parameter.dtype)
    optimizer.step()
    optimizer.zero_grad()


def compared(trained, others, start):
    """How far a run came on the way that another took, and how far the two are apart, as shares of that way."""
    runs = (torch.cat([one.detach().double().flatten() for one in run]) for run in (trained, others, start))
    mine, theirs, before = runs
    way = theirs - before
    return float((mine - before) @ way / (way @ way)), float((mine - theirs).norm() / way.norm())


@pytest.mark.parametrize(("how", "loses"), [("nearest", True), ("stochastic", False), ("kahan", False)])
def test_steps_below_bf16s_spacing_are_lost_to_the_nearest_alone(how, loses):
    """400 steps of 2^-12 down from 1, where bf16's spacing is 2^-8: a sixteenth of it each."""
    weight = nn.Parameter(torch.ones(5000, dtype=torch.bfloat16))
    optimizer = optimizer_of([weight], ("SGD", []), how, rate=2.0**-12)
    for _ in range(400):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    expected = 1 - 400 * 2.0**-12
    mean = float(weight.detach().double().mean())
    if loses:
        assert mean == 1.0
    else:
        assert mean == pytest.approx(expected, abs=2e-3)
    if how == "kahan":  # a pair of bf16 numbers is exact here
        pair = weight.detach().double() + optimizer.state[weight][REMAINDER].double()
        assert bool((pair == expected).all())


@pytest.mark.parametrize("kind", KINDS, ids=[name for name, _ in KINDS])
@pytest.mark.parametrize("how", ["stochastic", "kahan"])
def test_the_trajectory_is_that_of_torchs_own_optimizer_in_fp32(kind, how):
    """100 steps: as far on the same way, to 3 %. Beside it, the noise of rounding at random is an eighth of bf16's
    spacing a step, which adds up as its root; Kahan's pairs stay closer. AdaGrad goes the shortest way.
    """
    start, full, half = parameters(torch.float32), parameters(torch.float32), parameters(torch.bfloat16)
    own, theirs = optimizer_of(half, kind, how), optimizer_of(full, kind, None)
    for number in range(100):
        step(half, own, number)
        step(full, theirs, number)
    share, apart = compared(half, full, start)
    assert share == pytest.approx(1, abs=0.03)
    assert apart < (0.3 if how == "stochastic" else 0.04) * (3 if kind[0] == "Adagrad" else 1)
    assert all(one.dtype == torch.bfloat16 for one in half)


def test_rounded_to_the_nearest_adamw_does_not_get_there():
    """What the two others are for; torch's own AdamW on bf16 weights does no better."""
    start, full, half, plain = (parameters(dtype) for dtype in [torch.float32] * 2 + [torch.bfloat16] * 2)
    optimizers = [optimizer_of(full, how=None), optimizer_of(half, how="nearest"), optimizer_of(plain, how=None)]
    for number in range(100):
        for trained, optimizer in zip((full, half, plain), optimizers, strict=True):
            step(trained, optimizer, number)
    assert compared(half, full, start)[0] < 0.2 and compared(plain, full, start)[0] < 0.2


def test_the_second_moment_falls_again():
    """Large gradients first, small ones then: in bf16 to the nearest it would stay, and the steps with it small."""
    found = {}
    for how in (None, "stochastic", "kahan", "nearest"):
        weight = nn.Parameter(torch.zeros(2000, dtype=torch.float32 if how is None else torch.bfloat16))
        optimizer = optimizer_of([weight], how=how)
        for number in range(800):
            weight.grad = torch.full_like(weight, 1.0 if number < 5 else 1e-3)
            optimizer.step()
        found[how] = float(optimizer.state[weight]["exp_avg_sq"].double().mean())
    assert found["stochastic"] == pytest.approx(found[None], rel=0.02) and found["kahan"] == found["stochastic"]
    assert found["nearest"] > 1.5 * found[None]


@pytest.mark.parametrize("kind", KINDS[:2], ids=["AdamW", "AdaFactor"])
def test_states_of_the_weights_shape_are_bf16_and_the_rest_as_it_was(kind):
    half, full = parameters(torch.bfloat16), parameters(torch.float32)
    own, theirs = optimizer_of(half, kind, "kahan"), optimizer_of(full, kind, None)
    step(half, own, 0), step(full, theirs, 0)
    for mine, other in zip(half, full, strict=True):
        state, expected = own.state[mine], theirs.state[other]
        assert state.pop(UPDATES_DONE) == 1 and state.pop(REMAINDER).dtype == torch.bfloat16
        assert state.keys() == expected.keys()
        for key, value in expected.items():
            if torch.is_tensor(value):
                assert state[key].shape == value.shape
                assert state[key].dtype == (torch.bfloat16 if value.shape == other.shape else value.dtype), key
    assert set(own.state) == set(half)  # nothing is left of the pieces


@pytest.mark.parametrize("how", ["stochastic", "kahan"])
def test_pieces_and_shares_do_not_matter(monkeypatch, how):
    """Cut into pieces, a parameter at a time, or the rows of one dealt out: bit for bit the same."""
    whole = parameters(torch.bfloat16)
    optimizer = optimizer_of(whole, how=how)
    for number in range(3):
        step(whole, optimizer, number)
    monkeypatch.setattr(bf16_update, "PIECE_ELEMENTS", 100)
    cut = parameters(torch.bfloat16)
    optimizer = optimizer_of(cut, how=how)
    for number in range(3):
        step(cut, optimizer, number)
    assert all(map(torch.equal, whole, cut))
    before = sum(one.numel() for one in whole[:-1])
    rows = nn.Parameter(parameters(torch.bfloat16)[-1].detach()[1:].clone())
    optimizer = optimizer_of([rows], how=how, places=[before + 45])
    for number in range(3):
        random = torch.Generator().manual_seed(1000 + number)
        noise = [torch.randn(shape, generator=random) for shape in SHAPES][-1]
        rows.grad = (rows.detach().float() - 0.5 + noise[1:]).bfloat16()
        optimizer.step()
    assert torch.equal(rows, whole[-1][1:])


def test_a_parameter_without_a_gradient_stays_and_counts_its_own_updates():
    half = parameters(torch.bfloat16)
    optimizer = optimizer_of(half)
    step(half, optimizer, 0)
    kept = half[1].detach().clone()
    for parameter in (half[0], half[2]):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert torch.equal(half[1], kept)
    assert [optimizer.state[one][UPDATES_DONE] for one in half] == [2, 1, 2]
    step(half, optimizer, 2)
    assert [float(optimizer.state[one]["step"]) for one in half] == [3, 2, 3]


@pytest.mark.parametrize("kind", KINDS, ids=[name for name, _ in KINDS])
@pytest.mark.parametrize("how", ["stochastic", "kahan"])
def test_a_run_that_takes_up_a_state_is_the_run_that_was_not_stopped(kind, how):
    whole = parameters(torch.bfloat16)
    optimizer = optimizer_of(whole, kind, how, seed=4)
    for number in range(2):
        step(whole, optimizer, number)
    saved = copy.deepcopy({str(place): make_part(one, optimizer) for place, one in enumerate(whole)})
    for part in saved.values():  # a file keeps no order
        part["state"] = dict(reversed(part["state"].items()))
    resumed = parameters(torch.bfloat16, seed=9)
    other = optimizer_of(resumed, kind, how, seed=4)
    for place, parameter in enumerate(resumed):
        read_weight(str(place), parameter, [saved[str(place)]])
        read_state(str(place), parameter, other, [saved[str(place)]])
    for number in range(2, 4):
        step(whole, optimizer, number)
        step(resumed, other, number)
    assert all(map(torch.equal, whole, resumed))
    for mine, theirs in zip(whole, resumed, strict=True):
        assert optimizer.state[mine].keys() == other.state[theirs].keys()
