"""Checks of sharded training in two processes: torchrun starts this with a folder, where each writes what failed.

The model is one small layer in a chain of two, so that each process owns some of its parameters.
"""

import copy
import json
import math
import os
import sys
import traceback
from contextlib import nullcontext
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState
from accelerate.utils import gather_object
from diffusers.training_utils import EMAModel
from gradients import InfiniteGradient
from sharding_child import OneEpoch, quiet_states
from torch import nn

from library.exit_status import run_script
from library.signals import Signals
from library.training.engine.bf16_update import Bf16Update
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.loss_scale import agree_on_overflow
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer, set_schedule
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import KINDS, shard
from library.training.log.metrics import MetricsWriter
from library.training.loop import LoopOptions, Trainer
from library.training.state.tensor_rows import saved_parts
from third_patch import PATCHES, apply

RANK, FEATURES, BATCH = int(os.environ["RANK"]), 6, 8
OUT = Path(sys.argv[1])


class Regression:
    """Mean squared error; on the process `overflow_on` the gradients of step 3 overflow once.

    With "nan" the loss of that step is not a number on process 1.
    """

    def __init__(self, device, overflow_on=None):
        self.device, self.overflow_on, self.overflowed = device, overflow_on, False

    def loss(self, module, batch):
        predicted = module(batch.inputs.to(self.device))
        loss = (predicted - batch.targets.to(self.device)).float().pow(2).mean()
        if batch.step == 3 and self.overflow_on == "nan" and RANK == 1:
            return loss * math.nan
        if batch.step == 3 and self.overflow_on == RANK and not self.overflowed:
            self.overflowed = True
            return InfiniteGradient.apply(loss)
        return loss

    def save(self, stem, module):
        return stem

    def preview(self, position, step, module, since=0.0):
        pass


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(FEATURES, 5), nn.Tanh(), nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def rows(step, rank, processes):
    random = torch.Generator().manual_seed(step)
    inputs, targets = (torch.randn(BATCH, width, generator=random) for width in (FEATURES, 2))
    part = slice(rank, None, processes)
    return SimpleNamespace(
        step=step, inputs=inputs[part], targets=targets[part], names=["?"], quarantined=[], replaced=0
    )


def train(
    kind, precision="no", patches=PATCHES, max_grad_norm=0.05, steps=8, overflow_on=None, start=0, end=None, parts=(),
    take=None, averages=None, optimizer=("AdamW", ()), bf16=None, kept=None,
):  # fmt: skip
    """(whole weights as each process computes with them, metrics) after some steps on both processes.

    kind "fused" is no sharding, with the optimizer in backward.
    start, parts: go on from there. end, take: stop before the schedule's end and put every process's parts into `take`.
    kept: what the optimizer's groups have kept; taken up with `parts`, or put into it with `take`.
    averages: where the main process puts the moving averages.
    bf16: how bf16 weights are updated; each process then has the whole batch, so that the mean gradient is exact.
    """
    AcceleratorState._reset_state(reset_partial_state=True)
    undo = apply(patches)
    try:
        accelerator = make_accelerator(precision)
        module = model().to(accelerator.device, torch.bfloat16 if bf16 else None)
        groups = [ParameterGroup("unet", list(module.parameters()), 0.05)]
        update = bf16 and Bf16Update(bf16, 0)
        make = partial(FusedBackward, max_grad_norm=max_grad_norm) if kind == "fused" else partial(shard, kind)
        parallel = make(
            accelerator, module, groups,
            lambda groups, **construct: make_optimizer(optimizer[0], groups, optimizer[1], bf16=update, **construct),
            lambda optimizer: make_lr_schedule("linear", optimizer, steps, 0, 1, 1.0),
        )  # fmt: skip
        parallel.keep_averages(0.5)
        folder = OUT / f"rank{RANK}"
        (folder / "metrics.jsonl").unlink(missing_ok=True)
        writer = MetricsWriter(folder, None, steps, True)
        options = LoopOptions(end or steps, 1, BATCH, max_grad_norm, folder)
        task = Regression(accelerator.device, overflow_on)
        states = quiet_states(parallel, folder)
        trainer = Trainer(task, accelerator, parallel, OneEpoch(), options, writer, states, Signals())
        if parts:
            parallel.read_parts(saved_parts(parts))
            parallel.averages.updates = start
            parallel.group_state.load_state_dict(kept or {})
            set_schedule(parallel.schedule.scheduler, start)
            trainer.start_step = start
        share = (0, 1) if bf16 else (RANK, accelerator.num_processes)
        trainer.train(rows(step, *share) for step in range(start, end or steps))
        if averages is not None:
            with parallel.averages_in_place(), parallel.whole_module() as whole:
                averages += [one.detach().cpu().clone() for one in whole.parameters()] if RANK == 0 else []
        if take is not None:
            take += gather_object([copy.deepcopy(parallel.own_parts())])
            if kept is not None:
                kept |= copy.deepcopy(parallel.group_state.state_dict())
        writer.close()
        if kind == "fsdp":
            weights = [one.detach().full_tensor() for one in module.parameters()]
        else:
            weights = [one.detach().clone() for one in module.parameters()]
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        return [one.cpu() for one in weights], lines
    finally:
        undo()


