"""Why a run of several processes ended: what each failed process left behind, and which failure came first.

When one process dies the others fail, too, within moments: their connections break. So the failure to show is not
simply the one that was seen first.
"""

import json
import re
import signal
import socket
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from library.script import EXIT_FAILED

_TAIL_LINES = 15
_BY_SIGNAL = 128  # exit statuses from here on are 128 plus a signal's number
# How collectives and stores say that the other side is gone; such an error may be the consequence of another.
_OTHER_SIDE = re.compile(
    r"gloo|nccl|hccl|TCPStore|Connection (closed|reset|refused)|Broken pipe|connectFullMesh|DistStoreError|Socket"
    r"|process group|timed? ?out",
    re.IGNORECASE,
)


@dataclass(frozen=True)
class Failure:
    """The end of one process or machine.

    Attributes:
        machine: its node_rank.
        host: its name.
        rank: of the process; None where it is the machine's own end.
        status: the exit status that the run ends with because of it.
        what: a few words that follow the place: 'was killed by SIGKILL'.
        text: the error itself, possibly several lines.
        time: seconds since the epoch.
        certain: it is a cause of its own; otherwise it may follow from another.
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
        """For the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "Failure":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))

    @property
    def place(self) -> str:
        """'rank 3 (machine 1, HOST)'."""
        machine = f"machine {self.machine}"
        return f"{machine} ({self.host})" if self.rank is None else f"rank {self.rank} ({machine}, {self.host})"

    def report(self) -> str:
        """What the user reads last."""
        return f"training failed: {self.place} {self.what}\n{self.text}".rstrip()


def root_cause(failures: Iterable[Failure]) -> Failure:
    """The failure that the others follow from: a certain one before the others, then the earliest."""
    return min(failures, key=lambda failure: (not failure.certain, failure.time))


def recorded_failures(machine: int, folder: Path) -> list[Failure]:
    """What the processes of this machine wrote down before they ended (library/script.py), below a folder."""
    failures = []
    for path in folder.rglob("*.json"):
        record = json.loads(path.read_text(encoding="utf-8"))
        # A process that a signal has stopped was stopped because of something, as one killed by SIGTERM.
        certain = record["status"] < _BY_SIGNAL and (record["expected"] or not _OTHER_SIDE.search(record["message"]))
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


def silent_failures(machine: int, exits: Mapping[int, Any], known: Iterable[Failure], log: str) -> list[Failure]:
    """Failures of processes that wrote nothing down: killed by a signal, or ended by something below Python.

    Args:
        exits: torch's ProcessFailure by rank.
        known: the failures of processes that did write.
        log: stem of the processes' own logs, as in `log_of_rank`.
    """
    told = {failure.rank for failure in known}
    return [
        # torch counts time in whole seconds, but lists the failures in the order in which it saw them.
        _silent(machine, rank, end.exitcode, end.timestamp + place / 1e6, log_of_rank(log, rank))
        for place, (rank, end) in enumerate(exits.items())
        if rank not in told
    ]


def log_of_rank(log: str, rank: int) -> Path:
    """Where the output of a process goes that is not its machine's first."""
    return Path(f"{log}.rank{rank}.log")


def _silent(machine: int, rank: int, exit_code: int, time: float, log: Path) -> Failure:
    certain = exit_code != -signal.SIGTERM  # with that torchrun ends the processes beside one that failed
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
