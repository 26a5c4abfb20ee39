"""How a machine ends with the others, where the store goes with the main one."""

import contextlib

import torch.distributed as dist

from library.processes.failures import Failure
from library.processes.machine_watch import Watch
from library.processes.rendezvous import MachineGroup


class GoingStore(dist.Store):
    """A store that its machine takes away as soon as the last of the others says that it has ended."""

    def __init__(self):
        super().__init__()
        self.values = {"watch/ended/0": b""}

    def set(self, key, value):
        self._ask()
        self.values[key] = value.encode() if isinstance(value, str) else value

    def get(self, key):
        self._ask()
        return self.values[key]

    def check(self, keys):
        self._ask()
        return all(key in self.values for key in keys)

    def _ask(self):
        if "watch/ended/1" in self.values:
            raise RuntimeError("Connection reset by peer")


def end(store, failures):
    group = MachineGroup(machine=1, machines=2, master_ip="127.0.0.1", master_port=1)
    return Watch(group, ["main", "other"], lambda: store).finish(failures)


def test_a_machine_whose_work_is_done_does_not_miss_a_main_one_that_is_done_too():
    store = GoingStore()
    assert end(store, []) is None
    assert "watch/ended/1" in store.values


def test_a_machine_that_failed_says_so_though_the_main_one_goes():
    own = Failure(1, "other", 1, 2, "ended with exit status 2", "", 5.0, True)
    assert end(GoingStore(), [own]) == own


class Clock:
    """A clock that sleeping advances, each time by what it is told."""

    def __init__(self, *seconds):
        self.now, self.seconds = 1000.0, list(seconds)

    def monotonic(self):
        return self.now

    def sleep(self, _):
        if not self.seconds:
            raise EOFError
        self.now += self.seconds.pop(0)


def main_is_missed(monkeypatch, *seconds):
    """Whether a machine gives the main one up whose last answer came before it slept for these times."""
    clock, missed = Clock(*seconds), []
    watch = object.__new__(Watch)
    watch._answered, watch._told_to_end = clock.now, False
    monkeypatch.setattr("library.processes.machine_watch.time", clock)
    monkeypatch.setattr(watch, "_handle_lost_main", lambda: missed.append(clock.now))
    with contextlib.suppress(EOFError):
        watch._check_store()
    return bool(missed)


def test_a_machine_that_stood_still_itself_does_not_take_the_main_one_for_lost(monkeypatch):
    assert not main_is_missed(monkeypatch, 1, 40, 1, 1)
    assert main_is_missed(monkeypatch, *[1] * 26)
    assert main_is_missed(monkeypatch, 40, *[1] * 26)  # nor does that hide a main machine that stays away
