"""Faults that a test plants in a run, in the run's own process: each function changes one thing from then on."""

import errno
import importlib
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

from library.data import dataset
from library.data.sample import decode
from library.training import build
from library.training.state import files as state_files
from library.training.state import writer as state_writer
from library.training.state.writer import StateWriter
from library.training.task import Task

sys.path.append(str(Path(__file__).resolve().parents[1] / "training" / "state"))
import power_cut

_SLEEP_S = 0.02


def _hold(marker: str, seconds: float) -> None:
    """Say that a place is reached, and stay there for a while."""
    Path(marker).touch()
    for _ in range(int(seconds / _SLEEP_S)):
        time.sleep(_SLEEP_S)


def hold_index(marker: str, seconds: float) -> None:
    """Finding the images takes long."""
    real = dataset.build_index

    def slow(*args, **keywords):
        _hold(marker, seconds)
        return real(*args, **keywords)

    dataset.build_index = slow


def hold_model_loading(marker: str, seconds: float) -> None:
    """Loading the model takes long."""
    real = build.load_model

    def slow(*args, **keywords):
        _hold(marker, seconds)
        return real(*args, **keywords)

    build.load_model = slow


def hold_checkpoint(marker: str, seconds: float) -> None:
    """Writing a checkpoint takes long."""
    real = Task.save

    def slow(self, stem, module):
        _hold(marker, seconds)
        return real(self, stem, module)

    Task.save = slow


def hold_state(marker: str, seconds: float) -> None:
    """Writing a training state takes long."""
    real = StateWriter._write_own

    def slow(self, partial, snapshot):
        _hold(marker, seconds)
        return real(self, partial, snapshot)

    StateWriter._write_own = slow


def hold_step(step: int, marker: str, seconds: float) -> None:
    """One step (from 0) takes long."""
    real = Task.loss

    def slow(self, module, batch):
        if batch.step == step:
            _hold(marker, seconds)
        return real(self, module, batch)

    Task.loss = slow


def nan_in_batch(step: int) -> None:
    """One sample of a step (from 0) has size conditions that are no numbers."""
    real = Task.loss

    def planted(self, module, batch):
        if batch.step == step:
            batch.size_ids_B6[0, 0] = float("nan")
        return real(self, module, batch)

    Task.loss = planted


def no_memory_to_decode(images: int) -> None:
    """After so many images the process that decodes has no memory left."""
    real, left = decode._decode, [images]

    def hungry(*args):
        left[0] -= 1
        if left[0] < 0:
            _, hard = resource.getrlimit(resource.RLIMIT_AS)
            pages = int(Path("/proc/self/statm").read_text().split()[0])
            resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + (16 << 20), hard))
            bytearray(1 << 30)
        return real(*args)

    decode._decode = hungry


def die_in_save(save: int, operation: int, power_cut_too: bool) -> None:
    """In a save (from 1) the process is killed before its n-th operation on files, or the power goes."""

    def install() -> None:
        power_cut._Disk(operation, power_cut_too).install()

    _in_save(save, install)


def disk_full_in_save(save: int, filler: str, free: int) -> None:
    """After the check of the space for a save (from 1) another program leaves only `free` bytes of it."""
    real, left = state_writer.check_space, [save]

    def check_space(output_dir, name, needed_bytes):
        real(output_dir, name, needed_bytes)
        left[0] -= 1
        if left[0] == 0:
            found = os.statvfs(output_dir)
            with open(filler, "wb") as file:  # noqa: PTH123
                os.posix_fallocate(file.fileno(), 0, found.f_bavail * found.f_bsize - free)

    state_writer.check_space = check_space


def read_only_in_save(save: int) -> None:
    """In a save (from 1) the system takes the file system's writability away, as it does after an error of the disk."""

    def install() -> None:
        real = os.open

        def refused(path, flags, *args, **keywords):
            if flags & os.O_ACCMODE != os.O_RDONLY:
                raise OSError(errno.EROFS, os.strerror(errno.EROFS), str(path))
            return real(path, flags, *args, **keywords)

        state_files.os.open = refused

    _in_save(save, install)


def clock_set_back(seconds: float) -> None:
    """The system's clock shows an earlier time."""
    real = time.time
    time.time = lambda: real() - seconds


def _in_save(save: int, act) -> None:
    """Act when a save begins to write."""
    real, left = StateWriter._write_own, [save]

    def writing(self, partial, snapshot):
        left[0] -= 1
        if left[0] == 0:
            act()
        return real(self, partial, snapshot)

    StateWriter._write_own = writing


def signal_while_caching(number: int, after: int) -> None:
    """The process gets a signal when it has encoded so many batches of images."""
    from library.training import encoders as sdxl_encoders

    real, calls = sdxl_encoders.encode_moments, 0

    def encode(*args: Any, **options: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == after:
            os.kill(os.getpid(), number)
        return real(*args, **options)

    sdxl_encoders.encode_moments = encode


def fail(target: str, call: int = 1, number: int = 0) -> None:
    """A function ("module:Class.name") raises at its n-th call: an OSError of that number, or without a number one that
    nobody expects."""
    owner, name = _owner_and_name(target)
    real, left = getattr(owner, name), [call]

    def failing(*args: Any, **keywords: Any) -> Any:
        left[0] -= 1
        if left[0] == 0:
            raise OSError(number, os.strerror(number), "planted") if number else RuntimeError("planted here")
        return real(*args, **keywords)

    setattr(owner, name, failing)


def answer(target: str, value: Any) -> None:
    """A function ("module:Class.name") returns a value, whatever it is asked."""
    owner, name = _owner_and_name(target)
    setattr(owner, name, lambda *args, **keywords: value)


def _owner_and_name(target: str) -> tuple[Any, str]:
    module, _, path = target.partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    return owner, name
