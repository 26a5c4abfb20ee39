"""The training states of a run: when one is due, what goes into it, and taking one up again."""

import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from library.training.state.files import State, StateInfo
from library.training.state.names import state_name
from library.training.state.tensor_rows import Part, SavedParts, rows_of
from library.training.state.writer import StateWriter

logger = logging.getLogger(__name__)

_AGAIN_S, _AGAIN_AT_MOST_S = 30.0, 600.0  # between two tries of a state that cannot be written
TRAINING, DATA = "training", "data"  # each process's own objects: its parts, and where a stream is


class Stateful(Protocol):
    """Something that a training state holds under a name, the same in all processes."""

    def state_dict(self) -> Mapping[str, Any]:
        """Trees of tensors and plain values."""

    def load_state_dict(self, state: Any) -> Any:
        """Take up what `state_dict` gave, in this run or an earlier one."""


class Parts(Protocol):
    """What has weights and optimizer state: `library.training.engine.sharding.Replicated` is one."""

    def own_parts(self) -> Mapping[str, Part]:
        """What this process writes, by parameter; no copies."""

    def read_parts(self, saved: SavedParts) -> None:
        """Take up what the processes of some run have written."""


@dataclass(frozen=True)
class StateCadence:
    """When states are saved, besides at the end and on a signal."""

    every_n_steps: int | None = None
    every_n_minutes: float | None = None
    with_checkpoints: bool = False


class States:
    """Saves the states of a run. Every process has one and calls it at the same steps."""

    def __init__(
        self,
        writer: StateWriter,
        parts: Parts,
        objects: Mapping[str, Stateful],
        cadence: StateCadence,
        info: Callable[[int, Mapping[str, Any]], StateInfo],
        step_stem: Callable[[int], str],
        data_position: Callable[[], Mapping[str, Any] | None] = lambda: None,
    ) -> None:
        """
        Args:
            parts: what each process writes and reads of its own.
            objects: by name, what all share.
            info: makes the state's description of the steps done and of what metrics go on from.
            step_stem: a step's number to the name of what is saved at it.
            data_position: where this process's data is, as far as the step alone does not say it.
        """
        self.writer, self.parts, self.objects, self.cadence = writer, parts, objects, cadence
        self._info, self._step_stem, self._data_position = info, step_stem, data_position
        self._saved_step: int | None = None
        self.newest: Path | None = None  # the state that was begun last
        self._last_save = time.monotonic()

    def minutes_are_up(self) -> bool:
        """Whether this process's clock asks for a state; processes' clocks differ, so they must agree."""
        minutes = self.cadence.every_n_minutes
        return minutes is not None and time.monotonic() - self._last_save >= 60 * minutes

    def try_again(self) -> bool:
        """Whether this process asks for a state because the last one could not be written: at once after the first
        failure, and then less and less often. Processes know different failures, so they must agree."""
        if not self.writer.failed():
            return False
        wait_s = 0.0 if self.writer.failures == 1 else min(_AGAIN_S * 2 ** (self.writer.failures - 2), _AGAIN_AT_MOST_S)
        return time.monotonic() - self._last_save >= wait_s

    def step_is_due(self, steps_done: int) -> bool:
        """Whether the step's number asks for a state."""
        return self.cadence.every_n_steps is not None and steps_done % self.cadence.every_n_steps == 0

    def reserve(self) -> None:
        """After the first step, when the optimizer has its state: make memory for the states that are due later."""
        cadence = self.cadence
        if cadence.with_checkpoints or cadence.every_n_steps or cadence.every_n_minutes:
            self.writer.reserve({TRAINING: self.parts.own_parts()})

    def save(self, steps_done: int, metrics: Mapping[str, Any], stem: str | None = None, anew: bool = False) -> None:
        """Copy the state now and write it in the background; nothing to do where this step has one already.

        Args:
            stem: its name; that of the step if not given.
            anew: also where this step has one, which could not be written.
        """
        if self._saved_step == steps_done and stem is None and not anew:
            return
        is_main = self.writer.rank == 0
        position, parts = self._data_position(), self.parts.own_parts()
        stem = stem or self._step_stem(steps_done)
        logger.info("saving training state %s", state_name(stem))
        self.writer.snapshot(
            stem,
            self._info(steps_done, metrics),
            {TRAINING: parts} | ({} if position is None else {DATA: position}),
            {name: one.state_dict() for name, one in self.objects.items()} if is_main else None,
            rows_of(parts),
        )
        self._saved_step, self._last_save = steps_done, time.monotonic()
        self.newest = self.writer.output_dir / state_name(stem)

    @property
    def failed(self) -> bool:
        """Whether this process knows that the state that was begun last could not be written."""
        return self.writer.failed()

    def finish_writing(self) -> None:
        """Until no state is being written; whether it could be is `failed`'s to tell."""
        self.writer.join()

    def wait(self) -> None:
        """Until the last state is durable.

        Raises:
            TrainingError: it could not be written.
        """
        self.writer.wait()


def take_up(state: State, parts: Parts, objects: Mapping[str, Stateful]) -> None:
    """Give parameters and named objects what a state holds of them; those that it does not know stay as they are.

    Raises:
        InputError: the state is of other parameters.
    """
    parts.read_parts(parts_in(state))
    for name, one in objects.items():
        if name in state.whole:
            one.load_state_dict(state.whole[name])


def parts_in(state: State) -> SavedParts:
    """What the processes of the run that saved wrote of weights and optimizer state."""
    return SavedParts(state.rows, lambda rank: state.own[rank][TRAINING])


def data_positions(state: State) -> list[Mapping[str, Any]]:
    """Where the data of each process was, if the step alone does not say it."""
    return [own[DATA] for own in state.own if DATA in own]


@dataclass
class Resumed:
    """A state that a run goes on from."""

    folder: Path
    state: State

    def let_go(self) -> None:
        """Once the state has been taken up: keep what it says of itself alone, and let go of its files."""
        self.state = State(self.state.info, {}, (), {})

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return self.state.info.step
