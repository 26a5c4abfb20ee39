"""The shell scripts that a newcomer starts: what they accept, what they say, what they return."""

import os
import subprocess
import sys
import venv
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def bash(*command, **environment):
    clean = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "VIRTUAL_ENV", "CONDA_PREFIX")}
    return subprocess.run(
        ["bash", *map(str, command)], cwd=ROOT, env=clean | environment, capture_output=True, text=True, timeout=120
    )


@pytest.fixture(scope="module")
def empty_environment(tmp_path_factory):
    folder = tmp_path_factory.mktemp("venv")
    venv.create(folder, with_pip=False)
    return folder


def test_an_interpreter_that_has_everything_is_used_as_it_is():
    done = bash("test/setup_env.sh", PYTHON=sys.executable)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == sys.executable


def test_an_active_environment_that_has_everything_is_used_as_it_is():
    done = bash("test/setup_env.sh", VIRTUAL_ENV=sys.prefix)
    assert done.returncode == 0
    assert done.stdout.splitlines()[-1] == f"{sys.prefix}/bin/python"


def test_an_interpreter_that_lacks_something_is_refused_by_name(empty_environment):
    done = bash("test/setup_env.sh", PYTHON=str(empty_environment / "bin" / "python"))
    assert done.returncode == 2
    assert "does not satisfy requirements.txt" in done.stderr
    assert "unset PYTHON" in done.stderr


def test_an_interpreter_that_is_not_there_is_named():
    done = bash("test/setup_env.sh", PYTHON="/no/such/python")
    assert done.returncode == 2
    assert "/no/such/python is not an interpreter" in done.stderr


def test_what_is_missing_and_what_is_too_old_are_listed(tmp_path):
    (tmp_path / "base.txt").write_text("torch>=999  # newer than any\n")
    (tmp_path / "more.txt").write_text('-r base.txt\nno-such-package\nnumpy\nother; python_version < "3"\n')
    done = subprocess.run(
        [sys.executable, "test/check_requirements.py", tmp_path / "more.txt"], cwd=ROOT, capture_output=True, text=True
    )
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert len(lines) == 2
    assert lines[0].startswith("torch>=999 (installed: ")
    assert lines[1] == "no-such-package (not installed)"


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--batchsize=4", "unknown argument --batchsize"),
        ("batch_size=4", "unknown argument batch_size=4"),
        ("--batch-size=4", "unknown argument --batch-size"),
    ],
)
def test_an_unknown_launcher_argument_is_an_error(argument, message):
    done = bash("test/pretrain_full_1m_1p_sdxl.sh", argument)
    assert done.returncode == 2
    assert message in done.stderr
    assert "max_train_epoch" in done.stderr


def test_help_shows_the_published_defaults():
    shown = bash("test/pretrain_full_1m_1p_sdxl.sh", "--help").stdout
    for default in (
        "batch_size=4",
        "max_train_epoch=120",
        "mixed_precision=fp16",
        "resolution=1024,1024",
        "dataset_name=laion",
    ):
        assert f"--{default}\n" in shown


def test_a_failed_training_fails_the_launcher_and_prints_no_block(tmp_path):
    done = bash(
        "test/pretrain_full_1m_1p_sdxl.sh",
        "--dataset_name=/no/such/folder",
        f"--output_dir={tmp_path}",
        PYTHON=sys.executable,
    )
    assert done.returncode == 2
    assert "/no/such/folder" in done.stdout
    assert "training failed with exit status 2" in done.stderr
    assert "Final result" not in done.stdout


def test_relative_paths_are_relative_to_where_the_user_stands(tmp_path):
    (tmp_path / "pictures").mkdir()
    launcher = ROOT / "test" / "pretrain_full_1m_1p_sdxl.sh"
    done = subprocess.run(
        ["bash", launcher, "--dataset_name=pictures", "--output_dir=out", "--model_name=owner/name"],
        cwd=tmp_path, env=os.environ | {"PYTHON": sys.executable}, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert f"--train_data_dir {tmp_path / 'pictures'}" in (tmp_path / "out" / "train_0.log").read_text()
    assert done.returncode == 2


def test_the_ascend_environment_says_that_there_is_no_cann():
    if Path("/usr/local/Ascend").exists():
        pytest.skip("CANN is installed here")
    done = bash("-c", "set -eu; source test/env_npu.sh; echo HCCL=${HCCL_CONNECT_TIMEOUT:-unset}")
    assert done.stdout.splitlines() == ["env_npu.sh: no CANN found, Ascend's environment is not set", "HCCL=unset"]


def test_the_ascend_environment_keeps_what_the_user_has_set(tmp_path):
    (tmp_path / "set_env.sh").write_text('echo "cann $UNSET_VARIABLE"\n')
    script = (
        "set -euo pipefail; source test/env_npu.sh; "
        "echo $TASK_QUEUE_ENABLE $HCCL_CONNECT_TIMEOUT ${HCCL_BUFFSIZE:-unset}; set +o | grep nounset"
    )
    one = bash("-c", script, ASCEND_TOOLKIT_HOME=str(tmp_path), TASK_QUEUE_ENABLE="2")
    assert one.stdout.splitlines() == ["cann ", "2 5400 unset", "set -o nounset"], one.stderr
    many = bash("-c", script, ASCEND_TOOLKIT_HOME=str(tmp_path), NNODES="2")
    assert many.stdout.splitlines()[1] == "1 5400 50"
