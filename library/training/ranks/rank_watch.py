"""What the processes of a run tell each other beside their collectives: a signal to stop, how far each is, a failure.

In a collective all wait for the last, and none can say for whom. So a thread of each process writes where its process
is into the store by which the processes found each other, once a second, and takes a stop signal of any other from it:
what one process hears while it waits for the main one, which samples pictures, say, ends the sampling.

A process that fails says why there before it leaves. The others end with that cause: by their own error, where the
backend notices that a process has gone, else, where they would wait for it, by the thread.
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
from library.errors import Stopped, TrainingError
from library.exit_status import end_with, leave_at_once
from library.processes.failures import OF_OTHER_SIDE
from library.signals import STOPPING, Signals
from library.training.ranks.rank_failure import RankFailure

logger = logging.getLogger(__name__)

_PERIOD_S = 1.0
_SILENT_S = 5.0  # a process that writes nothing for so long is stopped, dead or cut off
_WARN_AT = 0.9  # of the time-out: the backend's own, when it comes, may end the process without a word
_STOP_KEY, _FAILURE_KEY = "ranks/stop", "ranks/failure"
_LOOK_S = 0.1  # how often a process that waits looks into the store
_HEARD_S = 5.0  # so long a failed process waits for the others to hear of it: the store may go with it
_CAUSE_S = 3.0  # so long a process whose collective has failed waits for another's cause
_LEAVE_S = 10.0  # so long a process may take to end by itself once another has failed
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
    """Whom the others wait for: those that answer no more, else those that are behind.

    Returns:
        A sentence without its full stop.
    """
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


class RankWatch:
    """Within its `with` block the thread exchanges this with the other processes; with one process there is none."""

    def __init__(self, rank: int, ranks: int, signals: Signals, timeout_s: float, store: Any) -> None:
        """
        Args:
            timeout_s: after which the backend gives up a collective.
            store: of the process group; a connection of its own is made.
        """
        self.progress = Progress()
        self.verdict = ""  # whom this process was found to be waiting for, once it had waited long
        self.failure: RankFailure | None = None  # of another process, once it is known here
        self._rank, self._ranks, self._signals, self._timeout_s = rank, ranks, signals, timeout_s
        self._store = store.clone() if ranks > 1 else store
        self._seen: dict[int, tuple[Any, float]] = {}  # by rank, what it wrote last, and when that changed
        self._end = threading.Event()
        self._thread: threading.Thread | None = None

    def __enter__(self) -> "RankWatch":
        if self._ranks > 1:
            self._tell(0)  # at once: a process may stop within its first second
            self._thread = threading.Thread(target=self._run, name="rank watch", daemon=True)
            self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the thread, and tell the others of an error.

        Raises:
            InputError, TrainingError, Stopped: in place of a collective's error, what another process has ended with.
        """
        if self._thread is None:
            return
        cause = self._cause_elsewhere(error)
        self._end.set()
        self._thread.join(5 * _PERIOD_S)  # it may wait for a store that is gone
        with contextlib.suppress(RuntimeError):
            self._pass_on_stop()  # the signal that ends this process may be younger than the thread's last look
            if error is not None:
                self._tell_failure(error)
            self._store.set(_heard_key(self._rank), "")
            if self._rank == 0:  # which may have the store
                self._wait_for_the_others()
        if cause is not None:
            raise cause from error

    def _cause_elsewhere(self, error: BaseException | None) -> Exception | None:
        """What another process has ended with, if that is why a collective has failed here."""
        if not isinstance(error, RuntimeError) or isinstance(error, TrainingError) or not _of_backend(error):
            return None
        deadline = time.monotonic() + _CAUSE_S
        while self.failure is None and not self._signals.stop_requested and time.monotonic() < deadline:
            with contextlib.suppress(RuntimeError):
                self._hear_failure()
            time.sleep(_LOOK_S)
        if self.failure is not None:
            return self.failure.as_error()
        if self._signals.stop_signal is not None:  # another process has left because of it
            return Stopped(
                self._signals.stop_signal,
                f"another process has left, and no training state of this step is known to be saved "
                f"({_first_line(error)})",
            )
        return TrainingError(f"{self.verdict} ({_first_line(error)})") if self.verdict else None

    def _tell_failure(self, error: BaseException) -> None:
        """Leave the first failure of all in the store, and stay until the others have heard of it."""
        own = RankFailure.of(error, self._rank).to_json()
        if self._store.compare_set(_FAILURE_KEY, "", own).decode() == own:
            self._wait_for_the_others()

    def _wait_for_the_others(self) -> None:
        """Until all have heard of a failure or have come to their end, but not for long."""
        others = [_heard_key(rank) for rank in range(self._ranks) if rank != self._rank]
        deadline = time.monotonic() + _HEARD_S
        while not self._store.check(others) and time.monotonic() < deadline:
            time.sleep(_LOOK_S)

    def _hear_failure(self) -> None:
        """Take another process's failure from the store, once there is one."""
        if self.failure is not None or not self._store.check([_FAILURE_KEY]):
            return
        failure = RankFailure.from_json(self._store.get(_FAILURE_KEY))
        if failure.rank != self._rank:
            self.failure = failure
            self._signals.failure = failure.as_error()  # what can be left is left in order, not by force
            self._store.set(_heard_key(self._rank), "")

    def _run(self) -> None:
        """The thread; it ends when the store does, which is the end of the run."""
        tick, here, since, warned = 0, (-1, ""), time.monotonic(), False
        with contextlib.suppress(RuntimeError):  # what torch raises of a store that is gone
            while not self._end.wait(_PERIOD_S):
                tick += 1
                self._tell(tick)
                self._pass_on_stop()
                self._hear_failure()
                if self.failure is not None:
                    break
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
        if self.failure is not None and not self._end.wait(_LEAVE_S):
            self._leave(self.failure)

    def _leave(self, failure: RankFailure) -> None:
        """End this process, whose main thread waits for one that has failed; a state or checkpoint that has begun is
        written before."""
        self._signals.finish_unfinished()
        leave_at_once(end_with(failure.as_error()))

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


def watch_ranks(rank: int, ranks: int, signals: Signals, timeout_s: float) -> RankWatch:
    """This process's, over the store of torch's process group."""
    store = dist.distributed_c10d._get_default_store() if ranks > 1 else None
    return RankWatch(rank, ranks, signals, timeout_s, store)


def _of_backend(error: RuntimeError) -> bool:
    """Whether a collective or the store has raised it."""
    return isinstance(error, dist.DistError) or OF_OTHER_SIDE.search(str(error)) is not None


def _first_line(error: BaseException) -> str:
    return f"{(str(error).splitlines() or [''])[0]:.200}"


def _key(rank: int) -> str:
    return f"ranks/{rank}"


def _heard_key(rank: int) -> str:
    return f"ranks/{rank}/heard"
