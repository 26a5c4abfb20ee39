"""Dropout that is computed again by gradient checkpointing, in micro-batches or on other ranks, drops the same."""

import copy
import itertools

import pytest
import torch
from torch import nn

from library.models import keyed_dropout
from library.models.compiled import Compiled, settle
from library.models.unet import ResBlock
from test.models.low_rank import put_low_rank_on
from test.models.unets import SD2_LIKE, inputs, our_unet
from test.models.weights import normal_weights

CPU = torch.device("cpu")


def mask(name="a.b", probability=0.5, rows=2, shape=(3, 40), seed=1, step=2, indices=(0, 1)):
    with keyed_dropout.draws(seed, step, indices):
        return keyed_dropout.keep_mask(name, probability, rows, shape, CPU)


def test_a_mask_depends_on_seed_step_sample_and_module_and_on_nothing_else():
    first = mask()
    torch.manual_seed(9)
    torch.rand(5)
    assert torch.equal(mask(), first)
    assert torch.equal(mask(indices=(1, 0)).flip(0), first)
    others = [mask(seed=2), mask(step=3), mask(name="a.c"), mask(indices=(2, 3))]
    for one, other in itertools.combinations([*first, *(mask[0] for mask in others)], 2):
        assert 0.3 < (one == other).float().mean() < 0.7


def test_rows_of_one_sample_differ_and_follow_their_sample():
    whole = mask(rows=6, shape=(40,), indices=(4, 7))
    assert torch.equal(whole[:3], mask(rows=3, shape=(40,), indices=(4,)))
    assert not torch.equal(whole[0], whole[1])


@pytest.mark.parametrize("probability", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_share_that_is_dropped_is_the_probability(probability):
    found = mask(probability=probability, shape=(100, 1000), indices=(5, 6)).float()
    deviation = (probability * (1 - probability)) ** 0.5
    assert abs(found.mean() - (1 - probability)) <= 5 * deviation / found.numel() ** 0.5
    assert abs(found.mean(dim=(0, 1)) - (1 - probability)).max() <= 5 * deviation / 200**0.5  # no position is special
    kept = []
    for step in range(2000):
        with keyed_dropout.draws(1, step, [0]):
            kept.append(keyed_dropout.is_kept("a", probability))
    assert abs(sum(kept) / 2000 - (1 - probability)) <= 5 * deviation / 2000**0.5


def test_neighbours_are_independent():
    """Of values beside each other, of samples, steps and modules."""
    masks = torch.stack([mask(step=step, name=name, shape=(4096,)) for step in range(8) for name in ("a", "b")]).float()
    flat = masks.flatten(0, 1) - 0.5
    correlation = flat @ flat.T / (0.25 * flat.shape[1])
    assert (correlation - torch.eye(len(flat))).abs().max() < 5 / 4096**0.5
    for distance in (1, 2, 3, 64):
        assert abs((flat[:, distance:] * flat[:, :-distance]).mean()) / 0.25 < 5 / flat.numel() ** 0.5


def test_without_draws_or_for_other_samples_there_is_an_error():
    with pytest.raises(RuntimeError, match="step and its samples"):
        keyed_dropout.keep_mask("a", 0.5, 2, (3,), CPU)
    with pytest.raises(RuntimeError, match="step and its samples"):
        keyed_dropout.is_kept("a", 0.5)
    with pytest.raises(RuntimeError, match="a: 3 rows for dropout, of 2 samples"):
        mask(name="a", rows=3, shape=(3,))


class Dropping(nn.Module):
    """A branch with dropout of its down projection's output, as sd-scripts has it.

    `neuron` drops values, `rank` ranks of a sample; `module` leaves the whole branch out of a step.
    """

    def __init__(self, branch, name, kind):
        super().__init__()
        self.branch, self.name, self.kind = [branch], name, kind
        branch.down.forward = self.forward
        self.down = type(branch.down).forward

    def forward(self, x):
        out = self.down(self.branch[0].down, x)
        if self.kind == "module":
            return out * float(keyed_dropout.is_kept(self.name, 0.5))
        channels_last = isinstance(self.branch[0].down, nn.Linear)
        shape = list(out.shape[1:])
        if self.kind == "rank":
            shape = [1] * len(shape)
            shape[-1 if channels_last else 0] = out.shape[-1 if channels_last else 1]
        kept = keyed_dropout.keep_mask(self.name, 0.5, len(out), shape, out.device)
        return out * kept / 0.5


def network_with(kind):
    """A U-Net with such branches on all layers of its blocks, and what trains."""
    unet = our_unet(SD2_LIKE)
    paths = [path for path, module in unet.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    paths = [path for path in paths if not path.startswith(("time_embed", "input_blocks.0", "out."))]
    branches = put_low_rank_on(unet, paths)
    torch.manual_seed(2)
    for path, branch in branches.items():
        nn.init.normal_(branch.up.weight, std=0.1)
        Dropping(branch, path, kind)
    return unet, [one for branch in branches.values() for one in branch.parameters()]


def gradients(unet, parameters, parts=([0, 1],), backward_within=True, step=7):
    """Of the sum of losses of the samples of batch indices 4 and 5, in parts."""
    (x, t, context, _), _ = inputs(SD2_LIKE)
    for parameter in parameters:
        parameter.grad = None
    for part in parts:
        with keyed_dropout.draws(3, step, [4 + row for row in part]):
            loss = unet(x[part], t[part], context[part]).square().sum()
            if backward_within:
                loss.backward()
        if not backward_within:
            loss.backward()
    return [one.grad for one in parameters]


@pytest.mark.parametrize("kind", ["neuron", "rank", "module"])
def test_gradients_under_checkpointing_are_those_without_and_micro_batches_add_up(kind):
    unet, parameters = network_with(kind)
    plain = gradients(unet, parameters)
    unet.enable_gradient_checkpointing()
    for backward_within in (True, False):
        again = gradients(unet, parameters, backward_within=backward_within)
        assert all(torch.equal(one, other) for one, other in zip(plain, again, strict=True))
    apart = gradients(unet, parameters, parts=([1], [0]))
    for one, other in zip(plain, apart, strict=True):
        assert (one - other).norm() <= 1e-4 * one.norm()
    if kind == "module":
        assert {bool(one.any()) for one in plain} == {True, False}
    other_step = gradients(unet, parameters, step=8)
    assert max(float((one - other).norm() / one.norm()) for one, other in zip(plain, other_step, strict=True)) > 0.1


def test_compiled_blocks_drop_the_same_and_are_not_compiled_for_every_step():
    torch._dynamo.reset()
    settle()
    made = [normal_weights(ResBlock(32, 32, 16)) for _ in range(2)]
    blocks = [*made, *copy.deepcopy(made)]
    for number, block in enumerate(blocks):
        name, layer = f"block.{number % 2}", block.in_layers[2]

        def dropping(x, name=name, forward=layer.forward):
            return forward(x) * keyed_dropout.keep_mask(name, 0.5, len(x), (32, 1, 1), x.device)

        layer.forward = dropping
    compiled = Compiled(ResBlock, "eager")
    for block in blocks[2:]:
        block.compiled = compiled
    given = torch.randn(2, 32, 4, 4), torch.randn(2, 16)
    graphs, outs = [], []
    for step in range(4):
        with keyed_dropout.draws(0, step, [0, 1]):
            outs.append([block(*given) for block in blocks])
        assert all(torch.allclose(*pair) for pair in zip(outs[-1][:2], outs[-1][2:], strict=True))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[-1] == graphs[0] and not torch.equal(outs[0][0], outs[1][0])
