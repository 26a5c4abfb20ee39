"""Why a run of several processes ended: the record of each failed process, and which failure caused the others.

When a process dies the others fail, too, within moments, because their connections break. So the failure to show is not
simply the failure that was seen first.
"""

import json
import re
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from library.exit_status import EXIT_FAILED

_TAIL_LINES = 15
_BY_SIGNAL = 128  # exit statuses from here on are 128 plus a signal's number
# How collectives and stores report that a peer is gone; another failure may have caused such an error.
OF_OTHER_SIDE = re.compile(
    r"gloo|nccl|hccl|TCPStore|Connection (closed|reset|refused)|Broken pipe|connectFullMesh|DistStoreError|Socket"
    r"|process group|timed? ?out",
    re.IGNORECASE,
)

_OF_ANOTHER_RANK = re.compile(r"rank \d+ on \S+ has failed: ")  # library/training/ranks/rank_failure.py


@dataclass(frozen=True)
class Failure:
    """The end of one process or machine.

    Attributes:
        machine: node_rank of the machine.
        host: name of the machine.
        rank: rank of the process; None if the machine itself failed.
        status: the exit status with which the run ends because of it.
        what: a predicate for messages: 'was killed by SIGKILL'.
        text: the error itself, possibly several lines.
        time: seconds since the epoch.
        certain: True if no other failure can have caused it.
    """

    machine: int
    host: str
    rank: int | None
    status: int
    what: str
    text: str
    time: float
    certain: bool

    def to_json(self) -> str:
        """The failure as JSON, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Failure":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def location(self) -> str:
        """The process and its machine, for example 'rank 3 (machine 1, HOST)'."""
        machine = f"machine {self.machine}"
        return f"{machine} ({self.host})" if self.rank is None else f"rank {self.rank} ({machine}, {self.host})"

    def report(self) -> str:
        """The message that the launcher prints last."""
        return f"training failed: {self.location} {self.what}\n{self.text}".rstrip()


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that caused the others: the earliest certain failure, or the earliest if none is certain."""
    return min(failures, key=lambda failure: (not failure.certain, failure.time))


def recorded_failures(machine: int, folder: Path) -> list[Failure]:
    """The failures that this machine's processes recorded below a folder before they ended (library/exit_status.py)."""
    failures = []
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        # A process that a signal has stopped was stopped because of another failure, as after SIGTERM.
        own = record["status"] < _BY_SIGNAL and not _OF_ANOTHER_RANK.search(record["message"])
        certain = own and (record["expected"] or not OF_OTHER_SIDE.search(record["message"]))
        what = f"ended with exit status {record['status']}:"
        failures.append(
            Failure(
                machine,
                socket.gethostname(),
                record["rank"],
                record["status"],
                what,
                record["message"],
                record["time"],
                certain,
            )
        )
    return failures


def unrecorded_failures(machine: int, exits: Mapping[int, Any], known: Iterable[Failure], log: str) -> list[Failure]:
    """Failures of processes without a record: a signal killed them, or code below Python ended them.

    Args:
        exits: torch's ProcessFailure by rank.
        known: the recorded failures.
        log: stem of the processes' logs, as in `log_of_rank`.
    """
    recorded = {failure.rank for failure in known}
    return [
        # torch counts time in whole seconds, but lists the failures in the order in which it saw them.
        _unrecorded(machine, rank, end.exitcode, end.timestamp + index / 1e6, log_of_rank(log, rank))
        for index, (rank, end) in enumerate(exits.items())
        if rank not in recorded
    ]


def log_of_rank(log: str, rank: int) -> Path:
    """The log of a process other than its machine's first process."""
    return Path(f"{log}.rank{rank}.log")


def _unrecorded(machine: int, rank: int, exit_code: int, time: float, log: Path) -> Failure:
    certain = exit_code != -signal.SIGTERM  # torchrun ends the other processes by it after a failure
    if not certain:
        time += 1  # torch rounds down: the failure that this follows may have written a later time
    if exit_code < 0:
        name = signal.Signals(-exit_code).name
        what = f"was killed by {name}"
        hint = "; where nobody sent it, the system was short of memory (see dmesg)" if name == "SIGKILL" else ""
        status = EXIT_FAILED
    else:
        what, hint, status = f"ended with exit status {exit_code}", "", exit_code
    tail = _tail(log)
    text = f"the last lines of {log}:\n{tail}" if tail else ""
    return Failure(machine, socket.gethostname(), rank, status, what + hint, text, time, certain)


def _tail(log: Path) -> str:
    try:
        return "\n".join(log.read_text(encoding="utf-8", errors="replace").splitlines()[-_TAIL_LINES:])
    except OSError:
        return ""
