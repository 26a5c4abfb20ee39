"""The safetensors format as a stream: tensors are copied to the CPU, converted and written one by one.

A file is the header's length (8 bytes, little endian), the header (JSON: metadata, and type, shape and offsets of each
tensor) and the tensors' bytes, as the package safetensors documents it. Types and shapes are known
beforehand, so writing a model needs memory for one more tensor only.
"""

import json
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# The format's names of torch's types.
_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def tensor_file(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str], dtype: torch.dtype | None = None
) -> tuple[bytes, Iterator[memoryview]]:
    """The file's bytes before the tensors, and an iterator over the bytes of each tensor in the file's order.

    The iterator reads a tensor when it reaches it; until then the tensor must not change.

    Args:
        dtype: of all floating-point tensors in the file; None keeps each tensor's own.

    Raises:
        TypeError: a tensor has a dtype that the format lacks.
    """
    kinds = {
        name: dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }
    order = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name))  # so that each is aligned
    header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
    end = 0
    for name in order:
        if kinds[name] not in _DTYPES:
            raise TypeError(f"{name}: safetensors files hold no {kinds[name]}")
        start, end = end, end + tensors[name].numel() * kinds[name].itemsize
        shape = list(tensors[name].shape)
        header[name] = {"dtype": _DTYPES[kinds[name]], "shape": shape, "data_offsets": [start, end]}
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    return len(encoded).to_bytes(8, "little") + encoded, (_bytes(tensors[name], kinds[name]) for name in order)


def _bytes(tensor: Tensor, dtype: torch.dtype) -> memoryview:
    """A tensor's bytes in that dtype; its own memory if it is contiguous on the CPU and has the dtype."""
    own = tensor.detach().to("cpu", dtype).contiguous()
    return memoryview(own.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