def plainly(max_grad_norm=0.05, steps=8, averages=None):
    """The same training by torch alone, on the whole batch; `averages` gets diffusers' averages."""
    module = model()
    average = EMAModel(module.parameters(), decay=0.5)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.05)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        batch = rows(step, 0, 1)
        (module(batch.inputs) - batch.targets).pow(2).mean().backward()
        nn.utils.clip_grad_norm_(module.parameters(), max_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        average.step(module.parameters())
    if averages is not None:
        averages += average.shadow_params
    return [one.detach() for one in module.parameters()]


def equal(one, other, rtol=1e-5, atol=1e-6):
    return all(torch.allclose(mine, yours, rtol=rtol, atol=atol) for mine, yours in zip(one, other, strict=True))


def without(target):
    return [patch for patch in PATCHES if patch.target != target]


def same_on_both(weights):
    gathered = gather_object([[one.tolist() for one in weights]])
    return gathered[0] == gathered[1]


def check_every_kind_is_torchs_own_training():
    expected = []
    reference = plainly(averages=expected)
    for kind in KINDS:
        averages = []
        weights, _ = train(kind, averages=averages)
        assert equal(weights, reference), kind
        assert same_on_both(weights), kind
        assert RANK or equal(averages, expected), kind


def one_process_in_bf16(how, steps=8):
    """What bf16 weights become without processes and loop."""
    module = model().bfloat16()
    groups = [ParameterGroup("unet", list(module.parameters()), 0.05)]
    optimizer = make_optimizer("AdamW", groups, [], bf16=Bf16Update(how, 0))
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / steps)
        batch = rows(step, 0, 1)
        with torch.autocast("cpu", torch.bfloat16):
            predicted = module(batch.inputs)
        (predicted - batch.targets).float().pow(2).mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return [one.detach() for one in module.parameters()]


def check_bf16_weights_are_those_of_one_process_bit_for_bit():
    """The bits that round hang on an element's place, not on who updates it; states go from any kind to any other."""
    for how in ("stochastic", "kahan"):
        expected, taken = one_process_in_bf16(how), {}
        for kind in [*KINDS, "fused"]:
            weights, _ = train(kind, "bf16", max_grad_norm=0.0, bf16=how)
            assert all(map(torch.equal, weights, expected)), (how, kind)
            train(kind, "bf16", max_grad_norm=0.0, bf16=how, end=4, take=taken.setdefault(kind, []))
        kinds = [*taken]
        for kind, other in zip(kinds, [*kinds[1:], kinds[0]], strict=True):
            weights, _ = train(other, "bf16", max_grad_norm=0.0, bf16=how, start=4, parts=taken[kind])
            assert all(map(torch.equal, weights, expected)), (how, kind, other)


def check_the_schedule_counts_optimizer_steps():
    _, lines = train("none")
    rates = [line["lr"]["unet"] for line in lines]
    torch.testing.assert_close(rates, [0.05 * (1 - step / 8) for step in range(8)])
    _, lines = train("none", patches=without("accelerate.scheduler:AcceleratedScheduler.step"))
    assert [line["lr"]["unet"] for line in lines][3] < 0.05 * (1 - 5 / 8)  # accelerate's own: twice as fast


def check_oss_without_the_patched_prepare_does_not_train():
    try:
        train("oss", patches=without("accelerate.accelerator:Accelerator.prepare"))
    except (RuntimeError, AttributeError):
        return
    raise AssertionError("accelerate prepares OSS by itself: the patch can go")


