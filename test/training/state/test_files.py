"""Training states on disk: what comes back, and what a reader refuses."""

import json
import logging
import os
import re
import subprocess
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

from library.errors import InputError
from library.training.state.choice import clear_left_behind, newest_valid, obsolete, state_names
from library.training.state.files import MANIFEST, StateInfo, read_info, read_state, verify, write_tensors
from library.training.state.lineage import new_lineage
from library.training.state.names import epoch_name, last_name, step_name
from library.training.state.retention import Retention
from library.training.state.run_lock import RunLock
from library.training.state.tree import pack, unpack
from library.training.state.writer import StateWriter

LINEAGE = new_lineage(new_lineage(new_lineage(None, 0, []), 2, []), 5, [])


def info(step: int, attempt: int = 3) -> StateInfo:
    lineage = replace(LINEAGE, attempt=attempt)
    return StateInfo(step, 7, "abc", {"train_batch_size": 4}, {"torch": "2"}, {"sum": 0.1 + 0.2}, lineage)


def save(folder: Path, stem: str, step: int, attempt: int = 3) -> Path:
    with StateWriter(folder) as writer:
        writer.snapshot(
            stem, info(step, attempt), {"rng": {"draws": step}}, {"unet": {"weight": torch.full((300,), float(step))}}
        )
    return folder / f"{stem}-state"


def test_a_tree_comes_back_as_it_was():
    tree = {
        "state": {0: {"step": torch.tensor(3.0), "exp_avg": torch.randn(2, 3)}, (1, "x"): [torch.zeros(0)]},
        "param_groups": [{"betas": (0.9, 0.999), "lr": 1e-3, "name": "unet", "fused": True, "maximize": None}],
        "a.b": torch.ones(1),
        "a": {"b": torch.zeros(1), "__tensor__": "no reference", "big": 2**70, "inf": float("inf")},
    }
    tensors, plain = pack(tree)
    again = unpack(tensors, json.loads(json.dumps(plain)))
    assert torch.equal(again["state"][0]["exp_avg"], tree["state"][0]["exp_avg"])
    assert again["state"][0].keys() == tree["state"][0].keys()
    assert again["state"][1, "x"][0].shape == (0,)
    assert again["param_groups"] == tree["param_groups"]
    assert (float(again["a.b"]), float(again["a"]["b"])) == (1.0, 0.0)
    assert {key: value for key, value in again["a"].items() if key != "b"} == {
        "__tensor__": "no reference", "big": 2**70, "inf": float("inf"),
    }  # fmt: skip
    with pytest.raises(TypeError, match=r"param_groups\.0\.hook: a function"):
        pack({"param_groups": [{"hook": lambda: None}]})


def test_safetensors_reads_what_is_written(tmp_path):
    from safetensors.torch import load_file

    dtypes = [torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16,
              torch.int8, torch.uint8, torch.bool]  # fmt: skip
    tensors = {f"t.{number}": torch.arange(7).to(dtype) for number, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "empty": torch.zeros(0, 3), '\u00e9 "': torch.ones(2, 3)}
    entry = write_tensors(tmp_path / "x.safetensors", tensors)
    again = load_file(tmp_path / "x.safetensors")
    assert again.keys() == tensors.keys()
    assert all(again[name].dtype == t.dtype and torch.equal(again[name], t) for name, t in tensors.items())
    assert entry.bytes == (tmp_path / "x.safetensors").stat().st_size
    theirs = subprocess.run(["sha256sum", tmp_path / "x.safetensors"], capture_output=True, text=True, check=True)
    assert theirs.stdout.split()[0] == entry.sha256


