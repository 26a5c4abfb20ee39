"""Which of several failures is shown: the one that the others follow from."""

import json
import signal
from types import SimpleNamespace

import pytest

from library.errors import InputError, Stopped, TrainingError
from library.exit_status import EXIT_BAD_INPUT, EXIT_FAILED, run_main
from library.processes.failures import Failure, log_of_rank, recorded_failures, root_cause, unrecorded_failures
from library.training.ranks.rank_failure import RankFailure

PEER_GONE = "RuntimeError: [gloo/transport/tcp/pair.cc:561] Connection closed by peer [127.0.0.1]:24495."


def fail_as(rank, error, folder, monkeypatch):
    """What a process leaves behind that ends with an error."""
    (folder / str(rank)).mkdir(parents=True)
    monkeypatch.setenv("RANK", str(rank))
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(folder / str(rank) / "error.json"))

    def work():
        raise error

    return run_main(work)


def exits(**codes):
    return {int(rank[1:]): SimpleNamespace(exitcode=code, timestamp=1000) for rank, code in codes.items()}


@pytest.mark.parametrize(
    ("error", "status", "shown"),
    [
        (InputError("--x is wrong"), EXIT_BAD_INPUT, "error: --x is wrong"),
        (TrainingError("no finite loss"), EXIT_FAILED, "training stopped: no finite loss"),
        (ValueError("a bug"), EXIT_FAILED, "ValueError: a bug"),
        (RuntimeError("CUDA out of memory"), EXIT_FAILED, "CUDA out of memory"),
    ],
)
def test_an_error_of_ones_own_is_shown_before_the_broken_connections_that_follow(
    error, status, shown, tmp_path, monkeypatch
):
    assert fail_as(0, RuntimeError(PEER_GONE), tmp_path, monkeypatch) == EXIT_FAILED  # noticed first
    assert fail_as(1, error, tmp_path, monkeypatch) == status
    cause = root_cause(recorded_failures(0, tmp_path))
    assert (cause.rank, cause.status) == (1, status)
    assert cause.report().startswith("training failed: rank 1 (machine 0, ")
    assert cause.report().endswith(shown)


def test_an_error_that_another_process_has_told_of_is_not_the_cause(tmp_path, monkeypatch):
    """It may be written down first: the process that fails waits until the others have heard of it."""
    told = RankFailure.of(ValueError("a bug"), 1).as_error()
    assert fail_as(0, told, tmp_path, monkeypatch) == fail_as(1, ValueError("a bug"), tmp_path, monkeypatch) == 1
    cause = root_cause(recorded_failures(0, tmp_path))
    assert cause.rank == 1 and "Traceback" in cause.text


def test_a_process_that_was_told_to_stop_is_not_the_cause(tmp_path, monkeypatch):
    """torchrun ends the processes beside a failed one by SIGTERM, at which the trainer saves and stops."""
    fail_as(0, RuntimeError(PEER_GONE), tmp_path, monkeypatch)
    assert fail_as(1, Stopped(signal.SIGTERM), tmp_path, monkeypatch) == 143
    assert root_cause(recorded_failures(0, tmp_path)).rank == 0


def test_where_every_process_finds_the_same_error_the_first_one_is_shown(tmp_path, monkeypatch):
    for rank in (2, 0, 1):
        fail_as(rank, InputError("--x is wrong"), tmp_path, monkeypatch)
    assert root_cause(recorded_failures(0, tmp_path)).rank == 2


def test_a_killed_process_is_the_cause_and_its_log_ends_the_report(tmp_path, monkeypatch):
    fail_as(0, RuntimeError(PEER_GONE), tmp_path, monkeypatch)
    log = str(tmp_path / "train_0")
    log_of_rank(log, 3).write_text("".join(f"line {number}\n" for number in range(100)))
    known = recorded_failures(1, tmp_path)
    found = [*known, *unrecorded_failures(1, exits(_0=1, _3=-9, _2=-15), known, log)]
    assert len(found) == 3
    cause = root_cause(found)
    assert (cause.rank, cause.status) == (3, EXIT_FAILED)
    lines = cause.report().splitlines()
    assert "was killed by SIGKILL" in lines[0] and "short of memory" in lines[0]
    assert lines[-1] == "line 99" and "line 80" not in lines


def test_of_two_that_died_at_the_same_second_the_first_seen_is_the_cause():
    assert root_cause(unrecorded_failures(0, exits(_5=-11, _2=-9), [], "log")).rank == 5


def test_a_process_that_somebody_terminates_is_shown_when_nothing_else_failed():
    cause = root_cause(unrecorded_failures(0, exits(_1=-15), [], "log"))
    assert "was killed by SIGTERM" in cause.report()


def test_failures_travel_as_they_are():
    failure = Failure(1, "a-host", None, 1, "is lost", "é\n", 12.5, True)
    assert Failure.from_json(failure.to_json()) == failure
    assert "machine 1 (a-host) is lost" in failure.report()


def test_without_a_launcher_nothing_is_written_down(tmp_path, monkeypatch):
    monkeypatch.delenv("TORCHELASTIC_ERROR_FILE", raising=False)
    monkeypatch.chdir(tmp_path)

    def work():
        raise InputError("--x is wrong")

    assert run_main(work) == EXIT_BAD_INPUT
    assert not list(tmp_path.iterdir())


def test_the_record_is_one_that_torchrun_reads(tmp_path, monkeypatch):
    from torch.distributed.elastic.multiprocessing.errors import ProcessFailure

    fail_as(0, InputError("--x is wrong"), tmp_path, monkeypatch)
    file = tmp_path / "0" / "error.json"
    failure = ProcessFailure(local_rank=0, pid=1, exitcode=2, error_file=str(file))
    assert failure.message == "error: --x is wrong"
    assert failure.timestamp == int(json.loads(file.read_text())["time"])


def test_a_process_that_torchrun_ended_is_not_why_the_one_before_it_failed(tmp_path):
    """torch gives the end of a process in whole seconds, rounded down: before the time that the first one wrote."""
    (tmp_path / "error.json").write_text(
        json.dumps({"rank": 0, "status": 1, "expected": False, "message": "Timed out waiting 3000ms", "time": 10.7})
    )
    known = recorded_failures(0, tmp_path)
    ended = SimpleNamespace(exitcode=-signal.SIGTERM, timestamp=10)
    failures = [*known, *unrecorded_failures(0, {1: ended}, known, str(tmp_path / "log"))]
    assert root_cause(failures).rank == 0
