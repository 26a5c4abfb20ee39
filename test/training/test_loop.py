"""The training loop: accumulation, clipping, loss scaling, what is not finite, when things are saved."""

import json
import math
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.errors import Stopped, TrainingError
from library.signals import Signals
from library.training.counters import Counters
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import Replicated, shard
from library.training.log.metrics import MetricsWriter
from library.training.loop import LoopOptions, Trainer
from library.training.state.states import StateCadence, States
from library.training.state.writer import StateWriter
from test.training.engine.gradients import InfiniteGradient, NaNGradient

ROOT = Path(__file__).resolve().parents[2]
FEATURES = 6


class FixedEpochs:
    """Epochs of four steps."""

    def epoch_of_step(self, step):
        return step // 4

    def steps_before_epoch(self, epoch):
        return 4 * epoch


class Regression:
    """A task whose module is one linear layer; `blow_up` names steps whose loss is scaled by a factor."""

    def __init__(self, blow_up=None):
        self.blow_up = blow_up or {}
        self.saved, self.previews, self.losses_asked = [], [], []

    def loss(self, module, batch):
        self.losses_asked.append(batch.step)
        factor = self.blow_up.get(batch.step, 1.0)
        return ((module(batch.inputs) - batch.targets).float().pow(2).mean()) * factor

    def save(self, stem, module):
        self.saved.append(stem)
        return stem

    def preview(self, position, step, module, since=0.0):
        self.previews.append((position, step))


def micro_batches(steps, accumulation, batch):
    for step in range(steps):
        random = torch.Generator().manual_seed(step)
        inputs = torch.randn(accumulation * batch, FEATURES, generator=random)
        targets = torch.randn(accumulation * batch, 2, generator=random)
        for micro in range(accumulation):
            part = slice(micro * batch, (micro + 1) * batch)
            yield SimpleNamespace(
                step=step,
                inputs=inputs[part],
                targets=targets[part],
                names=[f"{step}-{i}" for i in range(batch)],
                quarantined=[],
                replaced=0,
            )


def train(
    tmp_path, task=None, steps=8, accumulation=1, batch=12, precision="no", max_grad_norm=1.0, batches=None,
    counters=None, start_step=0, **options,
):  # fmt: skip
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(precision)
    torch.manual_seed(0)
    module = nn.Linear(FEATURES, 2)
    groups = [ParameterGroup("unet", list(module.parameters()), 0.05)]
    parallel = shard(
        "none", accelerator, module, groups,
        lambda groups: make_optimizer("AdamW", groups, []),
        lambda optimizer: make_lr_schedule("linear", optimizer, steps, 0, 1, 1.0),
    )  # fmt: skip
    loop_options = LoopOptions(steps, accumulation, accumulation * batch, max_grad_norm, tmp_path, **options)
    writer = MetricsWriter(tmp_path, None, steps)
    states = States(StateWriter(tmp_path), parallel, {}, StateCadence(), lambda step, metrics: None, str)
    trainer = Trainer(
        task or Regression(), accelerator, parallel, FixedEpochs(), loop_options, writer, states, Signals(),
        counters=counters, start_step=start_step,
    )  # fmt: skip
    try:
        report = trainer.train(batches or micro_batches(steps, accumulation, batch))
    finally:
        writer.close()
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return module, report, metrics


@pytest.mark.parametrize("max_grad_norm", [0.0, 0.5])
def test_the_loop_is_the_plain_loop_of_torch(tmp_path, max_grad_norm):
    module, report, metrics = train(tmp_path, max_grad_norm=max_grad_norm)
    torch.manual_seed(0)
    peer = nn.Linear(FEATURES, 2)
    optimizer = torch.optim.AdamW(peer.parameters(), lr=0.05, foreach=False)
    losses = []
    for step, batch in enumerate(micro_batches(8, 1, 12)):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 8)
        loss = (peer(batch.inputs) - batch.targets).pow(2).mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(peer.parameters(), max_grad_norm or math.inf)
        assert metrics[step]["grad_norm"] == pytest.approx(norm.item(), rel=1e-5)
        optimizer.step()
    assert [line["loss"] for line in metrics] == pytest.approx(losses, rel=1e-5)
    assert [line["lr"]["unet"] for line in metrics] == pytest.approx([0.05 * (1 - step / 8) for step in range(8)])
    torch.testing.assert_close(module.weight, peer.weight, rtol=1e-5, atol=1e-6)
    assert report.average_loss == pytest.approx(sum(losses) / 8, rel=1e-5)
    assert report.images_per_second > 0


