"""`torch_npu.profiler`: torch's profiler of the host, under the names and with the arguments of torch_npu 2.14's.

The real one writes a folder WORKER_TIME_ascend_pt with ASCEND_PROFILER_OUTPUT/trace_view.json, which the handler here
does, too.
"""

import enum
import os
import socket
import time
from pathlib import Path

import torch.profiler
from torch.profiler import ProfilerAction, schedule


class ProfilerActivity(enum.Enum):
    CPU = "CPU"
    NPU = "NPU"


def supported_activities() -> set[ProfilerActivity]:
    return set(ProfilerActivity)


def tensorboard_trace_handler(dir_name=None, worker_name=None, analyse_flag=True, async_mode=False):
    """Writes the trace once it is there."""

    def handle(profiler: "profile") -> None:
        worker = worker_name or f"{socket.gethostname()}_{os.getpid()}"
        folder = Path(dir_name) / f"{worker}_{time.time_ns()}_ascend_pt" / "ASCEND_PROFILER_OUTPUT"
        folder.mkdir(parents=True)
        if analyse_flag:
            profiler.export_chrome_trace(str(folder / "trace_view.json"))

    return handle


class profile(torch.profiler.profile):  # noqa: N801  torch's name
    """As torch's, of the host alone."""

    def __init__(
        self,
        *,
        activities=None,
        schedule=None,
        on_trace_ready=None,
        record_shapes=False,
        profile_memory=False,
        with_stack=False,
        with_flops=False,
        with_modules=False,
        experimental_config=None,
    ) -> None:
        if not set(activities or ()) <= set(ProfilerActivity):
            raise ValueError("activities: ProfilerActivity of torch_npu.profiler")
        super().__init__(
            activities=[torch.profiler.ProfilerActivity.CPU],
            schedule=schedule,
            on_trace_ready=on_trace_ready,
            record_shapes=record_shapes,
            profile_memory=profile_memory,
            with_stack=with_stack,
            with_flops=with_flops,
            with_modules=with_modules,
        )


__all__ = [
    "ProfilerAction", "ProfilerActivity", "profile", "schedule", "supported_activities", "tensorboard_trace_handler",
]  # fmt: skip