def check_oss_with_gradients_set_to_none_trains_something_else():
    weights, _ = train("oss", patches=without("fairscale.optim.oss:OSS.zero_grad"))
    assert not equal(weights, plainly())


def check_oss_clipped_by_each_share_trains_something_else():
    weights, _ = train("oss", patches=without("accelerate.accelerator:Accelerator.clip_grad_norm_"))
    assert not equal(weights, plainly())


def check_an_overflow_on_one_process_repeats_the_step_on_both():
    for kind in KINDS:
        calm, calm_lines = train(kind, precision="fp16")
        for process in (0, 1):
            weights, lines = train(kind, precision="fp16", overflow_on=process)
            assert same_on_both(weights), kind
            more = [line["overflows"] - calm["overflows"] for line, calm in zip(lines, calm_lines, strict=True)]
            assert more == [0, 0, 0, 1, 0, 0, 0, 0], kind
            assert [line["lr"] for line in lines] == [line["lr"] for line in calm_lines], kind
            assert lines[-1]["loss_scale"] == calm_lines[-1]["loss_scale"] / 2, kind
            assert equal(weights, calm, rtol=1e-2, atol=1e-3), kind


def _skipped(agree):
    """Whether this process skips a step for which the gradient of process 1 alone overflows."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    if agree:
        agree_on_overflow(scaler)
    weight = nn.Parameter(torch.ones(2))
    before = weight.detach().clone()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler.scale(weight.sum() * (math.inf if RANK == 1 else 1.0)).backward()
    scaler.step(optimizer)
    scaler.update()
    return torch.equal(weight.detach(), before), scaler.get_scale()


def check_the_scaler_alone_would_let_processes_part():
    assert _skipped(agree=False) == (RANK == 1, 1.0 if RANK == 1 else 2.0)
    assert _skipped(agree=True) == (True, 1.0)


def check_a_process_that_owns_nothing_takes_part():
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    agree_on_overflow(scaler)
    weight = nn.Parameter(torch.ones(2))
    (scaler.scale(weight.sum() * math.inf) if RANK == 1 else scaler.scale(torch.zeros(1)))
    if RANK == 1:
        scaler.scale(weight.sum() * math.inf).backward()
    optimizer = torch.optim.AdamW([weight], lr=0.1)
    scaler.step(optimizer)
    scaler.update()
    assert scaler.get_scale() == 1.0 and torch.equal(weight.detach(), torch.ones(2))


def check_fairscales_own_scaler_is_off_without_cuda():
    from fairscale.optim.grad_scaler import ShardedGradScaler

    assert not ShardedGradScaler(enabled=True).is_enabled()


def check_any_kind_goes_on_from_the_parts_of_any_other():
    undisturbed, expected = {kind: train(kind)[0] for kind in KINDS}, []
    plainly(averages=expected)
    for before in KINDS:
        parts, steps = [], 4
        train(before, end=steps, take=parts)
        for after in KINDS:
            averages = []
            weights, _ = train(after, start=steps, parts=parts, averages=averages)
            assert equal(weights, undisturbed["none"]), (before, after)
            assert RANK or equal(averages, expected), (before, after)
            assert after != before or all(map(torch.equal, weights, undisturbed[after])), after


ADAFACTOR = ("AdaFactor", ("relative_step=False", "scale_parameter=False"))


def check_adafactor_is_shared_by_whole_parameters_and_goes_on_from_the_parts_of_any_other():
    kinds = ("none", "oss", "zero1", "fused")
    undisturbed = {kind: train(kind, max_grad_norm=0, optimizer=ADAFACTOR)[0] for kind in kinds}
    assert not equal(undisturbed["none"], train("none", max_grad_norm=0)[0])
    for before in kinds:
        parts, steps = [], 4
        train(before, max_grad_norm=0, optimizer=ADAFACTOR, end=steps, take=parts)
        for after in kinds:
            weights, _ = train(after, max_grad_norm=0, optimizer=ADAFACTOR, start=steps, parts=parts)
            assert equal(weights, undisturbed["none"]), (before, after)
            assert after != before or all(map(torch.equal, weights, undisturbed[after])), after


def check_optimizers_that_count_in_their_groups_are_shared_and_go_on_from_any_other():
    for name in ("AdaBelief", "Lamb"):
        optimizer = (f"pytorch_optimizer.{name}", ())
        kinds = ("none", "oss", "zero1", "fused")
        undisturbed = {kind: train(kind, max_grad_norm=0, optimizer=optimizer)[0] for kind in kinds}
        for before, after in zip(kinds, [*kinds[1:], kinds[0]], strict=True):
            parts, groups = [], {}
            train(before, max_grad_norm=0, optimizer=optimizer, end=4, take=parts, kept=groups)
            assert groups["unet"]["step"] == 4, (before, groups)
            for kind in (before, after):
                given = copy.deepcopy(groups)
                weights, _ = train(kind, max_grad_norm=0, optimizer=optimizer, start=4, parts=parts, kept=given)
                assert equal(weights, undisturbed["none"]), (name, before, kind)
                assert kind != before or all(map(torch.equal, weights, undisturbed[kind])), (name, kind)


def check_the_optimizer_in_backward_updates_by_the_gradients_of_both_processes():
    weights, lines = train("fused", max_grad_norm=0)
    plain_weights, plain_lines = train("none", max_grad_norm=0)
    assert equal(weights, plain_weights) and same_on_both(weights)
    norms = [[line["grad_norm"] for line in each] for each in (lines, plain_lines)]
    torch.testing.assert_close(*norms, rtol=1e-4, atol=1e-6)


def check_a_loss_that_is_not_finite_on_one_process_leaves_the_weights_of_both_alone():
    weights, lines = train("fused", overflow_on="nan")
    assert [line["updated"] for line in lines] == [step != 3 for step in range(8)]
    assert same_on_both(weights) and all(one.isfinite().all() for one in weights)


def check_accumulating_leaves_ddps_gradients_in_its_buckets():
    """Made anew beside the buckets, they would need the same memory again."""
    for kind in ("none", "zero1"):
        AcceleratorState._reset_state(reset_partial_state=True)
        accelerator = make_accelerator("no")
        module = model().to(accelerator.device)
        parallel = shard(
            kind, accelerator, module, [ParameterGroup("unet", list(module.parameters()), 0.05)],
            lambda groups, **construct: make_optimizer("AdamW", groups, [], **construct),
            lambda optimizer: make_lr_schedule("constant", optimizer, 9, 0, 1, 1.0),
        )  # fmt: skip
        batch = rows(0, RANK, 2).inputs.to(accelerator.device)
        held = []
        for index in range(4):
            with parallel.no_sync() if index == 3 else nullcontext():
                parallel.module(batch).sum().backward()
            held.append([one.grad.untyped_storage()._cdata for one in module.parameters()])
            if index < 3:
                parallel.clip(1.0)
                parallel.optimizer.step()
                parallel.zero_grad()
        assert held[3] == held[2], kind


def check_gradients_while_accumulating_stay_where_they_are_made_or_are_scattered_at_once():
    for kind in KINDS:
        AcceleratorState._reset_state(reset_partial_state=True)
        undo = apply(PATCHES)
        accelerator = make_accelerator("no")
        module, alone = model().to(accelerator.device), model()
        parallel = shard(
            kind, accelerator, module, [ParameterGroup("unet", list(module.parameters()), 0.05)],
            lambda groups, **construct: make_optimizer("AdamW", groups, [], **construct),
            lambda optimizer: make_lr_schedule("constant", optimizer, 1, 0, 1, 1.0),
        )  # fmt: skip
        batch = rows(0, RANK, 2)
        for one, device in ((alone, "cpu"), (parallel.module, accelerator.device)):
            with parallel.no_sync():
                one(batch.inputs.to(device)).sum().backward()
        mine, expected = list(module.parameters()), [one.grad.to(accelerator.device) for one in alone.parameters()]
        if kind == "fsdp":  # no process holds a whole gradient, or more than its share
            for one in expected:
                dist.all_reduce(one)
                one /= 2
            assert equal([one.grad.full_tensor() for one in mine], expected)
        else:
            assert equal([one.grad for one in mine], expected), kind
        undo()


def main():
    (OUT / f"rank{RANK}").mkdir(exist_ok=True)
    torch.set_num_threads(1)
    failures = {}
    for name, check in list(globals().items()):
        if name.startswith("check_"):
            try:
                check()
                failures[name] = None
            except Exception:
                failures[name] = traceback.format_exc()
            (OUT / f"{RANK}.json").write_text(json.dumps(failures))
            if failures[name] is not None:
                sys.exit(1)  # the other process may be in another collective, and would wait in it


if __name__ == "__main__":
    run_script(main)
