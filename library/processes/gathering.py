"""The processes of a run wait for each other before torch's process group, and say for whom and where they wait.

torch itself waits without a word, inside C++. Here a signal ends the process at once: nothing is to be saved yet.
"""

import logging
import platform
import socket
import time
from collections.abc import Sequence
from datetime import timedelta

from torch.distributed import PrefixStore, Store, TCPStore

from library.errors import InputError
from library.processes.environment import Place
from library.signals import Signals

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_SAY_AFTER_S, _SAY_EACH_S = 5.0, 60.0
_ANSWER_S = 30.0  # a store that is there answers within it
_NAMED = 8


def wait_for_all(place: Place, signals: Signals, timeout_s: float) -> Store:
    """Wait until all processes have come; returns the store, which must live until the process group has its own.

    Raises:
        InputError: not all have come in time, or the port is taken.
        Stopped: a signal came before; one that comes meanwhile ends the process.
    """
    started_s = time.monotonic()
    with signals.ending_at_once(f"waiting for the other processes at {place.address}:{place.port}"):
        tcp_store = _open_store(place, started_s, timeout_s)
        store = PrefixStore(f"gathering/{place.attempt}", tcp_store)
        store.set(_key(place.rank), platform.node())
        said_s = started_s + _SAY_AFTER_S - _SAY_EACH_S
        everyone = [_key(rank) for rank in range(place.world_size)]
        while not store.check(everyone):  # one question, whatever their number: all ask the one store
            now_s = time.monotonic()
            is_over = now_s - started_s > timeout_s
            if not is_over and now_s - said_s <= _SAY_EACH_S:
                time.sleep(_POLL_S)
                continue
            missing = [rank for rank, key in enumerate(everyone) if not store.check([key])]
            if missing and is_over:
                raise InputError(
                    f"{_named(missing)} of WORLD_SIZE={place.world_size} {_have(missing)} not come to "
                    f"{place.address}:{place.port} within --ddp_timeout={timeout_s / 60:g} minutes. Start what is "
                    "missing, see why it has ended, or unset WORLD_SIZE and RANK to train by this process alone"
                )
            if missing:
                said_s = now_s
                logger.info(
                    "waiting for %s of %d processes at %s:%d", _named(missing), place.world_size, place.address,
                    place.port,
                )  # fmt: skip
    return tcp_store


def _open_store(place: Place, started_s: float, timeout_s: float) -> TCPStore:
    """A connection to the store, and on the first process the store itself, unless torchrun's agent has it."""
    is_master = place.rank == 0 and not place.agent
    if not is_master:
        _wait_until_reachable(place, started_s, timeout_s)
    try:
        return TCPStore(
            place.address,
            place.port,
            is_master=is_master,
            timeout=timedelta(seconds=_ANSWER_S),
            wait_for_workers=False,
            multi_tenant=True,  # torch's process group shares it
        )
    except RuntimeError as error:
        what = "in use by another run, or the address is not this machine's" if is_master else "no such store"
        raise InputError(
            f"MASTER_ADDR={place.address} MASTER_PORT={place.port}: {what} ({str(error).splitlines()[0]:.200}); choose "
            "another port, the same for all processes"
        ) from error


def _wait_until_reachable(place: Place, started_s: float, timeout_s: float) -> None:
    said_s = started_s + _SAY_AFTER_S - _SAY_EACH_S
    while True:
        try:
            with socket.create_connection((place.address, place.port), timeout=_SAY_AFTER_S):
                return
        except OSError as error:
            now_s = time.monotonic()
            if now_s - started_s > timeout_s:
                raise InputError(
                    f"MASTER_ADDR={place.address} MASTER_PORT={place.port}: rank 0 cannot be reached there, tried for "
                    f"--ddp_timeout={timeout_s / 60:g} minutes ({error}). Start it, and check address and firewall"
                ) from error
            if now_s - said_s > _SAY_EACH_S:
                said_s = now_s
                logger.info("waiting for rank 0 at %s:%d (%s)", place.address, place.port, error)
        time.sleep(_POLL_S)


def _key(rank: int) -> str:
    return f"here/{rank}"


def _named(ranks: Sequence[int]) -> str:
    more = f" and {len(ranks) - _NAMED} more" if len(ranks) > _NAMED else ""
    return f"rank{'s' if len(ranks) > 1 else ''} {', '.join(map(str, ranks[:_NAMED]))}{more}"


def _have(ranks: Sequence[int]) -> str:
    return "has" if len(ranks) == 1 else "have"
