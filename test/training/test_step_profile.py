"""--profile records the steps that it names and nothing else, and Chrome can read what it writes."""

import json

import pytest
import torch

import sdxl_pretrain
from library.errors import InputError
from library.options.logs import profiled_steps
from library.training.step_profile import StepProfiler, check_profile


@pytest.mark.parametrize(("text", "steps"), [("10..12", (10, 12)), ("7", (7, 7)), ("1..1", (1, 1))])
def test_steps_are_named_by_the_first_and_the_last(text, steps):
    assert profiled_steps(text) == steps


@pytest.mark.parametrize("text", ["", "0", "3..2", "1..", "..4", "a..b", "1-3", "-1..2"])
def test_other_steps_are_refused(text):
    with pytest.raises(ValueError, match=r"10\.\.12"):
        profiled_steps(text)


def test_steps_after_the_end_are_an_error():
    check_profile("4..9", 4)
    with pytest.raises(InputError, match=r"--profile=5\.\.9: the run ends after step 4"):
        check_profile("5..9", 4)


def recorded(folder):
    """Names of the events of each trace, by file."""
    return {
        path.name: [event.get("name", "") for event in json.loads(path.read_text())["traceEvents"]]
        for path in folder.glob("*.json")
    }


@pytest.mark.parametrize(("start", "end", "steps"), [(0, 6, 2), (3, 6, 1), (0, 3, 1)])
def test_only_the_steps_that_are_named_and_trained_are_recorded(tmp_path, start, end, steps):
    """Steps 3 and 4, of runs that go on from step 3 or end there, too."""
    profiler = StepProfiler("3..4", tmp_path, torch.device("cpu"), 1, start, end)
    for step in range(start + 1, end + 1):
        profiler.begin(step)
        torch.ones(step, step) @ torch.ones(step, step)
        profiler.end(step)
        assert len(list(tmp_path.iterdir())) == (step >= min(4, end))
    profiler.close()
    (name, events), *others = recorded(tmp_path).items()
    assert name.startswith("rank1.") and not others
    assert events.count("aten::mm") == steps
    assert sum(event.startswith("ProfilerStep#") for event in set(events)) == steps


def test_a_run_that_ends_early_leaves_what_was_recorded_and_a_full_disk_ends_none(tmp_path, caplog, monkeypatch):
    profiler = StepProfiler("1..9", tmp_path / "a", torch.device("cpu"), 0, 0, 9)
    profiler.begin(1)
    profiler.end(1)
    profiler.close()
    assert len(recorded(tmp_path / "a")) == 1
    (tmp_path / "b").write_text("no folder")
    profiler = StepProfiler("1", tmp_path / "b", torch.device("cpu"), 0, 0, 9)
    profiler.begin(1)
    profiler.end(1)
    assert "--profile: the trace cannot be written" in caplog.text


def test_a_run_writes_a_trace_of_its_steps(tiny_sdxl_folder, small_shard, tmp_path):
    arguments = [
        f"--pretrained_model_name_or_path={tiny_sdxl_folder}", f"--train_data_dir={small_shard}", "--resolution=64",
        "--enable_bucket", "--min_bucket_reso=32", "--max_bucket_reso=128", "--bucket_reso_steps=16",
        "--caption_extension=.txt", "--max_data_loader_n_workers=0", "--seed=1", "--max_train_steps=2",
        "--learning_rate=1e-3", "--save_model_as=safetensors", f"--output_dir={tmp_path}", "--profile=2",
    ]  # fmt: skip
    assert sdxl_pretrain.main(arguments) == 0
    (events,) = recorded(tmp_path / "profile").values()
    assert {"ProfilerStep#0", "Optimizer.step#AdamW.step"} <= set(events) and "ProfilerStep#1" not in events
