"""The failure of one process as the other processes are told it, and work in which all of them fail together."""

import json
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass

from accelerate import Accelerator
from accelerate.utils import gather_object

from library.errors import InputError, Stopped, TrainingError

_INPUT, _TRAINING, _STOPPED, _OTHER = "input", "training", "stopped", "other"


@dataclass(frozen=True)
class RankFailure:
    """Why a process has ended.

    Attributes:
        kind: of the error, as the exit status tells kinds apart.
        text: what the process prints, without a traceback.
        signal_number: of the signal that stopped it; else 0.
    """

    rank: int
    host: str
    kind: str
    text: str
    signal_number: int = 0

    @staticmethod
    def of(error: BaseException, rank: int) -> "RankFailure":
        """An error that this process ends with."""
        host = platform.node()
        if isinstance(error, Stopped):
            return RankFailure(rank, host, _STOPPED, str(error), error.exit_status - 128)
        if isinstance(error, InputError):
            return RankFailure(rank, host, _INPUT, str(error))
        if isinstance(error, TrainingError):
            return RankFailure(rank, host, _TRAINING, str(error))
        if isinstance(error, OSError) and error.strerror:
            named = f"{error.filename}: " if error.filename else ""
            return RankFailure(rank, host, _OTHER, f"{named}{error.strerror}")
        return RankFailure(rank, host, _OTHER, f"{type(error).__name__}: {error}".rstrip(": "))

    def as_error(self) -> InputError | TrainingError | Stopped:
        """What another process ends with because of it: with the same exit status, and the cause in its message."""
        if self.kind == _STOPPED:
            return Stopped(self.signal_number)
        if self.kind == _INPUT:
            return InputError(*self.text.splitlines())
        return TrainingError(f"rank {self.rank} on {self.host} has failed: {self.text}")

    def to_json(self) -> str:
        """The failure as JSON, for the store."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> "RankFailure":
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@contextmanager
def together(accelerator: Accelerator) -> Iterator[None]:
    """Around work without a collective: it fails in every process where it fails in one. A collective in itself.

    Without it the others would wait in their next collective for a process that has ended.

    Raises:
        InputError, TrainingError, Stopped: what another process has failed with; its own error in that process itself.
    """
    error: Exception | None = None
    try:
        yield
    except Exception as raised:  # whatever it is, the others must know
        error = raised
    if accelerator.num_processes > 1:
        own = None if error is None else RankFailure.of(error, accelerator.process_index)
        failures: list[RankFailure | None] = [own]
        try:
            failures = gather_object([own])
        except RuntimeError:  # a connection is gone; what happened here matters more
            if error is None:
                raise
        first = next((failure for failure in failures if failure is not None), None)
        if error is None and first is not None:
            raise first.as_error()
    if error is not None:
        raise error