def test_an_optimizer_goes_on_from_a_state_bit_by_bit(tmp_path):
    def make():
        torch.manual_seed(1)
        module = torch.nn.Linear(5, 3)
        return module, torch.optim.AdamW(module.parameters(), lr=0.1, fused=True)

    def step(module, optimizer, number):
        torch.manual_seed(number)
        module(torch.randn(4, 5)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()

    module, optimizer = make()
    for number in range(3):
        step(module, optimizer, number)
    with StateWriter(tmp_path) as writer:
        writer.snapshot("last", info(3), {"optimizer": optimizer.state_dict()}, {"module": module.state_dict()})
        step(module, optimizer, 3)  # while it is being written
    again, its_optimizer = make()
    state = read_state(tmp_path / "last-state")
    again.load_state_dict(state.whole["module"])
    its_optimizer.load_state_dict(state.own[0]["optimizer"])
    step(again, its_optimizer, 3)
    assert torch.equal(again.weight, module.weight)
    assert state.info == info(3)


def test_no_pickle_is_in_a_state(tmp_path):
    folder = save(tmp_path, "last", 3)
    assert sorted(path.name for path in folder.iterdir()) == [
        "manifest.json", "rank00000-of-00001.rng.json", "rank00000-of-00001.rng.safetensors", "rows.json",
        "state.json", "unet.json", "unet.safetensors",
    ]  # fmt: skip
    assert [path.name for path in tmp_path.iterdir()] == ["last-state"]


# What is refused -----------------------------------------------------------------------------------------------------


def _flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[-5] ^= 1
    path.write_bytes(content)


def _of_format(number: int, folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    (folder / MANIFEST).write_text(json.dumps({**content, "format": number}))


def _escape(folder: Path) -> None:
    content = json.loads((folder / MANIFEST).read_text())
    content["files"]["../outside.json"] = content["files"]["unet.json"]
    (folder / MANIFEST).write_text(json.dumps(content))


SPOILED = {
    "truncated": (lambda f: os.truncate(f / "unet.safetensors", 900), r"unet\.safetensors: cut off .*900 bytes"),
    "grown": (lambda f: (f / "unet.json").open("a").write(" "), r"unet\.json: cut off or grown"),
    "flipped bit": (lambda f: _flip(f / "unet.safetensors"), r"unet\.safetensors: its bytes have changed"),
    "flipped bit in the state": (lambda f: _flip(f / "state.json"), r"state\.json"),
    "missing file": (lambda f: (f / "unet.safetensors").unlink(), r"the file unet\.safetensors is missing"),
    "missing manifest": (lambda f: (f / MANIFEST).unlink(), r"no manifest\.json in it"),
    "missing position": (lambda f: (f / "state.json").unlink(), r"state\.json"),
    "truncated manifest": (lambda f: os.truncate(f / MANIFEST, 100), r"manifest\.json: damaged"),
    "empty manifest": (lambda f: (f / MANIFEST).write_text("{}"), r"manifest\.json: damaged"),
    "path in the manifest": (_escape, r"manifest\.json: damaged \(\.\./outside\.json\)"),
    "older version": (partial(_of_format, 1), r"written by an older version \(format 1, this one reads 2\)"),
    "newer version": (partial(_of_format, 3), r"written by a newer version \(format 3, this one reads 2\)"),
}


@pytest.mark.parametrize("change", SPOILED)
def test_a_state_that_is_not_whole_is_passed_over_with_its_reason(tmp_path, change, caplog):
    spoil, reason = SPOILED[change]
    earlier, later = save(tmp_path, "at-step00000010", 10), save(tmp_path, "at-step00000020", 20)
    assert newest_valid(tmp_path, None) == later
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]
    spoil(later)
    with pytest.raises(InputError, match=reason):
        read_state(later)
    with caplog.at_level(logging.WARNING):
        assert newest_valid(tmp_path, None) == earlier
    said = [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]
    assert len(said) == 1
    assert "at-step00000020" in said[0]
    assert re.search(reason, said[0])
    assert float(read_state(earlier).whole["unet"]["weight"][0]) == 10.0


def test_the_newest_is_that_of_the_most_steps_whatever_clock_and_name_say(tmp_path):
    save(tmp_path, "epoch-000009", 90)
    most = save(tmp_path, "at-step00000100", 100)
    save(tmp_path, "last", 95)
    for age, name in enumerate(("last", "epoch-000009", "at-step00000100")):
        os.utime(tmp_path / f"{name}-state", (10**9 - age * 1000,) * 2)
    assert newest_valid(tmp_path, None) == most
    assert newest_valid(tmp_path, "mine") is None
    assert newest_valid(tmp_path / "nowhere", None) is None
    later = save(tmp_path, "at-step00000007", 7, attempt=4)  # a run that has gone back
    assert newest_valid(tmp_path, None) == later


def test_what_no_state_is_gets_a_clear_word(tmp_path):
    with pytest.raises(InputError, match=r"--resume takes the folder of a training state"):
        read_state(tmp_path / "nowhere")
    with pytest.raises(InputError, match=r"no manifest\.json in it, so it is no complete training state"):
        verify(tmp_path)
    (tmp_path / "state.json").write_text('{"step": "many"}')
    with pytest.raises(InputError, match="lacks"):
        read_info(tmp_path)


# Names and what is kept ----------------------------------------------------------------------------------------------


def test_names_of_one_output_name_are_told_from_others():
    mine = [f"{stem}-state" for stem in (step_name("a.b", 5), step_name("a.b", 123456789), epoch_name("a.b", 2), "a.b")]
    others = ["axb-step00000005-state", "a.b-step5", "a.b-c-step00000005-state", ".a.b-state.partial1", "last-state"]
    assert state_names([*mine, *others], "a.b") == sorted(mine)
    assert state_names([f"{last_name(None)}-state", "epoch-000001-state", "at-step00000001-state"], None) == [
        "at-step00000001-state", "epoch-000001-state", "last-state",
    ]  # fmt: skip


def test_steps_are_kept_by_distance_and_epochs_by_number():
    rule = Retention(last_n_epochs=2, last_n_steps=30)
    assert rule.obsolete_steps([10, 20, 30, 40, 50, 60], saved=50) == [10]
    assert rule.obsolete_steps([17, 20, 49, 50], saved=50) == [17]
    assert rule.obsolete_epochs([1, 3, 5, 7, 9], saved=7) == [1, 3]
    assert Retention(last_n_epochs=1, last_n_steps=0).obsolete_epochs([1, 2], saved=2) == [1]
    assert Retention().obsolete_steps([1, 2], 2) == Retention().obsolete_epochs([1, 2], 2) == []
    there = ["m-step00000010-state", "m-step00000050-state", "m-000001-state", "m-state", "n-step00000001-state"]
    assert obsolete(there, "m-step00000050-state", rule, "m") == ["m-step00000010-state"]
    assert obsolete(there, "m-state", rule, "m") == []


def test_a_killed_runs_remains_go_and_what_it_replaced_comes_back(tmp_path):
    state = save(tmp_path, "last", 5)
    state.rename(tmp_path / ".last-state.previous")
    for name in (".last-state.partial3", ".at-step00000001-state.removed", ".mine"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").touch()
    with RunLock(tmp_path) as lock:
        clear_left_behind(tmp_path, lock)
    assert sorted(path.name for path in tmp_path.iterdir()) == [".lock", ".mine", "last-state"]
    assert newest_valid(tmp_path, None) == state
