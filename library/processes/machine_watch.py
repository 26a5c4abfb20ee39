"""Machines that train together end together: each sends heartbeats, and ends when another machine has failed.

Collectives do not report this reliably: if a peer is gone some fail at once and others wait for half an hour, depending
on the backend. So every launcher writes a heartbeat to the store on the main machine every two seconds and reads from
it whether a machine has failed. A launcher without a heartbeat for `SILENCE_SECONDS`, or a store that does not answer
for as long, means a lost machine.
"""

import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from torch.distributed import PrefixStore, Store

from library.exit_status import EXIT_FAILED
from library.processes.failures import Failure, root_cause
from library.processes.rendezvous import MachineGroup

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 25.0
# Time for processes to end after a failure elsewhere; they may be stuck in a collective.
END_SECONDS = 10.0
# Time in which the launchers wait for a failure that explains the others; includes torchrun's 30 s for stuck processes.
SETTLE_SECONDS = 35.0
_FAULT = "fault"


@dataclass
class _Heartbeats:
    """The last heartbeat of each machine, by this machine's clock."""

    beats: dict[int, bytes] = field(default_factory=dict)
    times: dict[int, float] = field(default_factory=dict)

    def note(self, machine: int, beat: bytes, now: float) -> None:
        if self.beats.get(machine) != beat:
            self.beats[machine], self.times[machine] = beat, now

    def silent(self, now: float) -> list[int]:
        return [machine for machine, heard in self.times.items() if now - heard > SILENCE_SECONDS]


