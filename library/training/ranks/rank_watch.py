"""What the processes of a run tell each other beside their collectives: a signal to stop, and how far each is.

In a collective all wait for the last, and none can say for whom. So a thread of each process writes where its process
is into the store by which the processes found each other, once a second, and takes a stop signal of any other from it:
what one process hears while it waits for the main one, which samples pictures, say, ends the sampling.
"""

import contextlib
import json
import logging
import platform
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from library.device import upload
from library.signals import STOPPING, Signals

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_SILENT_S = 5.0  # a process that writes nothing for so long is stopped, dead or cut off
_WARN_AT = 0.9  # of the time-out: the backend's own, when it comes, may end the process without a word
_STOP_KEY = "companions/stop"
# In the order in which a step goes through them; the last one is the only one in which nobody waits for the process.
PHASES = (
    "preparing",
    "filling caches",
    "reading data",
    "training",
    "validating",
    "saving",
    "sampling",
    "waiting for the others",
)
PREPARING, CACHING, READING, TRAINING, VALIDATING, SAVING, SAMPLING, WAITING = PHASES


@dataclass
class Progress:
    """Where a process is; its main thread sets it."""

    step: int = 0
    phase: str = PREPARING

    def at(self, step: int, phase: str) -> None:
        """Say so."""
        self.step, self.phase = step, phase


@dataclass(frozen=True)
class Report:
    """What a process last said of itself.

    Attributes:
        silent_s: how long it has said nothing, in seconds.
    """

    rank: int
    host: str
    step: int
    phase: str
    silent_s: float = 0.0


def waited_for(reports: Sequence[Report]) -> str:
    """Whom the others wait for: those that answer no more, else those that are behind. A sentence without its point."""
    silent = [report for report in reports if report.silent_s >= _SILENT_S]
    if silent:
        named = ", ".join(
            f"rank {one.rank} on {one.host} (last heard of: {one.phase}, step {one.step + 1})" for one in silent
        )
        return f"{named} no longer answers: stopped, dead or cut off"
    place = min((report.step, PHASES.index(report.phase)) for report in reports)
    behind = [report for report in reports if (report.step, PHASES.index(report.phase)) == place]
    if len(behind) == len(reports):
        return (
            f"all processes are at step {place[0] + 1}, {PHASES[place[1]]}: a device or the network between them hangs"
        )
    named = ", ".join(f"rank {one.rank} on {one.host}" for one in behind)
    return f"{named}: still {behind[0].phase}, step {place[0] + 1}"


