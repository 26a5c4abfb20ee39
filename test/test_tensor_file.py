"""Streamed safetensors files against what the package safetensors reads."""

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from library.tensor_file import tensor_file
from library.training.memory.live_bytes import LiveBytes


def write(path, tensors, *arguments):
    start, content = tensor_file(tensors, *arguments)
    path.write_bytes(start + b"".join(content))
    return load_file(path)


@pytest.mark.parametrize("dtype", [None, torch.float32, torch.float16, torch.bfloat16])
def test_the_package_reads_what_was_written(tmp_path, dtype):
    random = torch.Generator().manual_seed(0)
    tensors = {
        "b": torch.randn(5, 3, generator=random).T,  # not contiguous
        "a": torch.randn(7, generator=random, dtype=torch.float64),
        "half": torch.randn(3, 1, generator=random).bfloat16().expand(3, 4),
        "byte": torch.arange(3, dtype=torch.uint8),
        "number": torch.tensor(5),
        "none": torch.zeros(0, 4),
    }
    read = write(tmp_path / "x.safetensors", tensors, {"title": 'a "name"'}, dtype)
    assert read.keys() == tensors.keys()
    for name, tensor in tensors.items():
        expected = tensor.to(dtype) if dtype is not None and tensor.is_floating_point() else tensor
        assert read[name].dtype == expected.dtype and torch.equal(read[name], expected), name
    with safe_open(tmp_path / "x.safetensors", "pt") as file:
        assert file.metadata() == {"format": "pt", "title": 'a "name"'}


def test_one_tensor_at_a_time_is_converted_and_none_that_is_as_it_should_be():
    tensors = {str(number): torch.randn(1000) for number in range(20)}
    for dtype, most in ((torch.float16, 2 * 2000), (torch.float32, 0)):
        with LiveBytes() as live:
            live.hold(list(tensors.values()))
            held = live.peak
            for piece in tensor_file(tensors, {}, dtype)[1]:
                assert len(piece) == 1000 * dtype.itemsize
        assert live.peak - held <= most


def test_a_type_that_the_format_lacks_is_named():
    with pytest.raises(TypeError, match=r"z: safetensors files hold no torch.complex64"):
        tensor_file({"z": torch.zeros(2, dtype=torch.complex64)}, {})