class Watch:
    """Two threads beside torchrun's agent: one exchanges heartbeats, the other checks that the store still answers."""

    def __init__(self, group: MachineGroup, hosts: Sequence[str], open_store: Callable[[], Store]) -> None:
        """Start the threads.

        Args:
            hosts: names of the machines, by node_rank.
            open_store: makes a new connection to the store, since a connection serves one request at a time.
        """
        self._group, self._hosts = group, hosts
        self._store = PrefixStore("watch", open_store())
        self._others = PrefixStore("watch", open_store())
        self._answered = time.monotonic()
        self._finished = threading.Event()  # this machine's processes have ended
        self._lost: Failure | None = None  # the store, and with it the main machine
        self._told_to_end = False
        for work in (self._exchange, self._check_store):
            threading.Thread(target=work, daemon=True, name=f"watch{work.__name__}").start()

    @property
    def told_to_end(self) -> bool:
        """True once this machine's processes were told to end because of a failure elsewhere."""
        return self._told_to_end

    def finish(self, failures: Sequence[Failure]) -> Failure | None:
        """Publish how this machine's processes ended, and return why the run ended; None if it succeeded.

        Args:
            failures: this machine's failures; empty if its processes are done or were told to end.
        """
        self._finished.set()
        if self._lost is not None:
            return root_cause([*failures, self._lost])
        try:
            return self._settle(failures)
        except RuntimeError:
            return root_cause([*failures, self._main_is_lost()])

    def _settle(self, failures: Sequence[Failure]) -> Failure | None:
        store, group = self._others, self._group
        if failures:
            self._publish_failure(store, root_cause(failures))
        well = not store.check([_FAULT])
        store.set(f"ended/{group.machine}", "")
        if well and not group.is_main:
            return None  # once all have ended well the store closes: a later request would fail
        everybody = [f"ended/{machine}" for machine in range(group.machines)]
        deadline = None
        while True:
            all_ended = store.check(everybody)
            if store.check([_FAULT]):
                deadline = deadline or time.monotonic() + SETTLE_SECONDS
                cause = root_cause(self._published_failures(store))
                if cause.certain or all_ended or time.monotonic() > deadline:
                    self._keep_store(store, everybody)
                    return cause
            elif all_ended:
                return None
            time.sleep(BEAT_SECONDS / 4)

    def _keep_store(self, store: Store, everybody: list[str]) -> None:
        """On the main machine, keep the store until the others have read the failure, for SETTLE_SECONDS at most."""
        deadline = time.monotonic() + SETTLE_SECONDS
        while self._group.is_main and not store.check(everybody) and time.monotonic() < deadline:
            if self._lost_machines(store) >= set(range(self._group.machines)) - self._ended(store):
                return
            time.sleep(BEAT_SECONDS / 4)
        if self._group.is_main:
            time.sleep(BEAT_SECONDS)

    def _ended(self, store: Store) -> set[int]:
        return {machine for machine in range(self._group.machines) if store.check([f"ended/{machine}"])}

    def _lost_machines(self, store: Store) -> set[int]:
        """Machines that are lost and will read nothing."""
        return {failure.machine for failure in self._published_failures(store) if failure.rank is None}

    def _exchange(self) -> None:
        """Send heartbeats until the process ends; on the main machine also check the others' heartbeats."""
        heard, count = _Heartbeats(), 0
        try:
            while True:
                count += 1
                self._store.set(f"beat/{self._group.machine}", str(count))
                faulty = self._store.check([_FAULT])
                self._answered = time.monotonic()
                if faulty:
                    self._end_processes()
                elif self._group.is_main:
                    self._report_silent(heard)
                time.sleep(BEAT_SECONDS)
        except RuntimeError:  # the store's connection is broken
            self._handle_lost_main()

    def _report_silent(self, heard: _Heartbeats) -> None:
        now = time.monotonic()
        for machine in range(self._group.machines):
            key = f"beat/{machine}"
            if self._store.check([key]) and not self._store.check([f"ended/{machine}"]):
                heard.note(machine, self._store.get(key), now)
            else:
                heard.times.pop(machine, None)
        for machine in heard.silent(now):
            self._publish_failure(self._store, self._machine_is_lost(machine))

    def _check_store(self) -> None:
        """End this machine's processes if the store stops answering, though its connection is still open."""
        awake = time.monotonic()
        while not self._told_to_end:
            time.sleep(1)
            slept, awake = time.monotonic() - awake, time.monotonic()
            if slept > BEAT_SECONDS:  # this machine stood still: the store had no chance to answer
                self._answered = max(self._answered, awake - BEAT_SECONDS)
            elif awake - self._answered > SILENCE_SECONDS:
                self._handle_lost_main()

    def _handle_lost_main(self) -> None:
        if not self._finished.is_set():
            self._lost = self._main_is_lost()
            self._end_processes()

    def _end_processes(self) -> None:
        """End this machine's processes, first by torchrun, then by force."""
        if self._told_to_end or self._finished.is_set():
            return
        self._told_to_end = True
        os.kill(os.getpid(), signal.SIGTERM)  # torchrun's agent passes it on
        if not self._finished.wait(END_SECONDS):
            for child in children():
                kill_group(child)
            # The agent may wait in the store for machines that never come: then this thread ends the launcher.
            if not self._finished.wait(END_SECONDS):
                cause = self._lost or self.finish([])
                if cause is not None:
                    print(cause.report(), file=sys.stderr, flush=True)
                os._exit(cause.status if cause else EXIT_FAILED)

    def _publish_failure(self, store: Store, failure: Failure) -> None:
        key = failure.machine if failure.rank is not None else f"lost/{failure.machine}"
        store.set(f"failure/{key}", failure.to_json())
        store.set(_FAULT, "")

    def _published_failures(self, store: Store) -> list[Failure]:
        keys = [f"failure/{prefix}{machine}" for machine in range(self._group.machines) for prefix in ("", "lost/")]
        return [Failure.from_json(store.get(key)) for key in keys if store.check([key])]

    def _machine_is_lost(self, machine: int) -> Failure:
        what = f"has not been heard of for {SILENCE_SECONDS:g} s: it is down, cut off, or its launcher was killed"
        return Failure(machine, self._hosts[machine], None, EXIT_FAILED, what, "", time.time(), True)

    def _main_is_lost(self) -> Failure:
        what = (
            f"no longer answers at {self._group.main_address}: it is down, cut off, or its launcher was killed; "
            "if it runs on, its own log says more"
        )
        return Failure(0, self._hosts[0], None, EXIT_FAILED, what, "", time.time(), True)


def children() -> list[int]:
    """Process ids of this process's children."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()[1])  # proc(5)
        except OSError:  # it has just ended
            continue
        if parent == os.getpid():
            found.append(int(stat.parent.name))
    return found


def kill_group(leader: int) -> None:
    """Kill a worker and its child processes; torchrun starts each worker in its own session."""
    try:
        if os.getpgid(leader) == leader:
            os.killpg(leader, signal.SIGKILL)
    except ProcessLookupError:
        pass


def stopped_by(sigval: signal.Signals, machine: int) -> Failure:
    """The failure of a machine whose launcher was stopped by its user or system."""
    what = f"was stopped by {sigval.name}"
    return Failure(machine, socket.gethostname(), None, 128 + sigval.value, what, "", time.time(), True)
