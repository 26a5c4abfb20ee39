"""Patches are data: applied with a line of the log, undone, refused where they do not fit; each is in the ledger.

That training is wrong without each and right with it is shown in two processes
(test/training/engine/processes_child.py) and, for the move to another device, on the simulated NPU
(test/npu_sim/inside/two_processes.py).
"""

import dataclasses
import importlib
import json
import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from library.errors import InputError
from third_patch import PATCHES, PatchError, apply
from third_patch.registry import Patch

ROOT = Path(__file__).parents[1]


def current(patch):
    module, _, path = patch.target.partition(":")
    owner = importlib.import_module(module)
    for name in path.split("."):
        owner = getattr(owner, name)
    return owner


def test_patches_are_logged_applied_and_undone(caplog):
    before = [current(patch) for patch in PATCHES]
    with caplog.at_level(logging.INFO):
        undo = apply(PATCHES)
    try:
        assert all(current(patch) is not one for patch, one in zip(PATCHES, before, strict=True))
        assert [record.getMessage() for record in caplog.records] == [f"patched {p.target}: {p.why}" for p in PATCHES]
    finally:
        undo()
    assert [current(patch) for patch in PATCHES] == before
    from fairscale.optim.oss import OSS

    assert "zero_grad" not in vars(OSS)  # inherited before, inherited again
    apply(PATCHES)()  # and once more


def test_a_second_patch_of_a_target_is_refused_and_leaves_nothing_behind():
    undo = apply(PATCHES[-1:])
    before = [current(patch) for patch in PATCHES]
    try:
        with pytest.raises(PatchError, match=re.escape(f"{PATCHES[-1].target} is patched already")):
            apply(PATCHES)
        assert [current(patch) for patch in PATCHES] == before
    finally:
        undo()


SCHEDULER = next(patch for patch in PATCHES if patch.target.endswith("AcceleratedScheduler.step"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"versions": "<1.0"}, r"was tried with accelerate <1\.0, and 1\.\d+\.\d+ is installed; install a version"),
        ({"signature": "(self, epoch)"}, r"takes \(self, \*args, .*written for \(self, epoch\)"),
        ({"target": "accelerate.scheduler:AcceleratedScheduler.leap"}, "accelerate .* has no such function"),
        ({"target": "accelerate.scheduler:Scheduler.step"}, "is not in accelerate .*Scheduler"),
        ({"target": "accelerate.planner:Planner.step"}, "is not in accelerate .*planner"),
        ({"target": "not_installed_at_all:step"}, "not_installed_at_all:step.* is not installed"),
    ],
)  # fmt: skip
def test_a_patch_that_does_not_fit_is_refused_by_name(change, message):
    with pytest.raises(PatchError, match=message) as refusal:
        apply([dataclasses.replace(SCHEDULER, **change)])
    assert isinstance(refusal.value, InputError)  # one line and exit status 2, as for any other setting
    apply([SCHEDULER])()


def test_the_ledger_has_a_line_for_each_patch_with_the_versions_in_code():
    ledger = (ROOT / "third_patch" / "README.md").read_text()
    rows = [line for line in ledger.splitlines() if line.startswith("| `")]
    assert [row.split("`")[1] for row in rows] == sorted(patch.target for patch in PATCHES)
    for patch, row in zip(sorted(PATCHES, key=lambda patch: patch.target), rows, strict=True):
        bounds = re.findall(r"\d[\d.]*", patch.versions)
        assert f"{patch.package} {' to '.join(bounds)}" in row


def test_the_pinned_versions_are_in_the_range_that_was_tried():
    requirements = (ROOT / "requirements.txt").read_text()
    for patch in PATCHES:
        (pinned,) = re.findall(rf"^{patch.package}==([\d.]+)", requirements, re.MULTILINE)
        assert patch.versions.endswith(f"={pinned}") or patch.versions.endswith(f"={pinned.rpartition('.')[0]}")


def ends() -> list[str]:
    (versions,) = {patch.versions for patch in PATCHES if patch.package == "accelerate"}
    return [bound + ".0" for bound in re.findall(r"\d+\.\d+", versions)]


@pytest.mark.all
@pytest.mark.parametrize("version", ends())
def test_both_ends_of_the_range_of_accelerate_train(version, tmp_path):
    """In an environment of its own, as far as accelerate goes."""
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path / "site")]
    done = subprocess.run([*install, f"accelerate=={version}"], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"accelerate {version} cannot be installed here: {done.stderr[-300:]}")
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path / "site"), str(ROOT)]), "OMP_NUM_THREADS": "1"}
    asked = subprocess.run(
        [sys.executable, "-c", "import accelerate; print(accelerate.__version__)"],
        env=env,
        capture_output=True,
        text=True,
    )
    assert asked.stdout.strip() == version
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
    child = ROOT / "test" / "training" / "engine" / "processes_child.py"
    done = subprocess.run([*command, child, tmp_path], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    for rank in (0, 1):
        failures = json.loads((tmp_path / f"{rank}.json").read_text())
        assert len(failures) >= 10 and not any(failures.values()), failures


def test_a_patch_is_data():
    assert all(isinstance(patch, Patch) and patch.why and patch.remove_when for patch in PATCHES)
