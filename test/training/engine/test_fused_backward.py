"""The optimizer in backward: the same training as the ordinary pass, with few gradients at a time."""

import copy
import math
from dataclasses import replace
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.errors import TrainingError
from library.models.denoiser import Denoiser
from library.models.text import Tokens
from library.signals import Signals
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer, set_schedule
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import shard
from library.training.log.metrics import MetricsWriter
from library.training.loop import LoopOptions, Trainer
from library.training.memory.live_bytes import LiveBytes
from library.training.state.states import StateCadence, States
from library.training.state.tensor_rows import saved_parts
from library.training.state.writer import StateWriter
from test.training.engine.gradients import NaNGradient

ADAFACTOR = ("AdaFactor", ["relative_step=False", "scale_parameter=False"])
KINDS = [("AdamW", ["weight_decay=0.1"]), ADAFACTOR, ("SGDNesterov", [])]
STEPS = 4


class OneEpoch:
    """Epochs do not matter here."""

    def epoch_of_step(self, step):
        return 0

    def steps_before_epoch(self, epoch):
        return 0


class Noise:
    """Predicts noise with a Denoiser; `spoil` names steps whose loss goes through a function."""

    def __init__(self, spoil=None):
        self.spoil = spoil or {}

    def loss(self, module, batch):
        random = torch.Generator().manual_seed(batch.step)
        ids = torch.randint(3, 300, (2, 1, 77), generator=random)
        noisy, target = (torch.randn(2, 4, 8, 8, generator=random) for _ in range(2))
        predicted = module(noisy, torch.tensor([3, 700]), Tokens((ids, ids)), torch.full((2, 6), 64.0))
        return self.spoil.get(batch.step, lambda loss: loss)((predicted - target).pow(2).mean())


def made(sdxl, fused, optimizer=KINDS[0], max_grad_norm=0.0):
    AcceleratorState._reset_state(reset_partial_state=True)
    unet, vae, encoders = (copy.deepcopy(part) for part in (sdxl.unet, sdxl.vae, sdxl.text_encoders))
    model = replace(sdxl, unet=unet, vae=vae, text_encoders=encoders)
    module = Denoiser(model, (True, False), gradient_checkpointing=True)
    groups = [
        ParameterGroup("unet", list(module.unet.parameters()), 1e-2),
        ParameterGroup("text_encoder1", module.trained_encoders[0], 1e-3),
    ]
    make = partial(FusedBackward, max_grad_norm=max_grad_norm) if fused else partial(shard, "none")
    return make(
        make_accelerator("no"), module, groups,
        lambda groups, **construct: make_optimizer(optimizer[0], groups, optimizer[1], **construct),
        lambda optimizer: make_lr_schedule("linear", optimizer, STEPS, 0, 1, 1.0),
    )  # fmt: skip


def train(parallel, tmp_path, task=None, max_grad_norm=0.0, start=0, end=STEPS):
    results = []
    writer = MetricsWriter(tmp_path, None, STEPS)
    states = States(StateWriter(tmp_path), parallel, {}, StateCadence(), lambda step, metrics: None, str)
    options = LoopOptions(STEPS, 1, 2, max_grad_norm, tmp_path)
    trainer = Trainer(
        task or Noise(), parallel.accelerator, parallel, OneEpoch(), options, writer, states, Signals()
    )  # fmt: skip
    for step in range(start, end):
        results.append(trainer.train_step([SimpleNamespace(step=step, names=["?"], replaced=0)]))
    writer.close()
    return results


def test_small_parameters_are_updated_together_and_few_gradients_wait(sdxl):
    parallel = made(sdxl, fused=True)
    sizes = [parameter.nbytes for parameter in parallel.parameters]
    waiting = []

    def note(optimizer, *_):
        with_gradient = [parameter for parameter in parallel.parameters if parameter.grad is not None]
        updated = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        assert {id(parameter) for parameter in with_gradient} == {id(parameter) for parameter in updated}
        waiting.append([parameter.nbytes for parameter in updated])

    parallel.bare_optimizer.register_step_pre_hook(note)
    parallel.backward(Noise().loss(parallel.module, SimpleNamespace(step=0)))
    assert sorted(size for step in waiting for size in step) == sorted(sizes)
    assert all(sum(step) <= sum(sizes) / 100 + max(sizes) for step in waiting)
    assert len(waiting) < len(sizes) / 5
    assert all(parameter.grad is None for parameter in parallel.parameters)


