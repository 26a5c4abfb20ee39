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
    done = bash("-c", "set -eu; source test/env_npu.sh; echo HCCL=${HCCL_CONNECT_TIMEOUT:-unset}", **NO_CANN)
    assert done.stdout.splitlines() == ["env_npu.sh: no CANN found, Ascend's environment is not set", "HCCL=unset"]


def test_the_ascend_environment_keeps_what_the_user_has_set(tmp_path):
    (tmp_path / "set_env.sh").write_text('echo "cann $UNSET_VARIABLE"\n')
    script = (
        "set -euo pipefail; source test/env_npu.sh; "
        "echo $TASK_QUEUE_ENABLE $HCCL_CONNECT_TIMEOUT ${HCCL_BUFFSIZE:-unset} ${PYTORCH_NPU_ALLOC_CONF:-unset}; "
        "set +o | grep nounset"
    )
    one = bash("-c", script, **NO_CANN, ASCEND_TOOLKIT_HOME=str(tmp_path), TASK_QUEUE_ENABLE="2")
    assert one.stdout.splitlines() == ["cann ", "2 5400 unset expandable_segments:True", "set -o nounset"], one.stderr
    own = {"PYTORCH_ALLOC_CONF": "max_split_size_mb:50", "HCCL_BUFFSIZE": "50"}  # torch_npu refuses both variables
    many = bash("-c", script, **NO_CANN, ASCEND_TOOLKIT_HOME=str(tmp_path), NNODES="2", **own)
    assert many.stdout.splitlines()[1] == "1 5400 50 unset"


NOWHERE = "/no/such/folder"
NO_CANN = {"ASCEND_INSTALL_INFO": NOWHERE, "HOME": NOWHERE, "ASCEND_DEFAULT_FOLDER": ""}


def test_cann_is_found_where_it_may_be_and_by_both_scripts(tmp_path):
    """The environment first, then the installer's note, the user's folder, the system's."""
    for folder in ("custom/cann", "noted/cann", "home/Ascend/ascend-toolkit", "system/nnae"):
        (tmp_path / folder).mkdir(parents=True)
        (tmp_path / folder / "set_env.sh").write_text(f"echo {folder}\n")
    (tmp_path / "custom" / "cann" / "latest").mkdir()
    (tmp_path / "info").write_text(f"version=1.0\nToolkit_Install_Path={tmp_path}/noted\n")
    places = {
        "ASCEND_HOME_PATH": f"{tmp_path}/custom/cann/latest",  # the script is one above it
        "ASCEND_INSTALL_INFO": f"{tmp_path}/info",
        "HOME": f"{tmp_path}/home",
        "ASCEND_DEFAULT_FOLDER": f"{tmp_path}/system",
    }
    for name, expected in zip(
        places, ("custom/cann", "noted/cann", "home/Ascend/ascend-toolkit", "system/nnae"), strict=True
    ):
        asked = {key: value for key, value in places.items() if list(places).index(key) >= list(places).index(name)}
        done = bash("test/find_cann.sh", **{**NO_CANN, **asked})
        assert done.stdout == f"{tmp_path}/{expected}/set_env.sh\n"
        assert bash("-c", "source test/env_npu.sh", **{**NO_CANN, **asked}).stdout.splitlines() == [expected]
    assert bash("test/find_cann.sh", **NO_CANN).returncode == 1
    asked = {**NO_CANN, "HOME": f"{tmp_path}/home", "PYTHON": sys.executable}
    assert "does not satisfy requirements-npu.txt" in bash("test/setup_env.sh", **asked).stderr


def test_on_ascend_torch_comes_without_cuda_where_it_can_be_had(tmp_path):
    """PyTorch's own index is asked first, for torch and torchvision alone; where it fails the registry's follow."""
    for name in ("setup_env.sh", "find_cann.sh", "check_requirements.py"):
        (tmp_path / "test").mkdir(exist_ok=True)
        (tmp_path / "test" / name).write_text((ROOT / "test" / name).read_text())
    for name in ("requirements.txt", "requirements-npu.txt"):
        (tmp_path / name).write_text((ROOT / name).read_text())
    log = tmp_path / "pip.log"
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(f'#!/bin/sh\n[ "$1" = -m ] || exit 0\necho "$@" >> {log}\n[ "$8" != "$INDEX_FAILS" ]\n')
    python.chmod(0o755)
    for fails in ("none", "https://download.pytorch.org/whl/cpu"):
        log.write_text("")
        done = bash(tmp_path / "test" / "setup_env.sh", "requirements-npu.txt", **NO_CANN, INDEX_FAILS=fails)
        assert done.returncode == 0, done.stderr
        first, second = log.read_text().splitlines()
        assert first.endswith(
            "--no-deps --index-url https://download.pytorch.org/whl/cpu torch==2.14.0 torchvision==0.29.0"
        )
        assert second.endswith("-r requirements-npu.txt")
        assert ("the registry's follows, with CUDA" in done.stderr) is (fails != "none")
        (tmp_path / ".venv" / ".installed-requirements-npu").unlink()
