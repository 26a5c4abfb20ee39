"""Writing training states while training goes on: a copy in memory, then a thread that makes it durable.

A state that cannot be written is said at once and ends nothing: the next one is begun as if it had not been tried.

Several ranks write into one folder aside, each its own files, and leave a list of them; rank 0 waits for all lists,
writes the manifest and renames. They meet in the file system alone, so nothing here waits in a collective operation.
"""

import contextlib
import json
import logging
import threading
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from library import device as devices
from library.atomic_write import aside, remove, replace_folder, sync
from library.disk_space import check_space
from library.errors import TrainingError
from library.training.state.choice import obsolete, remove_state
from library.training.state.files import (
    INFO,
    ROWS,
    Entry,
    StateInfo,
    rank_prefix,
    write_json,
    write_manifest,
    write_tensors,
)
from library.training.state.names import state_name
from library.training.state.retention import Retention
from library.training.state.tensor_rows import merged_rows
from library.training.state.tree import pack

logger = logging.getLogger(__name__)

_POLL_S = 0.05
_QUIET_S = 60.0  # at the end of a run the other ranks are not waited for once their files have not grown for so long


@dataclass(frozen=True)
class _Snapshot:
    """What one rank writes: by file stem its tensors, on the CPU and no longer trained on, and the structure."""

    name: str
    info: StateInfo
    tensors: Mapping[str, Mapping[str, Tensor]]
    plain: Mapping[str, Any]
    rows: Mapping[str, tuple[int, int]]
    needed_bytes: int


