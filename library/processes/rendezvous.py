"""Machines of one run find each other at the main one, and find out before anything starts whether they go together."""

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
_LINGER_SECONDS = 5.0  # the store is on the main machine: it stays until the others have read why nothing starts
_CONNECT_SECONDS = 20.0
_REFUSED = "refused"


@dataclass(frozen=True)
class Place:
    """This machine's place in the run, and where the main machine is."""

    machine: int
    machines: int
    master_ip: str
    master_port: int

    @property
    def is_main(self) -> bool:
        """True on the machine that the others come to."""
        return self.machine == 0

    @property
    def meeting_point(self) -> str:
        """IP:PORT of the main machine."""
        return f"{self.master_ip}:{self.master_port}"


def open_store(place: Place, timeout_seconds: float) -> TCPStore:
    """A connection to the store that the main machine holds; there, also the store.

    Raises:
        InputError: the main machine cannot be reached in time, or on it the port is taken or the address not its own.
    """
    if place.is_main:
        return _hold_store(place)
    _wait_until_reachable(place, timeout_seconds)
    try:
        return connect(place)
    except RuntimeError as error:
        raise InputError(
            f"--master_ip={place.master_ip} --master_port={place.master_port}: what listens there is not the main "
            f"machine of such a run ({_first_line(error)})"
        ) from error


def connect(place: Place) -> TCPStore:
    """A further connection to the store. Raises RuntimeError if there is none."""
    return TCPStore(
        place.master_ip, place.master_port, timeout=timedelta(seconds=_CONNECT_SECONDS), wait_for_workers=False
    )


def _hold_store(place: Place) -> TCPStore:
    port = place.master_port
    with socket.socket(socket.AF_INET, socket.SOCK_STREAM) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            taken = "is in use on this machine (by another run?)" if error.errno == errno.EADDRINUSE else error.strerror
            raise InputError(f"--master_port={port}: the port {taken}; choose another, the same everywhere") from error
    try:
        return TCPStore(
            place.master_ip,
            port,
            is_master=True,
            timeout=timedelta(seconds=_CONNECT_SECONDS),
            wait_for_workers=False,
            multi_tenant=True,  # torchrun's rendezvous shares it
        )
    except RuntimeError as error:
        raise InputError(
            f"--master_ip={place.master_ip}: this machine is --node_rank=0 but does not reach itself there "
            f"({_first_line(error)}); give an address of this machine that the others can reach"
        ) from error


def _wait_until_reachable(place: Place, timeout_seconds: float) -> None:
    deadline = time.monotonic() + timeout_seconds
    told = False
    while True:
        try:
            with socket.create_connection((place.master_ip, place.master_port), timeout=5):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise InputError(
                    f"--master_ip={place.master_ip} --master_port={place.master_port}: the main machine cannot be "
                    f"reached at {place.meeting_point}, tried for {timeout_seconds:g} s ({error}). Start the launcher "
                    "with --node_rank=0 there, check the address, and that no firewall closes the port"
                ) from error
        if not told:
            logger.info("waiting for the main machine at %s, for %g s at most", place.meeting_point, timeout_seconds)
            told = True
        time.sleep(_POLL_SECONDS)


def call_the_roll(tcp_store: Store, place: Place, facts: Mapping[str, str], timeout_seconds: float) -> list[str]:
    """Wait until all machines are here and agree; returns their host names, by node_rank.

    Args:
        facts: what must be the same on all machines.

    Raises:
        InputError: a place is taken twice, a machine differs from the main one, or one does not come in time. All
            machines that are here get the same error.
    """
    store = PrefixStore("machines", tcp_store)
    host = socket.gethostname()
    mine = json.dumps({"host": host, "facts": dict(facts), "token": uuid.uuid4().hex})
    entered = store.compare_set(_key(place.machine), "", mine).decode()
    if entered != mine:
        raise InputError(
            f"--node_rank={place.machine} is taken: {json.loads(entered)['host']} joined {place.meeting_point} with it "
            f"before this machine ({host}); give every machine its own, 0 to {place.machines - 1}"
        )
    deadline = time.monotonic() + timeout_seconds
    main_agrees = place.is_main
    while True:
        _raise_if_refused(store, place)
        if not main_agrees and store.check([_key(0)]):
            main = json.loads(store.get(_key(0)))
            if differ := differences(main["facts"], facts):
                _refuse(
                    store,
                    place,
                    f"machine {place.machine} ({host}) differs from machine 0 ({main['host']}) in {', '.join(differ)}, "
                    "the main machine's first; make them the same",
                )
            main_agrees = True
        missing = [machine for machine in range(place.machines) if not store.check([_key(machine)])]
        if not missing and main_agrees and _all_agree(store, place):
            return [json.loads(store.get(_key(machine)))["host"] for machine in range(place.machines)]
        if time.monotonic() >= deadline:
            _refuse(store, place, _nobody_came(missing, place, timeout_seconds))
        time.sleep(_POLL_SECONDS)


def _all_agree(store: Store, place: Place) -> bool:
    """True once every machine has compared itself with the main one; says that this one has."""
    store.set(f"agrees/{place.machine}", "")
    return bool(store.check([f"agrees/{machine}" for machine in range(place.machines)]))


def _nobody_came(missing: list[int], place: Place, timeout_seconds: float) -> str:
    names = ", ".join(map(str, missing)) or "one that left again"
    return (
        f"--nnodes={place.machines}: of the machines 0 to {place.machines - 1} not all have come to "
        f"{place.meeting_point} within {timeout_seconds:g} s; missing: {names}. Start the launcher there with that "
        "--node_rank"
    )


def _key(machine: int) -> str:
    return f"machine/{machine}"


def _refuse(store: Store, place: Place, message: str) -> None:
    store.set(_REFUSED, message)
    _raise_if_refused(store, place)


def _raise_if_refused(store: Store, place: Place) -> None:
    if store.check([_REFUSED]):
        if place.is_main:
            time.sleep(_LINGER_SECONDS)
        raise InputError(store.get(_REFUSED).decode())


def _first_line(error: BaseException) -> str:
    return str(error).splitlines()[0] if str(error) else type(error).__name__
