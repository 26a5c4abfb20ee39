"""The figures that a run reports of itself: speed, average loss, names of files, the final block."""

import errno
import json
import math
import os

import pytest

from library.training.cadence import Cadence
from library.training.log.final_block import FinalFigures, write_case_log
from library.training.log.metrics import MetricsWriter, MovingAverage, SpeedMeter, StepMetrics
from library.training.state.names import epoch_name, last_name, sample_name, step_name


def test_speed_leaves_the_warm_up_out():
    meter = SpeedMeter(warmup_steps=2)
    for seconds in (10, 10, 1, 1, 2):
        meter.add(images=4, seconds=seconds)
    assert meter.images_per_second == pytest.approx(12 / 4)
    assert meter.measured_steps == 3


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_a_run_shorter_than_the_warm_up_still_has_a_figure(steps):
    meter = SpeedMeter(warmup_steps=5)
    for step in range(steps):
        meter.add(images=4, seconds=steps - step)
    assert meter.images_per_second == pytest.approx(4.0)
    assert meter.measured_steps == 1


def test_the_average_is_over_the_last_values_that_are_finite():
    average = MovingAverage(window=3)
    assert math.isnan(average.value)
    for value in (100.0, 1.0, math.nan, 2.0, 3.0):
        average.add(value)
    assert average.value == 2.0


def test_names_are_the_references():
    assert step_name("sdxl", 500) == "sdxl-step00000500"
    assert step_name(None, 500) == "at-step00000500"
    assert epoch_name("sdxl", 20) == "sdxl-000020"
    assert epoch_name(None, 20) == "epoch-000020"
    assert (last_name("sdxl"), last_name(None)) == ("sdxl", "last")
    assert sample_name("sdxl", "20240131235959", "e000020", 0, 42) == "sdxl_20240131235959_e000020_00_42.png"
    assert sample_name(None, "20240131235959", "000500", 11, None) == "20240131235959_000500_11.png"


def test_cadence():
    cadence = Cadence(every_n_steps=3, every_n_epochs=2)
    assert [step for step in range(1, 10) if cadence.step_is_due(step)] == [3, 6, 9]
    assert [epoch for epoch in range(1, 5) if cadence.epoch_is_due(epoch)] == [2, 4]
    assert not any(Cadence().step_is_due(step) or Cadence().epoch_is_due(step) for step in range(1, 100))


FIGURES = FinalFigures(10.4, 0.12344, 3600.4, global_batch=32, process_count=8, batch_per_device=4)


def test_the_final_block_is_the_one_that_launchers_read():
    assert FIGURES.block().splitlines() == [
        "------------------ Final result ------------------",
        "Final Performance images/sec : 10.40",
        "Final Train Loss : 0.1234",
        "E2E Training Duration sec : 3600",
    ]


def test_the_case_log_has_every_entry(tmp_path):
    path = write_case_log(FIGURES, tmp_path, "SDXL_bs4_8p_acc", "SDXL")
    entries = dict(line.split(" = ") for line in path.read_text().splitlines())
    assert path.name == "SDXL_bs4_8p_acc.log"
    assert entries.pop("DeviceType")
    assert entries == {
        "Network": "SDXL", "RankSize": "8", "BatchSize": "4", "CaseName": "SDXL_bs4_8p_acc", "ActualFPS": "10.40",
        "TrainingTime": "3076.92", "ActualLoss": "0.1234", "E2ETrainingTime": "3600",
    }  # fmt: skip


def step_metrics(step, loss):
    return StepMetrics(step, 0, loss, loss, {"unet": 1e-3}, 1.0, None, 0, 8.0, 9.0, 0.1, 1000, True)


