"""What a start moves aside: by whose it is and at which step it was made, whatever its name says it by."""

import json
from pathlib import Path

import pytest

from library.errors import InputError
from library.training.state.branch import start_branch
from library.training.state.files import INFO, StateInfo, read_info
from library.training.state.lineage import Lineage, lineage_of, new_lineage
from library.training.state.names import step_name
from library.training.state.writer import StateWriter
from test.training_runs import aside


def info(step: int, lineage: Lineage) -> StateInfo:
    return StateInfo(step, 7, "abc", {}, {}, {}, lineage)


def save(folder: Path, stem: str, step: int, lineage: Lineage) -> Path:
    with StateWriter(folder) as writer:
        writer.snapshot(stem, info(step, lineage), {})
    return folder / f"{stem}-state"


def checkpoint(path: Path) -> None:
    """A file, or a folder of diffusers for a name without an ending."""
    if path.suffix:
        path.write_text("weights")
    else:
        path.mkdir()
        (path / "model_index.json").write_text("{}")


def metrics(folder: Path, runs: dict[int, str]) -> None:
    lines = [json.dumps({"step": step, "run": run}) for step, run in runs.items()]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name != "abandoned"}


def steps(folder: Path) -> list[int]:
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture
def folder(tmp_path):
    """What a run of 6 steps in epochs of 2 has left, with a state of step 4."""
    first = new_lineage(None, 0, [])
    save(tmp_path, step_name(None, 4), 4, first)
    for name in ("at-step00000003.safetensors", "at-step00000005.ckpt", "at-step00000005-ema.ckpt", "epoch-000002.ckpt",
                 "epoch-000003", "epoch-000003-ema", "last.safetensors", "last-ema.safetensors"):  # fmt: skip
        checkpoint(tmp_path / name)
    metrics(tmp_path, dict.fromkeys(range(1, 7), first.run_id))
    for name in ("quarantine.jsonl", "quarantine.rank3.jsonl"):
        lines = ({"step": step, "sample": "x", "reason": "cut"} for step in (0, 4, 5))
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "quarantine.old.jsonl").write_text("the user's")
    (tmp_path / "other-step00000009.safetensors").write_text("of another --output_name")
    return tmp_path


def resumed(folder: Path, stem: str) -> tuple[Path, StateInfo]:
    state = folder / f"{stem}-state"
    return state, read_info(state)


def test_what_was_made_after_the_state_is_moved_aside(folder):
    lineage = start_branch(folder, None, resumed(folder, step_name(None, 4)), lambda epoch: 2 * epoch)
    kept = aside(folder, 2)
    assert names(kept) == {
        "at-step00000005.ckpt", "at-step00000005-ema.ckpt", "epoch-000003", "epoch-000003-ema", "last.safetensors",
        "last-ema.safetensors", "metrics.jsonl", "quarantine.jsonl", "quarantine.rank3.jsonl",
    }  # fmt: skip
    assert names(folder) == {
        "at-step00000004-state", "at-step00000003.safetensors", "epoch-000002.ckpt", "metrics.jsonl",
        "quarantine.jsonl", "quarantine.rank3.jsonl", "quarantine.old.jsonl", "other-step00000009.safetensors",
    }  # fmt: skip
    assert (steps(folder), steps(kept)) == ([1, 2, 3, 4], [5, 6])
    assert [json.loads(line)["step"] for line in (kept / "quarantine.rank3.jsonl").read_text().splitlines()] == [5]
    assert lineage.attempt == 2 and lineage.step == 4


def test_going_on_after_a_kill_again_and_again_moves_nothing_that_is_on_the_branch(folder):
    parent = resumed(folder, step_name(None, 4))
    for attempt in (2, 3, 4):
        lineage = start_branch(folder, None, parent, lambda epoch: 2 * epoch)
        assert lineage.attempt == attempt
        step = 4 + attempt
        done = {ancestor.step: ancestor.run_id for ancestor in lineage.ancestors}
        metrics(folder, {**done, **dict.fromkeys(range(parent[1].step + 1, step + 2), lineage.run_id)})
        state = save(folder, step_name(None, step), step, lineage)
        parent = state, read_info(state)
    lineage = start_branch(folder, None, parent, lambda epoch: 2 * epoch)
    assert {path.name for path in folder.glob("*-state")} == {
        f"at-step{step:08d}-state" for step in (4, 6, 7, 8)
    }  # fmt: skip
    assert [ancestor.step for ancestor in lineage.ancestors] == [4, 6, 7, 8]
    assert not list(folder.glob("abandoned/*/*-state"))


def test_a_start_from_the_beginning_moves_all_but_what_it_reads(folder):
    model = folder / "last.safetensors"
    vae = folder / "epoch-000003" / "vae"
    start_branch(folder, None, None, lambda epoch: 2 * epoch, in_use={model, vae})
    assert names(folder) == {
        "last.safetensors", "epoch-000003", "quarantine.old.jsonl", "other-step00000009.safetensors",
    }  # fmt: skip
    assert steps(aside(folder, 2)) == [1, 2, 3, 4, 5, 6]


def test_states_of_other_runs_and_damaged_ones_do_not_stay_in_the_way(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    other = save(elsewhere, "last", 4, new_lineage(None, 0, [7]))
    damaged = save(folder, step_name(None, 5), 5, new_lineage(None, 0, []))
    (damaged / INFO).write_text("{")
    lineage = start_branch(folder, None, resumed(elsewhere, "last"), lambda epoch: 2 * epoch)
    kept = aside(folder, 9)
    assert lineage.attempt == 9 and lineage.parent == read_info(other).lineage.run_id
    assert {"at-step00000004-state", "at-step00000005-state", "at-step00000003.safetensors"} <= names(kept)
    assert steps(kept) == [1, 2, 3, 4, 5, 6] and steps(folder) == []
    assert other.exists()


def test_a_folder_that_refuses_is_named_and_nothing_is_lost(folder, monkeypatch):
    before = names(folder)

    def refuse(*_):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(Path, "rename", refuse)
    with pytest.raises(InputError, match=r"--output_dir .*before-attempt-2 \(Read-only file system\)"):
        start_branch(folder, None, None, lambda epoch: 2 * epoch)
    assert names(folder) == before


def test_a_lineage_that_is_damaged_is_an_error_of_the_state(folder):
    path = folder / "at-step00000004-state" / INFO
    content = json.loads(path.read_text())
    assert lineage_of(content["lineage"]) == read_info(path.parent).lineage
    for damage in ({}, [], {**content["lineage"], "attempt": "2"}, {**content["lineage"], "ancestors": [{}]}):
        path.write_text(json.dumps({**content, "lineage": damage}))
        with pytest.raises(InputError, match=r"state\.json: lineage: damaged"):
            read_info(path.parent)