class StateWriter:
    """Writes the states of one run, one at a time, in the background.

    Memory: one copy, on the CPU, of what this rank writes, from `reserve` or the first snapshot to the end of the run
    (the buffers are used again: fresh memory costs more time than the copy). The file's bytes are written from it as
    they are.
    """

    what = "a training state"

    def __init__(
        self,
        output_dir: Path,
        *,
        output_name: str | None = None,
        retention: Retention = Retention(),  # noqa: B008
        rank: int = 0,
        ranks: int = 1,
        device: torch.device = torch.device("cpu"),  # noqa: B008
        timeout_s: float = 1800,
    ) -> None:
        """
        Args:
            output_dir: on a file system that all ranks see; rank 0 holds its `RunLock`.
            retention: which earlier states go once a new one is durable.
            device: what is waited for before a snapshot is complete.
            timeout_s: how long rank 0 waits for the other ranks' files.
        """
        self.output_dir, self.output_name, self.retention = output_dir, output_name, retention
        self.rank, self.ranks, self.device, self.timeout_s = rank, ranks, device, timeout_s
        self._buffers: dict[tuple[str, str], Tensor] = {}
        self._saves = 0  # the same on all ranks
        self._thread: threading.Thread | None = None
        self._copying = False
        self._reserving: threading.Thread | None = None
        self._failure: BaseException | None = None  # of the state that was begun last
        self._unfinished: Path | None = None  # what a failure has left behind
        self.failures = 0  # states running that could not be written
        self._leaving = threading.Event()

    def reserve(self, own: Mapping[str, Any]) -> None:
        """Make the buffers for what snapshots will copy while training goes on, so that the first waits no longer.

        Args:
            own: this rank's state objects, as `snapshot` takes them.
        """
        prefix = rank_prefix(self.rank, self.ranks)
        packed = {prefix + name: pack(tree)[0] for name, tree in own.items()}

        def make() -> None:
            for stem, tensors in packed.items():
                for name, tensor in tensors.items():
                    self._buffer(stem, name, tensor).zero_()  # the system gives memory when it is written to

        self._reserving = threading.Thread(target=make, name="state buffers", daemon=True)
        self._reserving.start()

    def snapshot(
        self,
        stem: str,
        info: StateInfo,
        own: Mapping[str, Any],
        whole: Mapping[str, Any] | None = None,
        rows: Mapping[str, tuple[int, int]] = {},
        other_ranks_bytes: int = 0,
    ) -> None:
        """Copy what belongs to a state and write it in the background as `{stem}-state`. Called on all ranks.

        Waits for the previous state to be written first, or to have failed.

        Args:
            own: this rank's state objects by name: trees of tensors and plain values, as `state_dict` gives them.
            whole: those that all ranks share; on rank 0 only.
            rows: first row and number of rows that are in `own`, by parameter; the state tells a reader who has which.
            other_ranks_bytes: what the others will write to this file system, for the check of its space.
        """
        if whole and self.rank:
            raise ValueError("what all ranks share is written by rank 0")
        self.join()
        self._copying = True
        self._saves += 1
        try:
            self._thread = self._begin(stem, info, own, whole, rows, other_ranks_bytes)
        except BaseException as error:
            self._tell_rank_0(self._partial(state_name(stem), self._saves), error)
            raise
        finally:
            self._copying = False

    def is_writing(self) -> bool:
        """True while a state is being written, or copied to be written. Any thread may call it."""
        thread = self._thread
        return self._copying or (thread is not None and thread.is_alive())

    def leave(self) -> None:
        """The process ends once the state under way is written: other ranks are waited for only while they write."""
        self._leaving.set()

    def join(self) -> None:
        """Wait until nothing is being written, whether or not it could be."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def failed(self) -> bool:
        """True if the state that was begun last could not be written; one that is being written has not failed."""
        return not self.is_writing() and self._failure is not None

    def wait(self) -> None:
        """Wait for the state that was begun last; nothing to wait for is no error.

        Raises:
            TrainingError: it could not be written. The earlier states are as they were.
        """
        self.join()
        if self._failure is not None:
            raise TrainingError(f"{self._what_failed(self._failure)}, then resume.") from self._failure

    def finish(self) -> None:
        """`wait`, and give the memory back; at the end of a run.

        Raises:
            TrainingError: as `wait`.
        """
        try:
            self.wait()
        finally:
            self._buffers.clear()

    def __enter__(self) -> "StateWriter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Write the state under way to its end; what has failed has been said.

        When the block has failed, other ranks are waited for only while they write.
        """
        if error is not None:
            self.leave()
        self.join()
        self._buffers.clear()

    def _begin(
        self,
        stem: str,
        info: StateInfo,
        own: Mapping[str, Any],
        whole: Mapping[str, Any] | None,
        rows: Mapping[str, tuple[int, int]],
        other_ranks_bytes: int,
    ) -> threading.Thread:
        """`snapshot`'s work; returns the thread that writes, started."""
        if self._reserving is not None:
            self._reserving.join()
            self._reserving = None
        prefix = rank_prefix(self.rank, self.ranks)
        packed = {name: pack(tree) for name, tree in (whole or {}).items()}
        packed |= {prefix + name: pack(tree) for name, tree in own.items()}
        plain = {name: structure for name, (_, structure) in packed.items()}
        size = sum(t.numel() * t.element_size() for tensors, _ in packed.values() for t in tensors.values())
        size += sum(len(json.dumps(structure, indent=1)) for structure in plain.values())
        tensors = {name: self._copied(name, found) for name, (found, _) in packed.items()}
        devices.synchronize(self.device)
        snapshot = _Snapshot(state_name(stem), info, tensors, plain, rows, size + other_ranks_bytes)
        self._failure = None
        thread = threading.Thread(target=self._run, args=(snapshot, self._saves), name="state writer", daemon=True)
        thread.start()
        return thread

    def _what_failed(self, failure: BaseException) -> str:
        """A sentence without its full stop."""
        why = getattr(failure, "strerror", None) or str(failure) or type(failure).__name__
        return (
            f"--output_dir {self.output_dir}: the training state cannot be written ({why.rstrip('.')}). The earlier "
            "ones are whole. Make room or mend the folder"
        )

    def _copied(self, stem: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The tensors in this writer's own memory."""
        return {
            name: self._buffer(stem, name, tensor).copy_(tensor, non_blocking=True) for name, tensor in tensors.items()
        }

    def _buffer(self, stem: str, name: str, tensor: Tensor) -> Tensor:
        """This writer's memory for a tensor, kept from one snapshot to the next."""
        buffer = self._buffers.get((stem, name))
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            pinned = not devices.is_cpu(tensor.device)
            buffer = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu", pin_memory=pinned)
            self._buffers[stem, name] = buffer
        return buffer

    def _run(self, snapshot: _Snapshot, number: int) -> None:
        """The thread: says what goes wrong, and keeps it."""
        partial = self._partial(snapshot.name, number)
        try:
            if self.rank == 0 and self._unfinished is not None:
                remove(self._unfinished)  # a rank that was late may have written into it after all
                self._unfinished = None
            check_space(self.output_dir, f"the training state {snapshot.name}", snapshot.needed_bytes)
            if self.ranks == 1:
                remove(partial)
            partial.mkdir(exist_ok=True)  # another rank may have been first
            entries = self._write_own(partial, snapshot)
            if self.rank == 0:
                self._complete(partial, snapshot, entries)
            self.failures = 0
        except BaseException as error:
            if self.rank == 0:
                self._unfinished = partial
                with contextlib.suppress(OSError):
                    remove(partial)
            self._tell_rank_0(partial, error)
            self.failures += 1
            self._failure = error
            logger.error("%s.", self._what_failed(error))

    def _partial(self, name: str, number: int) -> Path:
        """The folder in which all ranks write a state until it is complete."""
        return aside(self.output_dir / name, f"partial{number}")

    def _tell_rank_0(self, partial: Path, error: BaseException) -> None:
        """On another rank: leave a note that it cannot write its part, so that rank 0 does not wait for it."""
        if self.rank:
            with contextlib.suppress(OSError):
                partial.mkdir(exist_ok=True)  # another rank may have been first
                (partial / _failed(self.rank)).write_text(str(error))

    def _write_own(self, partial: Path, snapshot: _Snapshot) -> dict[str, Entry]:
        entries = {}
        for stem, tensors in snapshot.tensors.items():
            for name, write, content in (
                (f"{stem}.safetensors", write_tensors, tensors),
                (f"{stem}.json", write_json, snapshot.plain[stem]),
            ):
                entries[name] = write(partial / name, content)
        if self.rank:
            listed = partial / _done(self.rank)
            unready = listed.with_suffix(".unready")
            files = {name: asdict(entry) for name, entry in entries.items()}
            write_json(unready, {"files": files, "rows": snapshot.rows})
            unready.rename(listed)
        return entries

    def _complete(self, partial: Path, snapshot: _Snapshot, entries: dict[str, Entry]) -> None:
        """On rank 0: add what the others wrote, make the state durable, then let obsolete ones go."""
        entries[INFO] = write_json(partial / INFO, {**asdict(snapshot.info), "ranks": self.ranks})
        rows = [snapshot.rows]
        for rank in range(1, self.ranks):
            written, its_rows = self._list_of(rank, partial)
            entries |= written
            rows.append(its_rows)
        entries[ROWS] = write_json(partial / ROWS, merged_rows(rows))
        write_manifest(partial, entries)
        sync(partial)
        replace_folder(partial, self.output_dir / snapshot.name)
        logger.info("training state saved: %s", self.output_dir / snapshot.name)
        try:  # the new one is there: what fails with old ones is no failure to save
            names = [entry.name for entry in self.output_dir.iterdir()]
            for name in obsolete(names, snapshot.name, self.retention, self.output_name):
                logger.info("removing old training state: %s", self.output_dir / name)
                remove_state(self.output_dir / name)
        except OSError as error:
            logger.warning("%s: old training states cannot be removed (%s)", self.output_dir, error.strerror)

    def _list_of(self, rank: int, partial: Path) -> tuple[dict[str, Entry], dict[str, tuple[int, int]]]:
        """The files that another rank has written, and the rows in them, once it says so."""
        done, failed = partial / _done(rank), partial / _failed(rank)
        began_s = grown_s = time.monotonic()
        bytes_there = -1  # none is looked for before
        while not done.exists():
            if failed.exists():
                raise TrainingError(f"{self.output_dir}: rank {rank} could not write its state: {failed.read_text()}")
            now_s = time.monotonic()
            waited_s, at_most_s = now_s - began_s, self.timeout_s
            if self._leaving.is_set():
                if bytes_there != (bytes_there := _bytes_in(partial)):
                    grown_s = now_s
                waited_s, at_most_s = now_s - grown_s, _QUIET_S
            if waited_s > at_most_s:
                raise TrainingError(
                    f"{self.output_dir}: rank {rank} has written nothing to {partial.name} for {waited_s:.0f} s. "
                    "All ranks need one --output_dir on a file system that they share."
                )
            time.sleep(_POLL_S)
        listed = json.loads(done.read_bytes())
        done.unlink()
        return {name: Entry(**entry) for name, entry in listed["files"].items()}, listed["rows"]


def _bytes_in(folder: Path) -> int:
    """How much has been written into a folder by now, by whichever process."""
    with contextlib.suppress(OSError):  # of a file that is being renamed
        return sum(entry.stat().st_size for entry in folder.iterdir())
    return 0


def _done(rank: int) -> str:
    return f".rank{rank:05d}.done"


def _failed(rank: int) -> str:
    return f".rank{rank:05d}.failed"