def test_metrics_are_written_as_they_come_and_name_the_start_that_wrote_them(tmp_path):
    for number, run in enumerate("ab"):
        writer = MetricsWriter(tmp_path, tmp_path / "logs", total_steps=4, steps_done=2 * number, run_id=run)
        writer.write(step_metrics(2 * number + 1, 0.5))
        writer.write_values(2 * number + 1, 1, {"loss/validation": 0.25})
        lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
        assert [line["run"] for line in lines[-2:]] == [run, run]
        writer.write(step_metrics(2 * number + 2, None))
        writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["run"]) for line in lines] == [
        (1, "a"), (1, "a"), (2, "a"), (3, "b"), (3, "b"), (4, "b"),
    ]  # fmt: skip


def test_tensorboard_shows_loss_and_rates(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    writer = MetricsWriter(tmp_path, tmp_path / "logs", total_steps=1)
    writer.write(step_metrics(1, 0.5))
    writer.close()
    (folder,) = (tmp_path / "logs").glob("*/finetuning")
    events = EventAccumulator(str(folder)).Reload()
    assert events.Scalars("loss")[0].value == 0.5
    assert events.Scalars("lr/unet")[0].value == pytest.approx(1e-3)


def test_only_the_main_process_writes(tmp_path):
    writer = MetricsWriter(tmp_path, None, total_steps=1, main=False)
    writer.write(step_metrics(1, 0.5))
    writer.close()
    assert not list(tmp_path.iterdir())


class FullDisk:
    """A disk that takes some bytes, then nothing, until there is room again."""

    def __init__(self, monkeypatch, room):
        self.room, self._write = room, os.write
        monkeypatch.setattr("library.training.log.appended_lines.os.write", self.write)

    def write(self, descriptor, content):
        if self.room is None:
            return self._write(descriptor, content)
        if not self.room:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        taken, self.room = content[: self.room], max(self.room - len(content), 0)
        return self._write(descriptor, taken)


def test_lines_that_a_full_disk_refuses_come_later_each_once_and_whole(tmp_path, monkeypatch, caplog):
    disk = FullDisk(monkeypatch, room=100)
    writer = MetricsWriter(tmp_path, None, total_steps=4)
    for step in range(1, 4):
        writer.write(step_metrics(step, 0.5))
        writer.sync()
    assert (tmp_path / "metrics.jsonl").stat().st_size == 100  # in the middle of a line
    disk.room = None
    writer.write(step_metrics(4, 0.5))
    writer.close()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [1, 2, 3, 4]
    assert [record.message.split("metrics.jsonl: ")[1] for record in caplog.records] == [
        "cannot be written (No space left on device); its lines wait in memory", "is written again"
    ]  # fmt: skip


def test_tensorboard_that_fails_ends_no_run_and_is_tried_again(tmp_path, monkeypatch, caplog):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    from torch.utils.tensorboard import SummaryWriter

    def full(self, *arguments, **more):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    writer = MetricsWriter(tmp_path, tmp_path / "logs", total_steps=4)
    writer.write(step_metrics(1, 0.5))
    with monkeypatch.context() as patched:
        patched.setattr(SummaryWriter, "add_scalar", full)
        writer.write(step_metrics(2, 0.5))
        writer.write(step_metrics(3, 0.5))
    assert len(caplog.records) == 1 and "No space left on device" in caplog.text
    monkeypatch.setattr("library.training.log.tensorboard._RETRY_AFTER_S", 0)
    writer.write(step_metrics(4, 0.25))
    writer.close()
    (folder,) = (tmp_path / "logs").glob("*/finetuning")
    events = EventAccumulator(str(folder))
    events.Reload()
    assert [event.step for event in events.Scalars("loss")] == [1, 4]


def test_a_terminal_that_is_gone_ends_no_run(tmp_path, monkeypatch):
    def gone(*arguments, **more):
        raise BrokenPipeError(errno.EPIPE, os.strerror(errno.EPIPE))

    writer = MetricsWriter(tmp_path, None, total_steps=2)
    for name in ("update", "write", "close", "set_postfix"):
        monkeypatch.setattr(writer.bar, name, gone)
    writer.write_text("a sample was replaced")
    writer.write(step_metrics(1, 0.5))
    writer.close()
    assert json.loads((tmp_path / "metrics.jsonl").read_text())["step"] == 1
