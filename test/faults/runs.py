"""Runs of sdxl_pretrain.py that are disturbed, and what they must have in common with one that is not."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
PATIENCE_S = 300  # for what takes seconds on an idle machine


class Server:
    """Starts runs by forking a process that has imported everything."""

    def __init__(self) -> None:
        command = [sys.executable, str(ROOT / "test/faults/fork_server.py")]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=ROOT, env=ENV
        )

    def ask(self, request: dict) -> int | None:
        """Send a request; returns its answer."""
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def close(self) -> None:
        """End the server; runs must have ended before."""
        self._process.stdin.close()
        self._process.wait(30)


class Run:
    """One process of a run."""

    def __init__(
        self, server: Server, arguments: Sequence[str], log: Path, env: dict[str, str], faults: Sequence[tuple]
    ) -> None:
        self._server, self.log = server, log
        self._offset = log.stat().st_size if log.exists() else 0
        request = {"arguments": list(arguments), "log": str(log), "env": env, "faults": list(faults)}
        self.pid = server.ask({"start": request})
        self.status: int | None = None

    @property
    def text(self) -> str:
        """What it has printed so far."""
        if not self.log.exists():  # the process makes it
            return ""
        with self.log.open("rb") as file:
            file.seek(self._offset)
            return file.read().decode(errors="replace")

    def send(self, number: int) -> None:
        """Signal it, unless it has ended."""
        if self.status is None:
            os.kill(self.pid, number)

    def wait(self, timeout_s: float = PATIENCE_S) -> int:
        """Its exit status, that of a shell; it is killed, and an error, when it does not end in time."""
        if self.status is None:
            self.status = self._server.ask({"wait": self.pid, "timeout_s": timeout_s})
        if self.status is None:
            self.end()
            raise AssertionError(f"still running after {timeout_s:.0f} s:\n{self.text[-3000:]}")
        return self.status

    def ended_within(self, seconds: float) -> bool:
        """Whether it ends in that time."""
        if self.status is None:
            self.status = self._server.ask({"wait": self.pid, "timeout_s": seconds})
        return self.status is not None

    def end(self) -> None:
        """Kill what is left of it."""
        if self.status is None:
            os.kill(self.pid, signal.SIGKILL)
            self.status = self._server.ask({"wait": self.pid, "timeout_s": 30})


def wait_until(true: Callable[[], object], run: Run | None = None, timeout_s: float = PATIENCE_S) -> None:
    """Look until something is there; an error if the run has ended or the time is over."""
    deadline = time.monotonic() + timeout_s
    while not true():
        if run is not None and run.ended_within(0.03) and not true():
            raise AssertionError(f"ended with {run.status} before what was waited for:\n{run.text[-3000:]}")
        if time.monotonic() > deadline:
            raise AssertionError("what was waited for never came" + (f":\n{run.text[-3000:]}" if run else ""))
        time.sleep(0.01)


def metrics(out: Path) -> list[dict]:
    """The lines of metrics.jsonl that are complete."""
    path = out / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def steps_done(out: Path) -> int:
    """By metrics.jsonl."""
    lines = metrics(out)
    return lines[-1]["step"] if lines else 0


def states(out: Path) -> list[str]:
    """Names of the training states that are there."""
    return sorted(path.name for path in out.glob("*-state"))


def assert_undisturbed(out: Path, reference: Path) -> None:
    """The final weights and every step's loss and gradient norm are bit for bit those of the reference."""
    lines, expected = metrics(out), metrics(reference)
    assert [line["step"] for line in lines] == [line["step"] for line in expected]
    for line, other in zip(lines, expected, strict=True):
        for name in ("loss", "average_loss", "grad_norm", "lr", "epoch", "updated"):
            assert line[name] == other[name], f"{name} of step {line['step']}: {line[name]}, not {other[name]}"
    weights, others = load_file(out / "last.safetensors"), load_file(reference / "last.safetensors")
    assert weights.keys() == others.keys()
    differing = [name for name, weight in weights.items() if not torch.equal(weight, others[name])]
    assert not differing, f"{len(differing)} weights differ, such as {differing[:3]}"
