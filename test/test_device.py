"""Which device a process gets."""

import subprocess
import sys

import pytest
import torch

from library import device
from library.errors import InputError


@pytest.fixture
def two_gpus(monkeypatch):
    monkeypatch.setattr(device, "npu_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)


def test_each_process_of_a_machine_gets_its_own(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert device.default_device() == torch.device("cuda", 1)


def test_a_process_too_many_is_told_what_to_do(two_gpus, monkeypatch):
    monkeypatch.setenv("LOCAL_RANK", "2")
    with pytest.raises(InputError, match="start at most 2 processes"):
        device.default_device()


def test_without_an_accelerator_it_is_the_cpu(monkeypatch):
    monkeypatch.setattr(device, "npu_available", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert device.default_device() == torch.device("cpu")
    assert device.initial_loss_scale(torch.device("cpu")) == 2.0**16
    assert device.peak_memory_bytes(torch.device("cpu")) > 2**20


_FAULTS = """
import resource, torch
from library import device
device.keep_freed_memory(torch.device("cpu"))
def step():
    return [torch.ones(2**20) for _ in range(40)]  # 160 MiB, freed together
for _ in range(3):
    step()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(3):
    step()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc's")
def test_on_the_cpu_a_step_gets_the_pages_again_that_the_last_one_freed():
    """Without, some processes give whole steps back, and each page is faulted in again: so several are tried."""
    for _ in range(3):
        found = subprocess.run([sys.executable, "-c", _FAULTS], check=True, stdout=subprocess.PIPE)
        assert int(found.stdout) < 1000