def weights(parallel):
    return [parameter.detach() for parameter in parallel.parameters]


@pytest.mark.parametrize("optimizer", KINDS, ids=[name for name, _ in KINDS])
def test_without_clipping_it_is_the_ordinary_pass_bit_for_bit(sdxl, tmp_path, optimizer):
    plain, fused = (made(sdxl, fused, optimizer) for fused in (False, True))
    results = [train(parallel, tmp_path) for parallel in (plain, fused)]
    assert all(map(torch.equal, weights(plain), weights(fused)))
    for one, other in zip(*results, strict=True):
        assert (one.loss, one.lr, one.updated) == (other.loss, other.lr, other.updated)
        assert other.grad_norm == pytest.approx(one.grad_norm, rel=1e-5)
    mine, theirs = fused.own_parts(), plain.own_parts()
    assert mine.keys() == theirs.keys()
    for name in mine:
        for key, value in theirs[name]["state"].items():
            same = torch.equal if torch.is_tensor(value) else lambda one, other: one == other
            assert same(mine[name]["state"][key], value), (name, key)


def test_gradients_do_not_stand_beside_each_other(sdxl, tmp_path):
    """With everything else the same, backward holds as much less as the gradients weigh, but for the largest ones."""
    peaks = {}
    for fused in (False, True):
        parallel = made(sdxl, fused, ADAFACTOR)
        loss = Noise().loss(parallel.module, SimpleNamespace(step=0))
        with LiveBytes() as live:
            live.hold([parameter.data for parameter in parallel.bare_module.parameters()])
            parallel.backward(loss)
        peaks[fused] = live.peak
    sizes = sorted(4 * parameter.numel() for parameter in parallel.parameters)
    assert all(parameter.grad is None for parameter in parallel.parameters)
    assert peaks[False] - peaks[True] > 0.7 * (sum(sizes) - 6 * sizes[-1])


def test_each_tensor_is_clipped_by_itself_and_the_log_shows_the_norm_of_all(sdxl, tmp_path):
    bound = 1e-3
    reference = made(sdxl, False, ("SGD", []))
    loss = Noise().loss(reference.module, SimpleNamespace(step=0))
    loss.backward()
    whole = nn.utils.get_total_norm([parameter.grad for parameter in reference.parameters])
    for parameter in reference.parameters:
        nn.utils.clip_grad_norm_([parameter], bound)
    reference.bare_optimizer.step()
    fused = made(sdxl, True, ("SGD", []), bound)
    (result,) = train(fused, tmp_path, max_grad_norm=bound, end=1)
    assert result.grad_norm == pytest.approx(float(whole), rel=1e-5)
    for mine, theirs in zip(weights(fused), weights(reference), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-8)


def test_a_loss_that_is_not_finite_leaves_weights_and_state_alone(sdxl, tmp_path):
    fused = made(sdxl, True)
    seen = []

    def spoiled(loss):
        seen.extend(one.clone() for one in weights(fused))
        return loss * math.nan

    results = train(fused, tmp_path, Noise({1: spoiled}), end=2)
    assert [result.updated for result in results] == [True, False]
    assert all(map(torch.equal, seen, weights(fused)))
    assert all(part["state"]["step"] == 1 for part in fused.own_parts().values() if part["state"])


def test_a_gradient_that_is_not_finite_ends_the_run_and_says_why(sdxl, tmp_path):
    with pytest.raises(TrainingError, match=r"gradient is not finite.*--fused_backward_pass has updated other weights"):
        train(made(sdxl, True), tmp_path, Noise({1: NaNGradient.apply}))


@pytest.mark.parametrize("before", [False, True])
def test_a_state_of_either_pass_goes_on_with_the_other(sdxl, tmp_path, before):
    undisturbed, first, then = (made(sdxl, fused, ADAFACTOR) for fused in (True, before, not before))
    train(undisturbed, tmp_path)
    train(first, tmp_path, end=2)
    then.read_parts(saved_parts([copy.deepcopy(first.own_parts())]))
    set_schedule(then.schedule.scheduler, 2)
    train(then, tmp_path, start=2)
    assert all(map(torch.equal, weights(then), weights(undisturbed)))
