"""Machines that cannot start together say why, all of them, in time."""

import socket
import threading
import time

import pytest

from library.errors import InputError
from library.processes import rendezvous as meeting
from library.processes.rendezvous import MachineGroup, join_group, open_store

FACTS = {"--nnodes": "2", "torch": "2.14.1"}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@pytest.fixture(autouse=True)
def no_waiting_for_readers(monkeypatch):
    monkeypatch.setattr(meeting, "_KEEP_STORE_SECONDS", 1.0)


def meet(*machines, timeout=10):
    """Let machines meet, each (node_rank, nnodes, facts); returns what each got, hosts or an error's message."""
    port, results, threads = free_port(), [None] * len(machines), []

    def come(number, machine, count, facts):
        group = MachineGroup(machine, count, "127.0.0.1", port)
        try:
            store = open_store(group, timeout)
            results[number] = join_group(store, group, facts, timeout)
            time.sleep(1)  # the main machine's store must outlive the others' last question
        except InputError as error:
            results[number] = str(error)

    for number, machine in enumerate(machines):
        threads.append(threading.Thread(target=come, args=(number, *machine)))
        threads[-1].start()
        time.sleep(0.3)
    for thread in threads:
        thread.join(30)
    return results


def test_machines_that_agree_learn_each_others_names():
    assert meet((1, 2, FACTS), (0, 2, FACTS)) == [[socket.gethostname()] * 2] * 2


def test_another_library_version_is_named_on_both_machines():
    for error in meet((0, 2, FACTS), (1, 2, FACTS | {"torch": "2.13.0"})):
        assert "machine 1" in error and "differs from machine 0" in error
        assert "torch (2.14.1 and 2.13.0)" in error


def test_another_number_of_machines_is_named_on_both():
    for error in meet((0, 2, FACTS), (2, 3, FACTS | {"--nnodes": "3"})):
        assert "machine 2" in error and "--nnodes (2 and 3)" in error


@pytest.mark.parametrize("taken", [0, 1])
def test_a_place_that_is_taken_is_refused_and_the_others_still_meet(taken, monkeypatch):
    start_store, started = meeting._start_store, []

    def start_or_connect(group):
        """The second one with node_rank 0 is on another machine: there the port is free, and it reaches the first."""
        started.append(group)
        return start_store(group) if len(started) == 1 else meeting.connect(group)

    monkeypatch.setattr(meeting, "_start_store", start_or_connect)
    first, second, third = meet((0, 2, FACTS), (taken, 2, FACTS), (1, 2, FACTS))
    refused = second if taken == 0 else third
    assert f"--node_rank={taken} is taken" in refused and "0 to 1" in refused
    assert isinstance(first, list)


def test_a_machine_that_does_not_come_is_named_in_time():
    began = time.monotonic()
    (error,) = meet((0, 2, FACTS), timeout=1)
    assert "missing: 1" in error and "within 1 s" in error
    assert time.monotonic() - began < 10


def test_a_main_machine_that_is_not_there_is_named_in_time():
    began, port = time.monotonic(), free_port()
    with pytest.raises(InputError, match=rf"cannot be reached at 127\.0\.0\.1:{port}, tried for 1 s"):
        open_store(MachineGroup(1, 2, "127.0.0.1", port), 1)
    assert time.monotonic() - began < 10


def test_a_name_that_nobody_has_is_named_in_time():
    with pytest.raises(InputError, match=r"--master_ip=no-such-host\.invalid"):
        open_store(MachineGroup(1, 2, "no-such-host.invalid", 8989), 0.5)


def test_a_port_in_use_is_named():
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        port = other.getsockname()[1]
        with pytest.raises(InputError, match=f"--master_port={port}: the port is in use"):
            open_store(MachineGroup(0, 2, "127.0.0.1", port), 1)