class Companions:
    """Within its `with` block the thread runs; with one process there is nothing to do."""

    def __init__(self, rank: int, ranks: int, signals: Signals, timeout_s: float, store: Any) -> None:
        """
        Args:
            timeout_s: after which the backend gives up a collective.
            store: of the process group; a connection of its own is made.
        """
        self.progress = Progress()
        self.verdict = ""  # whom this process was found to be waiting for, once it had waited long
        self._rank, self._ranks, self._signals, self._timeout_s = rank, ranks, signals, timeout_s
        self._store = store.clone() if ranks > 1 else store
        self._seen: dict[int, tuple[Any, float]] = {}  # by rank, what it wrote last, and when that changed
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "Companions":
        if self._ranks > 1:
            self._tell(0)  # at once: a process may stop within its first second
            self._thread = threading.Thread(target=self._run, name="companions", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._end.set()
        if self._thread is not None:
            self._thread.join(5 * _PERIOD_S)  # it may wait for a store that is gone
            with contextlib.suppress(RuntimeError):
                self._pass_on_stop()  # the signal that ends this process may be younger than the thread's last look

    def _run(self) -> None:
        """The thread; it ends when the store does, which is the end of the run."""
        tick, here, since, warned = 0, (-1, ""), time.monotonic(), False
        with contextlib.suppress(RuntimeError):  # what torch raises of a store that is gone
            while not self._end.wait(_PERIOD_S):
                tick += 1
                self._tell(tick)
                self._pass_on_stop()
                now = time.monotonic()
                if here != (here := (self.progress.step, self.progress.phase)):
                    since, warned, self.verdict = now, False, ""
                waited_s = now - since
                # An index is made, and caches are filled, without a collective, however long that takes.
                if waited_s < min(10 * _PERIOD_S, self._timeout_s / 2) or self.progress.phase in (PREPARING, CACHING):
                    continue
                reports = self._reports(now)
                if waited_s >= _WARN_AT * self._timeout_s and not warned:
                    warned = True
                    self.verdict = (
                        f"{waited_for(reports)}. The others have waited {waited_s:.0f} s for it; they give up after "
                        f"--ddp_timeout={self._timeout_s / 60:g} minutes"
                    )
                    logger.warning("%s", self.verdict)

    def _tell(self, tick: int) -> None:
        progress = self.progress
        content = json.dumps([tick, platform.node(), progress.step, progress.phase])
        self._store.set(_key(self._rank), content)

    def _pass_on_stop(self) -> None:
        """Between this process's signals and the others'."""
        if self._signals.stop_signal is not None:
            self._store.set(_STOP_KEY, str(int(self._signals.stop_signal)))
        elif self._store.check([_STOP_KEY]):
            self._signals.stop_as_another_process(int(self._store.get(_STOP_KEY)))

    def _reports(self, now: float) -> list[Report]:
        """What all processes said last."""
        ranks = [rank for rank in range(self._ranks) if self._store.check([_key(rank)])]
        reports = [Report(rank, "?", 0, PREPARING, now) for rank in set(range(self._ranks)).difference(ranks)]
        for rank, content in zip(ranks, self._store.multi_get(list(map(_key, ranks))), strict=True):
            if self._seen.get(rank, (None, 0.0))[0] != content:
                self._seen[rank] = content, now
            _, host, step, phase = json.loads(content)
            reports.append(Report(rank, host, step, phase, now - self._seen[rank][1]))
        return reports


@dataclass(frozen=True)
class Requests:
    """What signals and clocks ask for: to save and stop, to save and go on."""

    stop_signal: int = 0
    save: bool = False

    @property
    def counts(self) -> list[int]:
        """As numbers of which those of all processes can be added up."""
        return [*(int(self.stop_signal == number) for number in STOPPING), int(self.save)]

    @staticmethod
    def of_counts(counts: Sequence[float]) -> "Requests":
        """What any process asks for, by the sums of their counts."""
        *stops, saves = counts
        asked = [int(number) for number, count in zip(STOPPING, stops, strict=True) if count]
        return Requests(asked[0] if asked else 0, bool(saves))

    def __or__(self, other: "Requests") -> "Requests":
        return Requests(self.stop_signal or other.stop_signal, self.save or other.save)


def sums_of_all(
    accelerator: Accelerator,
    numbers: Sequence[int],
    on_device: Sequence[Tensor] = (),
    as_they_are: Sequence[Tensor] = (),
) -> list[float]:
    """Numbers added up over all processes in one collective, read from the device in one transfer.

    Args:
        numbers: of the host, below 2^24, where float32 counts exactly.
        on_device: scalars, which are added up, too.
        as_they_are: scalars of the device that are the same on each process.

    Returns:
        All of them in this order.
    """
    scalars = [scalar.detach().float() for scalar in (*on_device, *as_they_are)]
    if accelerator.num_processes == 1:
        return [*map(float, numbers), *(torch.stack(scalars).tolist() if scalars else ())]
    sums = upload(torch.tensor(numbers, dtype=torch.float32), accelerator.device)
    if on_device:
        sums = torch.cat([sums, torch.stack(scalars[: len(on_device)])])
    dist.all_reduce(sums)
    return torch.cat([sums, *(scalar[None] for scalar in scalars[len(on_device) :])]).tolist()


def companions(rank: int, ranks: int, signals: Signals, timeout_s: float) -> Companions:
    """Those of this process, over the store of torch's process group."""
    store = dist.distributed_c10d._get_default_store() if ranks > 1 else None
    return Companions(rank, ranks, signals, timeout_s, store)


def _key(rank: int) -> str:
    return f"companions/{rank}"
