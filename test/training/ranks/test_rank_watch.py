"""Processes that tell each other of signals and of how far they are, here two threads over one store."""

import re
import signal
import time
from types import SimpleNamespace

import pytest
from torch.distributed import HashStore

from library.errors import InputError, Stopped, TrainingError
from library.signals import Signals
from library.training.ranks import rank_watch as module
from library.training.ranks.rank_watch import READING, TRAINING, WAITING, RankWatch, Report, waited_for


def reports(*entries):
    return [Report(rank, f"m{rank}", *entry) for rank, entry in enumerate(entries)]


def test_a_process_that_says_nothing_any_more_is_the_one_that_is_waited_for():
    said = waited_for(reports((7, TRAINING, 0.4), (7, TRAINING, 31.0), (7, READING, 0.2)))
    assert said == "rank 1 on m1 (last heard of: training, step 8) no longer answers: stopped, dead or cut off"


def test_of_those_that_answer_it_is_the_one_that_is_behind():
    assert waited_for(reports((7, TRAINING), (7, READING), (7, TRAINING))) == "rank 1 on m1: still reading data, step 8"
    assert waited_for(reports((7, READING), (6, WAITING))) == "rank 1 on m1: still waiting for the others, step 7"


def test_where_all_are_at_the_same_place_nobody_is_blamed():
    assert "all processes are at step 8, training" in waited_for(reports((7, TRAINING), (7, TRAINING)))


class Shared(HashStore):
    """A store that all threads have in common."""

    def clone(self):
        return self


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setattr(module, "_PERIOD_S", 0.02)
    monkeypatch.setattr(module, "_SILENT_S", 0.3)
    store = Shared()
    return [RankWatch(rank, 2, Signals(), 1.0, store) for rank in range(2)]


def wait_until(true, timeout_s=20):
    deadline = time.monotonic() + timeout_s
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_stop_signal_reaches_the_other_process(two):
    with two[0], two[1]:
        two[1]._signals.stop_signal = signal.SIGTERM
        wait_until(lambda: two[0]._signals.stop_signal == signal.SIGTERM)


def test_a_process_that_leaves_at_once_has_passed_the_signal_on(two):
    with two[0]:
        with two[1]:
            two[1]._signals.stop_signal = signal.SIGINT
        wait_until(lambda: two[0]._signals.stop_signal == signal.SIGINT)


def test_who_is_waited_for_is_known_before_the_time_is_over(two, caplog):
    with two[0]:
        with two[1]:
            two[0].progress.at(4, TRAINING)
            two[1].progress.at(4, READING)
            wait_until(lambda: two[0].verdict)
        assert two[0].verdict.startswith("rank 1 on ") and ": still reading data, step 5. " in two[0].verdict
        two[0].progress.at(5, TRAINING)
        wait_until(lambda: not two[0].verdict)  # an error that comes now has another reason
        wait_until(lambda: "no longer answers" in two[0].verdict)


def test_a_process_that_would_wait_for_one_that_has_failed_ends_with_its_cause(two, monkeypatch, capsys):
    """As where the backend does not notice: its main thread does not come out of the collective."""
    ended = []
    monkeypatch.setattr(module, "leave_at_once", ended.append)
    monkeypatch.setattr(module, "_LEAVE_S", 0.1)
    left = []
    two[0]._signals.unfinished.append(
        SimpleNamespace(
            what="a training state",
            is_writing=lambda: not two[1]._thread.is_alive() and state.pop(),
            leave=lambda: left.append(True),
        )
    )
    state = [False, True]
    with two[0]:
        with pytest.raises(ValueError, match="planted"), two[1]:
            raise ValueError("planted here")
        wait_until(lambda: ended)
    assert ended == [1] and not state and left  # the state that had begun was waited for
    assert re.search(r"training stopped: rank 1 on \S+ has failed: ValueError: planted here", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("error", "kind", "said"),
    [
        (OSError(28, "No space left on device", "out"), TrainingError, "rank 1 on .* has failed: out: No space left"),
        (InputError("--x is wrong"), InputError, "^--x is wrong$"),
        (Stopped(signal.SIGTERM), Stopped, "SIGTERM"),
    ],
)
def test_a_collective_that_breaks_because_another_process_has_failed_says_why(two, error, kind, said):
    with pytest.raises(kind, match=said), two[0]:
        with pytest.raises(type(error)), two[1]:
            raise error
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:11234")


def test_another_processs_failure_ends_work_that_looks_for_signals(two):
    """Caching, say, which writes what it has encoded when it is ended so."""
    with two[0]:
        with pytest.raises(ValueError), two[1]:
            raise ValueError("planted here")
        wait_until(lambda: two[0].failure)
        with pytest.raises(TrainingError, match=r"rank 1 on .* has failed: ValueError: planted here"):
            two[0]._signals.stop_if_requested()


def test_a_collective_that_breaks_after_a_stop_signal_says_that_no_state_is_known(two):
    with pytest.raises(Stopped, match=r"SIGTERM; .*no training state of this step.*Connection closed") as ended, two[0]:
        two[0]._signals.stop_signal = signal.SIGTERM
        raise RuntimeError("[gloo/transport/tcp/pair.cc:547] Connection closed by peer [127.0.0.1]:11234")
    assert ended.value.saved  # so the command with which to go on is said, too


def test_an_error_of_ones_own_stays(two):
    with pytest.raises(RuntimeError, match="size mismatch"), two[0]:
        with pytest.raises(ValueError), two[1]:
            raise ValueError("planted here")
        raise RuntimeError("size mismatch")
