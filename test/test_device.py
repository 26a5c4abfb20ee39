"""Which device a process gets."""

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
