"""Machines of a run find each other through the main machine, and compare versions and settings before the start."""

import errno
import json
import logging
import socket
import time
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from library.errors import InputError
from library.processes.versions import differences

logger = logging.getLogger(__name__)

_POLL_SECONDS = 0.5
_KEEP_STORE_SECONDS = 5.0  # the store is on the main machine: it stays until the others have read why nothing starts
_CONNECT_SECONDS = 20.0
_REFUSED = "refused"


@dataclass(frozen=True)
class MachineGroup:
    """The machines that train together: this machine's number, how many there are, the main machine's address."""

    machine: int
    machines: int
    master_ip: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """True on machine 0, whose store the others use."""
        return self.machine == 0

    @property
    def main_address(self) -> str:
        """IP:PORT of the main machine's store."""
        return f"{self.master_ip}:{self.master_port}"


def open_store(group: MachineGroup, timeout_seconds: float) -> TCPStore:
    """A connection to the main machine's store; on the main machine also the store itself.

    Raises:
        InputError: the main machine cannot be reached in time, its port is in use, or the address is not its own.
    """
    if group.is_main:
        return _start_store(group)
    _wait_until_reachable(group, timeout_seconds)
    try:
        return connect(group)
    except RuntimeError as error:
        raise InputError(
            f"--master_ip={group.master_ip} --master_port={group.master_port}: what listens there is not the main "
            f"machine of such a run ({_first_line(error)})"
        ) from error


def connect(group: MachineGroup) -> TCPStore:
    """A further connection to the store. Raises RuntimeError if the store does not answer."""
    return TCPStore(
        group.master_ip, group.master_port, timeout=timedelta(seconds=_CONNECT_SECONDS), wait_for_workers=False
    )


def _start_store(group: MachineGroup) -> TCPStore:
    port = group.master_port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = "is in use on this machine (by another run?)" if error.errno == errno.EADDRINUSE else error.strerror
            raise InputError(f"--master_port={port}: the port {taken}; choose another, the same everywhere") from error
    try:
        return TCPStore(
            group.master_ip,
            port,
            is_master=True,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,  # torchrun's rendezvous shares it
        )
    except RuntimeError as error:
        raise InputError(
            f"--master_ip={group.master_ip}: this machine is --node_rank=0 but does not reach itself there "
            f"({_first_line(error)}); give an address of this machine that the others can reach"
        ) from error


def _wait_until_reachable(group: MachineGroup, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    told = False
    while True:
        try:
            with socket.create_connection((group.master_ip, group.master_port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"--master_ip={group.master_ip} --master_port={group.master_port}: the main machine cannot be "
                    f"reached at {group.main_address}, tried for {timeout_seconds:g} s ({error}). Start the launcher "
                    "with --node_rank=0 there, check the address, and that no firewall closes the port"
                ) from error
        if not told:
            logger.info("waiting for the main machine at %s, for %g s at most", group.main_address, timeout_seconds)
            told = True
        time.sleep(_POLL_SECONDS)


def join_group(tcp_store: Store, group: MachineGroup, facts: Mapping[str, str], timeout_seconds: float) -> list[str]:
    """Wait until all machines have joined and agree; returns their host names, by node_rank.

    Args:
        facts: versions and settings that must be the same on all machines.

    Raises:
        InputError: a node_rank is used twice, a machine differs from the main machine, or a machine does not join in
            time. All machines that have joined get the same error.
    """
    store = PrefixStore("machines", tcp_store)
    host = socket.gethostname()
    mine = json.dumps({"host": host, "facts": dict(facts), "token": uuid.uuid4().hex})
    entered = store.compare_set(_key(group.machine), "", mine).decode()
    if entered != mine:
        raise InputError(
            f"--node_rank={group.machine} is taken: {json.loads(entered)['host']} joined {group.main_address} with it "
            f"before this machine ({host}); give every machine its own, 0 to {group.machines - 1}"
        )
    deadline = time.monotonic() + timeout_seconds
    main_agrees = group.is_main
    while True:
        _raise_if_refused(store, group)
        if not main_agrees and store.check([_key(0)]):
            main = json.loads(store.get(_key(0)))
            if differ := differences(main["facts"], facts):
                _refuse(
                    store,
                    group,
                    f"machine {group.machine} ({host}) differs from machine 0 ({main['host']}) in {', '.join(differ)}, "
                    "the main machine's first; make them the same",
                )
            main_agrees = True
        missing = [machine for machine in range(group.machines) if not store.check([_key(machine)])]
        if not missing and main_agrees and _all_agree(store, group):
            return [json.loads(store.get(_key(machine)))["host"] for machine in range(group.machines)]
        if time.monotonic() >= deadline:
            _refuse(store, group, _missing_machines(missing, group, timeout_seconds))
        time.sleep(_POLL_SECONDS)


def _all_agree(store: Store, group: MachineGroup) -> bool:
    """Publish that this machine agrees with the main machine; True once all machines agree."""
    store.set(f"agrees/{group.machine}", "")
    return bool(store.check([f"agrees/{machine}" for machine in range(group.machines)]))


def _missing_machines(missing: list[int], group: MachineGroup, timeout_seconds: float) -> str:
    names = ", ".join(map(str, missing)) or "one that left again"
    return (
        f"--nnodes={group.machines}: of the machines 0 to {group.machines - 1} not all have come to "
        f"{group.main_address} within {timeout_seconds:g} s; missing: {names}. Start the launcher there with that "
        "--node_rank"
    )


def _key(machine: int) -> str:
    return f"machine/{machine}"


def _refuse(store: Store, group: MachineGroup, message: str) -> None:
    store.set(_REFUSED, message)
    _raise_if_refused(store, group)


def _raise_if_refused(store: Store, group: MachineGroup) -> None:
    if store.check([_REFUSED]):
        if group.is_main:
            time.sleep(_KEEP_STORE_SECONDS)
        raise InputError(store.get(_REFUSED).decode())


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
