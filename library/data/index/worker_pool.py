"""Work spread over processes, with what is done counted; little work stays in the process that asks for it."""

import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from typing import TypeVar

_ALONE_SECONDS = 1.0  # a pool takes about as long to start
_FEWEST, _MOST = 4, 32  # processes; more than there are cores where these are few, since they wait for disks, too

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_all(
    work: Callable[[Task], Result], tasks: Sequence[Task], advance: Callable[[int], None] = lambda place: None
) -> list[Result]:
    """The results of all tasks, in their order.

    Args:
        work: a function of a module, as other processes must find it; tasks and results are pickled.
        advance: called in this thread with a task's place when it is done.

    Raises:
        What work raises; tasks that have not begun are dropped then.
    """
    results: dict[int, Result] = {}
    began = time.monotonic()
    for place, task in enumerate(tasks):
        if time.monotonic() - began > _ALONE_SECONDS and len(tasks) - place > 1:
            break
        results[place] = work(task)
        advance(place)
    if len(results) < len(tasks):
        _run_in_processes(work, tasks, results, advance)
    return [results[place] for place in range(len(tasks))]


def _run_in_processes(
    work: Callable[[Task], Result], tasks: Sequence[Task], results: dict[int, Result], advance: Callable[[int], None]
) -> None:
    """Add the results that are still missing."""
    missing = [place for place in range(len(tasks)) if place not in results]
    processes = min(max(_FEWEST, len(os.sched_getaffinity(0))), _MOST, len(missing))
    # Spawned, since a process with an accelerator and threads may not be forked.
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, context, initializer=_end_with_parent) as pool:
        try:
            futures = {pool.submit(work, tasks[place]): place for place in missing}
            for future in as_completed(futures):
                results[futures[future]] = future.result()
                advance(futures[future])
        except BaseException:  # Ctrl-C, too, does not wait for what has not begun
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _end_with_parent() -> None:
    """Leave Ctrl-C to the parent, and end when it ends, however that happens."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
