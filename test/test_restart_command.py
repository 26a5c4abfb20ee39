"""The command that a stopped run shows: what was given, with --resume=auto, and without secrets."""

import shlex
import sys

import pytest

from library import redaction
from library.restart_command import restart_command


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    for name in ("LAUNCHER_COMMAND", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "resume", [[], ["--resume=auto"], ["--resume=out/at_step00000001_state"], ["--resume", "auto"]]
)
def test_what_was_given_stays_and_it_resumes_the_newest(resume):
    given = ["--output_dir=my out", *resume, "--optimizer_args", "weight_decay=0.1"]
    command = restart_command("sdxl_pretrain.py", given)
    assert shlex.split(command) == [
        sys.executable, "sdxl_pretrain.py", "--resume=auto", "--output_dir=my out", "--optimizer_args",
        "weight_decay=0.1",
    ]  # fmt: skip


def test_it_is_the_launchers_where_one_has_started_it(monkeypatch):
    monkeypatch.setenv("LAUNCHER_COMMAND", "bash test/pretrain.sh --dataset_name=/my\\ data --resume= -- --seed=1 ")
    assert shlex.split(restart_command("sdxl_pretrain.py", ["--x=1"])) == [
        "bash", "test/pretrain.sh", "--resume=auto", "--dataset_name=/my data", "--", "--seed=1",
    ]  # fmt: skip


def test_of_several_processes_it_is_what_each_of_them_runs(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert restart_command("train.py", ["--seed=1"]).startswith("train.py --resume=auto --seed=1    (by torchrun")


def test_secrets_are_left_out():
    given = [
        "--train_data_dir=https:" + "//user:hunter22@host/a.tar",
        "--reg_data_dir=pipe:KEY=s3cret9 aws s3 cp s3:" + "//b/c.tar -",
    ]
    command = restart_command("train.py", given)
    assert "hunter22" not in command and "s3cret9" not in command
    assert "host/a.tar" in command and "//b/c.tar" in command


def test_what_an_address_has_in_it_stays_in_other_words(monkeypatch):
    monkeypatch.setattr(redaction, "_known", set())
    redaction.remember("pipe:PASSWORD=training aws s3 cp s3:" + "//b/c.tar -")
    assert "--output_dir=out/training" in restart_command("train.py", ["--output_dir=out/training"])