def test_accumulated_micro_batches_are_the_large_batch(tmp_path):
    for folder in ("large", "small"):
        (tmp_path / folder).mkdir()
    large, _, large_metrics = train(tmp_path / "large", accumulation=1, batch=12)
    small, _, small_metrics = train(tmp_path / "small", accumulation=4, batch=3)
    torch.testing.assert_close(small.weight, large.weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(small.bias, large.bias, rtol=1e-5, atol=1e-7)
    for one, four in zip(large_metrics, small_metrics, strict=True):
        assert four["loss"] == pytest.approx(one["loss"], rel=1e-5)
        assert four["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_an_fp16_overflow_repeats_the_step_at_a_smaller_scale_and_moves_nothing_else(tmp_path):
    # 2**16 times a gradient of some 1000 is beyond fp16's 65504 until the scale has fallen
    task = Regression(blow_up={3: 3000.0})
    _, report, metrics = train(tmp_path, task, precision="fp16")
    assert report.overflows == metrics[3]["overflows"] > 0
    assert task.losses_asked.count(3) == 1 + report.overflows
    assert [line["step"] for line in metrics] == list(range(1, 9))
    assert [line["lr"]["unet"] for line in metrics] == pytest.approx([0.05 * (1 - step / 8) for step in range(8)])
    assert metrics[3]["loss_scale"] == 2.0 ** (16 - report.overflows)
    assert all(line["updated"] for line in metrics)


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_half_precision_follows_fp32_and_clips_the_true_gradient(tmp_path, precision):
    for folder in ("fp32", "half"):
        (tmp_path / folder).mkdir()
    exact, _, exact_metrics = train(tmp_path / "fp32", max_grad_norm=0.1)
    half, _, half_metrics = train(tmp_path / "half", max_grad_norm=0.1, precision=precision)
    torch.testing.assert_close(half.weight, exact.weight, rtol=0.02, atol=0.02)
    for one, other in zip(exact_metrics, half_metrics, strict=True):
        # a norm of scaled gradients would be 65536 times as large
        assert other["grad_norm"] == pytest.approx(one["grad_norm"], rel=0.05)


class BrokenIn(Regression):
    """Steps whose gradients are not finite, at whatever scale."""

    def __init__(self, *steps):
        super().__init__()
        self.steps, self.weights = steps, {}

    def loss(self, module, batch):
        self.weights[batch.step] = module.weight.detach().clone()
        loss = super().loss(module, batch)
        return NaNGradient.apply(loss) if batch.step in self.steps else loss


def test_a_batch_whose_gradients_overflow_at_every_scale_is_named_and_passed_over(tmp_path, capsys):
    """It moves nothing, the schedule neither, and leaves the loss scale as the next step's."""
    task = BrokenIn(3)
    _, report, metrics = train(tmp_path, task, precision="fp16", steps=9)
    assert report.steps_not_updated == 1 and [line["updated"] for line in metrics].index(False) == 3
    assert report.overflows == metrics[3]["overflows"] == 26  # from 2^16 to 2^-10
    assert task.losses_asked.count(3) == 27
    assert metrics[3]["loss_scale"] == metrics[4]["loss_scale"] == 2.0**16
    assert metrics[3]["lr"] == metrics[4]["lr"] != metrics[5]["lr"]
    assert torch.equal(task.weights[3], task.weights[4]) and not torch.equal(task.weights[4], task.weights[5])
    assert "step 4: gradient at any loss scale down to 2^-10 not finite" in capsys.readouterr().out
    assert all(line["updated"] for line in metrics[4:])


def test_an_overflow_that_shows_in_no_norm_is_passed_over_too(tmp_path, monkeypatch):
    """Devices that saturate tell their scaler alone."""
    monkeypatch.setattr(Replicated, "clip", lambda self, max_norm: torch.ones(()))
    task = BrokenIn(3)
    _, report, metrics = train(tmp_path, task, precision="fp16", steps=6)
    assert [line["updated"] for line in metrics] == [True, True, True, False, True, True]
    assert task.losses_asked.count(3) == 27  # at the scales from 2^16 to 2^-10
    assert metrics[3]["loss_scale"] == metrics[4]["loss_scale"] == 2.0**16
    assert torch.equal(task.weights[3], task.weights[4]) and report.steps_not_updated == 1


def test_three_such_batches_running_stop_the_run_and_name_the_samples(tmp_path):
    with pytest.raises(TrainingError, match=r"gradient at any loss scale.* 3 steps running.*of step 3.*5-0, 5-1"):
        train(tmp_path, BrokenIn(3, 4, 5), precision="fp16")


@pytest.mark.parametrize("precision", ["no", "fp16"])
def test_a_loss_that_is_not_finite_leaves_the_weights_alone_and_goes_on(tmp_path, precision):
    weights = []

    class Watched(Regression):
        def loss(self, module, batch):
            weights.append(module.weight.detach().clone())
            return super().loss(module, batch)

    blow_up = {2: math.nan, 3: math.inf, 5: math.nan}
    _, report, metrics = train(tmp_path, Watched(blow_up=blow_up), precision=precision)
    assert report.steps_not_updated == 3
    assert [line["updated"] for line in metrics] == [step not in (2, 3, 5) for step in range(8)]
    assert (
        torch.equal(weights[2], weights[3])
        and torch.equal(weights[3], weights[4])
        and torch.equal(weights[5], weights[6])
    )
    assert not torch.equal(weights[4], weights[5])
    assert metrics[2]["loss"] is None
    assert all(math.isfinite(line["average_loss"]) for line in metrics)


def test_samples_whose_latents_are_not_finite_are_named_apart(tmp_path):
    class Broken(Regression):
        def samples_not_finite(self, batch):
            return [batch.names[1]]

    with pytest.raises(
        TrainingError, match=r"Samples of this step: \S+, .*; the latents themselves are not finite of \S+$"
    ):
        train(tmp_path, Broken(blow_up=dict.fromkeys(range(40), math.nan)), steps=40)


def test_an_overflow_that_passes_leaves_the_weights_of_a_run_without_it(tmp_path):
    """The scale alone differs, and powers of two do not round."""
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    calm, _, _ = train(tmp_path / "a", precision="fp16")

    class OverflowsOnce(Regression):
        done = False

        def loss(self, module, batch):
            loss = super().loss(module, batch)
            if batch.step == 3 and not self.done:
                self.done = True
                return InfiniteGradient.apply(loss)
            return loss

    once, report, _ = train(tmp_path / "b", OverflowsOnce(), precision="fp16")
    assert report.overflows == 1
    torch.testing.assert_close(once.weight, calm.weight, rtol=1e-3, atol=1e-5)


def test_the_loss_scaler_of_torch_npu_can_step_our_optimizer(tmp_path, monkeypatch):
    """It hands itself to optimizers that say they take it (torch_npu 2.14.0, npu/amp/grad_scaler.py)."""

    class NpuScaler(torch.amp.GradScaler):
        def step(self, optimizer, *args, **kwargs):
            inner = getattr(optimizer, "optimizer", optimizer)
            if getattr(inner, "_step_supports_amp_scaling", False):
                return inner.step(*args, **kwargs, grad_scaler=self)
            return super().step(optimizer, *args, **kwargs)

    monkeypatch.setattr(torch.amp, "GradScaler", NpuScaler)
    _, _, metrics = train(tmp_path, precision="fp16")
    assert all(line["updated"] for line in metrics)


def test_a_variable_of_accelerate_launch_does_not_scale_the_gradients(tmp_path, monkeypatch):
    for folder in ("a", "b"):
        (tmp_path / folder).mkdir()
    _, _, without = train(tmp_path / "a")
    monkeypatch.setenv("ACCELERATE_GRADIENT_ACCUMULATION_STEPS", "4")
    _, _, with_variable = train(tmp_path / "b")
    assert [line["grad_norm"] for line in with_variable] == [line["grad_norm"] for line in without]


def test_three_losses_running_that_are_not_finite_stop_the_run(tmp_path):
    with pytest.raises(
        TrainingError, match=r"loss not finite at step 5, 3 steps running; the weights are those of step 2.*4-0, 4-1"
    ):
        train(tmp_path, Regression(blow_up={2: math.nan, 3: math.inf, 4: math.nan}))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert len(lines) == 5  # what was measured is on disk


def test_a_gradient_that_is_not_finite_in_fp32_never_reaches_the_weights(tmp_path):
    class Broken(Regression):
        def loss(self, module, batch):
            loss = super().loss(module, batch)
            return NaNGradient.apply(loss) if batch.step == 4 else loss

    module, report, metrics = train(tmp_path, Broken())
    assert report.steps_not_updated == 1 and not metrics[4]["updated"]
    assert torch.isfinite(module.weight).all()


def test_checkpoints_and_previews_come_when_due(tmp_path):
    task = Regression()
    train(
        tmp_path,
        task,
        preview_at_first=True,
        checkpoints_due=lambda steps, epochs: [f"s{steps}"] * (steps % 3 == 0) + [f"e{epochs}"] * (epochs is not None),
        previews_due=lambda steps, epochs: [f"e{epochs:06d}"] if epochs else [],
    )
    assert task.saved == ["s3", "e1", "s6", "e2"]
    assert task.previews == [("000000", 0), ("e000001", 4), ("e000002", 8)]


def test_samples_that_could_not_be_read_are_listed(tmp_path):
    batches = list(micro_batches(8, 1, 12))
    batches[2].quarantined, batches[2].replaced = [("00000.tar:0000007", "truncated")], 1
    _, report, _ = train(tmp_path, batches=iter(batches))
    assert report.quarantined == 1
    (line,) = (tmp_path / "quarantine.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "sample": "00000.tar:0000007", "reason": "truncated"}


def test_too_many_bad_samples_stop_the_run_with_a_summary(tmp_path):
    batches = list(micro_batches(8, 1, 12))
    for step in (1, 3, 4):
        batches[step].quarantined = [(f"0.tar:{step}", f"truncated at {step}"), ("0.tar:9", "no image")]
        batches[step].replaced = 2
    with pytest.raises(TrainingError) as error:  # 4 of 48 are 8.3 %, 6 of 60 are 10 %
        train(tmp_path, batches=iter(batches), epoch_samples=48, max_bad_samples=0.09)
    assert "6 of 60 samples (10.00%) cannot be used: 3 × truncated at N; 3 × no image" in str(error.value)
    assert "quarantine*.jsonl" in str(error.value)
    metrics = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["quarantined"] for line in metrics] == [0, 2, 2, 4, 6]
    assert len((tmp_path / "quarantine.jsonl").read_text().splitlines()) == 6


TWO_RANKS = """
import sys
from pathlib import Path
from types import SimpleNamespace
from accelerate import Accelerator
from library.exit_status import run_script
from library.errors import TrainingError
from library.training.ranks.rank_watch import sums_of_all
from library.training.log.quarantine import Quarantine

accelerator = Accelerator(cpu=True)
rank = accelerator.process_index
quarantine = Quarantine(accelerator, Path(sys.argv[1]), print, samples=40, share=0.1)
quarantine.begin(0, [("0.tar:x", "no image")])
for step in range(10):
    bad = [(f"0.tar:{step}", "cut")] if rank == 1 and step >= 2 else []
    (replaced,) = sums_of_all(accelerator, [len(bad)])
    quarantine.add(step, [SimpleNamespace(quarantined=bad)], int(replaced))
    try:
        quarantine.stop_if_too_many((step + 1) * 4)
    except TrainingError as error:
        (Path(sys.argv[1]) / f"stopped{rank}").write_text(f"{step} {error}")
        break
run_script(lambda: None)
"""


def test_two_processes_stop_at_the_same_step_though_one_alone_saw_the_bad_samples(tmp_path):
    script = tmp_path / "ranks.py"
    script.write_text(TWO_RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2", script, tmp_path]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=environment, check=True, timeout=240)
    texts = [(tmp_path / f"stopped{rank}").read_text() for rank in range(2)]
    assert all(text.startswith("6 --max_bad_samples 0.1: 5 of 28") and "5 × cut" in text for text in texts)
    first, second = ((tmp_path / name).read_text() for name in ("quarantine.jsonl", "quarantine.rank1.jsonl"))
    assert json.loads(first) == {"step": 0, "sample": "0.tar:x", "reason": "no image"}
    assert len(second.splitlines()) == 5


class NoCheckpoints(Regression):
    """A task whose checkpoints fail."""

    def save(self, stem, module):
        raise OSError(28, "No space left on device")


def test_a_checkpoint_that_fails_costs_no_state_of_its_step(tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(
        States, "save", lambda self, steps_done, metrics, stem=None, anew=False: saved.append(steps_done)
    )
    monkeypatch.setattr(States, "step_is_due", lambda self, steps_done: steps_done == 4)
    with pytest.raises(OSError, match="No space left"):
        train(tmp_path, NoCheckpoints(), checkpoints_due=lambda steps, epochs: ["at-4"] if steps == 4 else [])
    assert saved == [4]


def test_a_checkpoint_that_is_being_written_is_finished_before_a_process_leaves(tmp_path, monkeypatch):
    """As when another rank fails meanwhile: the process ends only once nothing is being written."""
    heard = Signals()
    monkeypatch.setattr(sys.modules[__name__], "Signals", lambda: heard)
    task, seen = Regression(), []
    monkeypatch.setattr(task, "save", lambda stem, module: (seen.extend(heard._being_written()), stem)[1])
    train(tmp_path, task, steps=1, checkpoints_due=lambda steps, epochs: ["last"])
    assert seen == ["a checkpoint"] and not heard._being_written()


class Pictures(Regression):
    """A task that notes from when on pictures count as drawn; `error` comes in place of the first."""

    def __init__(self, signals=None, error=None):
        super().__init__()
        self.signals, self.error = signals, error

    def preview(self, position, step, module, since=0.0):
        self.previews.append((position, since))
        if isinstance(self.error, Stopped):
            self.signals.stop_signal = signal.SIGTERM
        if self.error is not None:
            raise self.error


def due_at_step_4():
    return Counters(pictures=["000004"], saved_at=123.0)


def test_only_pictures_of_the_state_that_a_run_goes_on_from_may_be_there_already(tmp_path):
    """Later ones may be there, too, drawn by a run that was abandoned: those are drawn anew."""
    task = Pictures()
    due = lambda steps, epochs: ["000006"] if steps == 6 else []  # noqa: E731
    train(tmp_path, task, counters=due_at_step_4(), start_step=4, previews_due=due)
    assert task.previews == [("000004", 123.0), ("000006", 0.0)]


@pytest.mark.parametrize("start_step", [0, 4])
def test_pictures_that_are_cut_off_before_the_first_step_are_still_due(tmp_path, monkeypatch, start_step):
    """A step, and the state after it, would forget them."""
    heard = Signals()
    monkeypatch.setattr(sys.modules[__name__], "Signals", lambda: heard)
    task, counters = Pictures(heard, Stopped(signal.SIGTERM)), due_at_step_4() if start_step else None
    with pytest.raises(Stopped):
        train(tmp_path, task, counters=counters, start_step=start_step, preview_at_first=True)
    assert len(task.previews) == 1 and not task.losses_asked
    assert counters is None or counters.pictures == ["000004"]


def test_another_processs_failure_is_no_failure_of_pictures(tmp_path, monkeypatch):
    heard = Signals()
    heard.failure = TrainingError("rank 1 has failed")
    monkeypatch.setattr(sys.modules[__name__], "Signals", lambda: heard)
    with pytest.raises(TrainingError, match="rank 1 has failed"):
        train(tmp_path, Pictures(heard, heard.failure), preview_at_first=True)


class NoPictures(Regression):
    """A task whose pictures fail."""

    def preview(self, position, step, module, since=0.0):
        raise OSError(28, "No space left on device")


def test_pictures_that_fail_end_no_run_and_cost_no_state(tmp_path, caplog, monkeypatch):
    saved = []
    monkeypatch.setattr(
        States, "save", lambda self, steps_done, metrics, stem=None, anew=False: saved.append(steps_done)
    )
    monkeypatch.setattr(States, "step_is_due", lambda self, steps_done: steps_done == 4)
    task = NoPictures()
    monkeypatch.setattr(task, "preview", lambda *_: (saved.append("picture"), NoPictures.preview(task, *_)))
    _, report, _ = train(
        tmp_path, task, preview_at_first=True, previews_due=lambda steps, epochs: ["000004"] if steps == 4 else []
    )
    assert report.steps == 8
    assert saved == ["picture", 4, "picture"]  # the state is there before the picture is tried
    assert [record.getMessage() for record in caplog.records if record.levelname == "WARNING"] == [
        f"sample pictures after step {step}: [Errno 28] No space left on device; training goes on" for step in (0, 4)
    ]
