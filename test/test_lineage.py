"""Going back to an earlier state, starting anew in a used folder, refused resumes: what is where afterwards."""

import json
import os
import shutil
from pathlib import Path

import pytest

from library.training.state.files import read_info, verify
from library.training.task import Task
from test.conftest import STEPS
from test.training_runs import aside, assert_same_weights, digests, lines, state_of

EACH_STEP = ("--save_state_every_n_steps=1", "--lr_scheduler=constant", "--lr_warmup_steps=0")
AND_CHECKPOINTS = ("--save_every_n_steps=2", "--save_every_n_epochs=1")


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in lines(folder)]


def states(folder: Path) -> set[int]:
    return {int(path.name[7:15]) for path in folder.glob("at-step*-state")}


def runs(folder: Path) -> list[str]:
    """The run id of each line of metrics.jsonl."""
    return [json.loads(line)["run"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(train, tmp_path_factory):
    """Six steps with a state after each, checkpoints and TensorBoard."""
    out = tmp_path_factory.mktemp("whole") / "out"
    assert train(out, *EACH_STEP, *AND_CHECKPOINTS, f"--logging_dir={out / 'logs'}") == 0
    return out


@pytest.fixture(scope="module")
def gone_back(train, whole, tmp_path_factory):
    """The same, gone back to the state of step 2, trained to 4, and gone on by --resume=auto."""
    out = tmp_path_factory.mktemp("back") / "out"
    shutil.copytree(whole, out)
    back = (*EACH_STEP, *AND_CHECKPOINTS, "--save_last_n_steps_state=1", "--save_last_n_steps=2")
    back = (*back, f"--logging_dir={out / 'logs'}")
    assert train(out, *back, f"--resume={out / state_of(2)}", "--learning_rate=2e-3", "--max_train_steps=4") == 0
    at_4 = out.with_name("at_4")
    shutil.copytree(out, at_4)
    assert train(out, *back, "--resume=auto", "--learning_rate=2e-3") == 0
    return at_4, out


def test_auto_takes_the_newest_attempt_and_not_the_most_steps(gone_back):
    at_4, out = gone_back
    first, second, third = (read_info(folder).lineage for folder in (
        aside(at_4, 2) / state_of(6), at_4 / state_of(4), out / state_of(6),
    ))  # fmt: skip
    assert [one.attempt for one in (first, second, third)] == [1, 2, 3]
    assert (first.parent, second.parent, third.parent) == (None, first.run_id, second.run_id)
    assert steps(out) == [1, 2, 3, 4, 5, 6]
    assert runs(out) == [first.run_id] * 2 + [second.run_id] * 2 + [third.run_id] * 2


def test_what_lies_beyond_is_kept_whole_and_aside(whole, gone_back):
    at_4, out = gone_back
    for folder in (at_4, out):
        kept = aside(folder, 2)
        assert states(kept) == {3, 4, 5, 6}
        for step in (3, 4, 5, 6):
            verify(kept / state_of(step))
        assert steps(kept) == [3, 4, 5, 6]
        for name in ("at-step00000004.safetensors", "at-step00000006-ema.safetensors", "last.safetensors"):
            assert_same_weights(kept, whole, name)
        assert not (kept / "at-step00000002.safetensors").exists()
    assert not (aside(at_4, 3)).exists()


def test_retention_counts_the_new_branch_alone(gone_back):
    at_4, out = gone_back
    assert states(at_4) == {3, 4}
    assert states(out) == {5, 6}
    assert (out / "at-step00000004.safetensors").exists() and (out / "at-step00000006.safetensors").exists()
    assert not (out / "at-step00000002.safetensors").exists()


def test_tensorboard_follows_the_branch(gone_back):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    _, out = gone_back
    losses = {}
    for board in (out / "logs").iterdir():
        events = EventAccumulator(str(board / "finetuning"))
        events.Reload()
        for event in events.Scalars("loss"):
            assert event.step not in losses
            losses[event.step] = event.value
    assert losses == pytest.approx({line["step"]: line["loss"] for line in lines(out)}, rel=1e-6)


def test_the_abandoned_branch_can_be_gone_on_with(train, whole, gone_back, tmp_path):
    """What was set aside is a state like any other; the branch between stays aside in its turn."""
    out = tmp_path / "out"
    shutil.copytree(gone_back[0], out)
    there = aside(out, 2) / state_of(5)
    assert train(out, *EACH_STEP, f"--resume={there}") == 0
    assert lines(out) == lines(whole)
    assert_same_weights(out, whole)
    assert states(aside(out, 3)) == {3, 4}
    assert steps(aside(out, 3)) == [3, 4]
    assert states(out) == {5, 6}


def test_a_start_in_a_folder_that_holds_states_says_so_and_loses_nothing(train, whole, tmp_path, capfd):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    before = digests(whole)
    assert train(out, *EACH_STEP, "--learning_rate=5e-4", "--max_train_steps=3", "--save_last_n_steps_state=1") == 0
    printed = capfd.readouterr().err
    kept = aside(out, 2)
    assert f"{out} holds training states, the newest of step {STEPS}" in printed and "--resume=auto" in printed
    assert str(kept) in printed
    after = digests(kept)
    assert {name: digest for name, digest in before.items() if not name.startswith("logs/")} == after
    assert steps(out) == [1, 2, 3] and states(out) == {2, 3}
    capfd.readouterr()
    assert train(out, *EACH_STEP, "--learning_rate=5e-4", "--resume=auto") == 0
    assert f"resumed from {out / state_of(3)}: 3 steps are done" in capfd.readouterr().err
    assert steps(out) == [1, 2, 3, 4, 5, 6]
    assert digests(kept) == after


REFUSED = {
    "seed": ("--seed=2",),
    "global batch": ("--train_batch_size=3",),
    "data": ("--bucket_reso_steps=32",),
    "length": ("--max_train_steps=2",),
    "optimizer": ("--optimizer_type=SGD",),
    "parameters": ("--learning_rate_te1=0",),
    "precision": ("--mixed_precision=bf16", "--full_bf16"),
    "prediction": ("--v_parameterization",),
    "flags": ("--sample_every_n_steps=1",),
}


@pytest.mark.parametrize("kind", [*REFUSED, "damaged"])
def test_a_refused_resume_changes_no_file(train, whole, tmp_path, kind):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    if kind == "damaged":
        file = out / state_of(3) / "rank00000-of-00001.training.safetensors"
        os.truncate(file, file.stat().st_size - 1)
    before = digests(out)
    arguments = (*EACH_STEP, *AND_CHECKPOINTS, *REFUSED.get(kind, ()), f"--logging_dir={out / 'logs'}")
    assert train(out, *arguments, f"--resume={out / state_of(3)}") == 2
    assert digests(out) == before


def test_the_old_states_files_are_let_go_once_it_is_taken_up(train, whole, tmp_path, monkeypatch):
    out = tmp_path / "out"
    shutil.copytree(whole, out)
    held = []
    real = Task.loss

    def loss(self, module, batch):
        maps = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(out) in line]
        files = [str(path.readlink()) for path in Path("/proc/self/fd").iterdir() if path.is_symlink()]
        held.extend(line for line in (*maps, *files) if str(out) in line and "-state/" in line)
        return real(self, module, batch)

    monkeypatch.setattr(Task, "loss", loss)
    assert train(out, *EACH_STEP, f"--resume={out / state_of(4)}") == 0
    assert held == []
