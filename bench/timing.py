"""Wall time of a function on any device, and quartiles of many times."""

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch

from library import device as devices


def timed_ms(run: Callable[[], Any], device: torch.device) -> tuple[float, Any]:
    """Wall time of a call in ms, including the work that it launched on the device, and its result."""
    devices.synchronize(device)
    started = time.perf_counter()
    result = run()
    devices.synchronize(device)
    return (time.perf_counter() - started) * 1000, result


def spread(values: list[float]) -> dict[str, float]:
    """Median and quartiles."""
    low, _, high = statistics.quantiles(values, n=4)
    return {"median": statistics.median(values), "quartile1": low, "quartile3": high}
