"""Starts runs of sdxl_pretrain.py by forking: what they import is imported once, so a run costs its own work alone.

A line of JSON on standard input, a line back: {"start": {...}} forks a run and answers its pid, {"wait": pid,
"timeout_s": s} answers the exit status as a shell has it, or null where the run has not ended.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import NoReturn

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import diffusers  # noqa: E402
import planted  # noqa: E402
import torch  # noqa: E402
import transformers  # noqa: E402

import sdxl_pretrain  # noqa: E402
import third_patch  # noqa: E402
from library.exit_status import run_script  # noqa: E402

_LAZY = (diffusers.AutoencoderKL, transformers.CLIPTextModel, transformers.CLIPTextModelWithProjection)
_LAZY += (transformers.CLIPTokenizer, diffusers.DDIMScheduler, third_patch.PATCHES)


def start(arguments: list[str], log: str, env: dict[str, str], faults: list[list]) -> int:
    """A run in a process of its own, with faults planted; returns its pid in the parent."""
    child = os.fork()
    if not child:
        become(arguments, log, env, faults)
    return child


def become(arguments: list[str], log: str, env: dict[str, str], faults: list[list]) -> NoReturn:
    """Make this process the run, to its end."""
    os.setpgid(0, 0)
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
    nothing = os.open(os.devnull, os.O_RDONLY)
    for target in (1, 2):
        os.dup2(descriptor, target)
    os.dup2(nothing, 0)
    os.environ.update(env)
    for name, *values in faults:
        getattr(planted, name)(*values)
    run_script(lambda: sdxl_pretrain.main(arguments))


def wait(pid: int, timeout_s: float) -> int | None:
    """The exit status of a run, 128 plus the number of the signal that killed it, or None at the end of the time."""
    deadline = time.monotonic() + timeout_s
    while time.monotonic() < deadline:
        ended, status = os.waitpid(pid, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return code if code >= 0 else 128 - code
        time.sleep(0.02)
    return None


def serve() -> None:
    """Answer requests until standard input ends."""
    torch.set_num_threads(1)
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        request = json.loads(line)
        answer = start(**request["start"]) if "start" in request else wait(request["wait"], request["timeout_s"])
        print(json.dumps(answer), file=replies, flush=True)


if __name__ == "__main__":
    serve()
