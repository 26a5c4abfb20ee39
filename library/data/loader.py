"""Micro-batches read ahead by worker processes, in order; what fails in one reaches the user as its own error."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch.utils.data import DataLoader, Dataset

from library.data.cache.entries import MEND_CACHE, DamagedEntryError
from library.data.micro_batch import MicroBatch
from library.errors import InputError, TrainingError
from library.signals import leave_signals_to_parent

_PREFETCH = 2  # micro-batches that each worker keeps ready
_LESS_MEMORY = (
    "Memory may have run out: use fewer --max_data_loader_n_workers or a smaller --train_batch_size, then go on "
    "from the last training state (--resume=auto)."
)


@dataclass(frozen=True)
class _Failure:
    """An error on its way from a worker process to the user, without the worker's traceback."""

    error: InputError | TrainingError


class _Reporting(Dataset):
    """A dataset whose errors are values, since a DataLoader hands on exceptions as tracebacks."""

    def __init__(self, inner: Dataset) -> None:
        self._inner = inner

    def __getitem__(self, item: int) -> MicroBatch | _Failure:
        try:
            return self._inner[item]
        except InputError as error:
            return _Failure(error)
        except DamagedEntryError as error:
            return _Failure(InputError(f"{error}. {MEND_CACHE}"))
        except MemoryError as error:
            reason = f"no memory left to read and decode images ({error or 'MemoryError'}). {_LESS_MEMORY}"
            return _Failure(TrainingError(reason))


@contextmanager
def worker_deaths_reported() -> Iterator[None]:
    """Around all that goes on while a loader is read: a worker's death interrupts the main thread wherever it is.

    Raises:
        TrainingError: a worker process has died; in place of torch's RuntimeError, raised in its SIGCHLD handler.
    """
    try:
        yield
    except RuntimeError as error:
        reason = str(error).splitlines()[0] if str(error) else ""
        if not reason.startswith("DataLoader worker"):
            raise
        raise TrainingError(f"a process that reads the data has died: {reason} {_LESS_MEMORY}") from error


def _leave_signals_to_the_main_process(worker: int) -> None:
    leave_signals_to_parent()


@dataclass(frozen=True)
class Loader:
    """An iterable of the micro-batches of the steps start_step … end_step - 1, in order; each stride-th of them.

    Attributes:
        dataset: item i is micro-batch i % accumulation of step i // accumulation.
        handed_over: called with each micro-batch, in this process, before it is yielded.
    """

    dataset: Dataset
    accumulation: int
    start_step: int
    end_step: int
    workers: int
    handed_over: Callable[[MicroBatch], None] = lambda batch: None
    stride: int = 1

    def __len__(self) -> int:
        return len(self._items)

    @property
    def _items(self) -> range:
        return range(self.start_step * self.accumulation, self.end_step * self.accumulation, self.stride)

    def __iter__(self) -> Iterator[MicroBatch]:
        """Read ahead and yield.

        Raises:
            InputError: no readable sample is found for a place.
        """
        workers = min(self.workers, len(self))
        loader = DataLoader(
            _Reporting(self.dataset),
            batch_size=None,  # the dataset's items are batches already
            sampler=self._items,
            num_workers=workers,
            prefetch_factor=_PREFETCH if workers else None,
            worker_init_fn=_leave_signals_to_the_main_process,
            generator=torch.Generator(),  # or it would take its seed from torch's own numbers, and change them
        )
        for item in loader:
            if isinstance(item, _Failure):
                raise item.error
            self.handed_over(item)
            yield item
