"""What a trainer wants to know of its data, whether that is indexed or comes as a stream."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from library.data.loader import Loader
from library.data.micro_batch import Tokenize


class Epochs(Protocol):
    """Where epochs begin; `library.data.order.plan.Plan` is one."""

    def epoch_of_step(self, step: int) -> int:
        """The epoch that a step belongs to, from 0."""

    def steps_before_epoch(self, epoch: int) -> int:
        """How many steps all epochs before this one have."""


class TrainingSet(Protocol):
    """The data of a run, in one order."""

    @property
    def epochs(self) -> Epochs:
        """Where epochs begin."""

    @property
    def global_batch(self) -> int:
        """Samples of a step over all processes."""

    @property
    def samples(self) -> int | None:
        """Of an epoch, repeats counted; None where nobody knows."""

    @property
    def left_out(self) -> Sequence[tuple[str, str]]:
        """(name, reason) of samples that were found unusable beforehand."""

    @property
    def left_out_count(self) -> int:
        """How many samples they are: an entry may stand for many that are in no file."""

    @property
    def largest_bucket(self) -> tuple[int, int]:
        """Width and height in px of the bucket whose batches need the most memory."""

    def of_one_process(self) -> "TrainingSet":
        """The same data in the same order, all of it in one process."""

    def report(self) -> list[str]:
        """What was found and how it becomes batches."""

    def caption_lines(self, count_tokens: Callable[[Sequence[str]], list[int]], most_tokens: int) -> list[str]:
        """How many captions are cut off at `most_tokens`, where that can be known beforehand."""

    def fingerprint(self) -> str:
        """A digest of all that the order of samples depends on, but for seed, batch size and micro-batches a step."""

    def description(self) -> dict[str, str]:
        """What must be the same in all processes, by the names that a message gives it; not the fingerprint."""

    def loader(self, tokenize: Tokenize, end_step: int, start_step: int = 0) -> Loader:
        """This process's micro-batches of the steps `start_step` to `end_step` - 1, the last one of the run."""

    def position(self) -> Mapping[str, Any] | None:
        """What a training state has to keep besides the step to go on after the last micro-batch handed over."""

    def go_on_from(self, positions: Sequence[Mapping[str, Any]], anyway: bool) -> None:
        """Take up the positions of all processes of an earlier run; the loader made then goes on from there.

        Args:
            anyway: --resume_anyway.

        Raises:
            InputError: they do not fit this run.
        """
