"""The matrix products, convolutions and attention of a step, recorded and run again alone."""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_map_only

_ATEN = torch.ops.aten
_PRODUCTS = {_ATEN.mm.default, _ATEN.bmm.default, _ATEN.addmm.default, _ATEN.baddbmm.default}
if hasattr(torch.ops.mkldnn, "_linear_pointwise"):
    _PRODUCTS.add(torch.ops.mkldnn._linear_pointwise.default)
_CONVOLUTIONS = {_ATEN.convolution.default, _ATEN.convolution_backward.default}


@dataclass(frozen=True)
class _Shape:
    size: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype


class ProductRecorder(TorchDispatchMode):
    """Counts every matrix product, convolution and attention kernel that runs, by its tensors' shapes and strides."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[tuple[Any, str]] = Counter()
        self.arguments: dict[tuple[Any, str], tuple[Any, ...]] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in _PRODUCTS or func in _CONVOLUTIONS:
            shapes = tree_map_only(Tensor, lambda t: _Shape(tuple(t.shape), t.stride(), t.dtype), args)
            key = (func, repr(shapes))
            self.calls[key] += 1
            self.arguments[key] = shapes
        return result


def product_replay(recorder: ProductRecorder, device: torch.device) -> tuple[Callable[[], None], int]:
    """A function that runs what was recorded, on random tensors, without the biases; and the number of calls in it."""
    pool: dict[_Shape, Tensor] = {}

    def tensor(shape: _Shape) -> Tensor:
        if shape not in pool:
            length = 1 + sum((size - 1) * stride for size, stride in zip(shape.size, shape.stride, strict=True))
            pool[shape] = torch.randn(length, device=device).to(shape.dtype).as_strided(shape.size, shape.stride)
        return pool[shape]

    work: list[tuple[Any, tuple[Any, ...], int]] = []
    for key, count in recorder.calls.items():
        func, arguments = key[0], list(tree_map_only(_Shape, tensor, recorder.arguments[key]))
        if func is _ATEN.addmm.default:
            func, arguments = _ATEN.mm.default, arguments[1:3]
        elif func is _ATEN.convolution.default:
            arguments[2] = None
        elif func is _ATEN.convolution_backward.default:
            arguments[3], arguments[10] = None, [*arguments[10][:2], False]
        work.append((func, tuple(arguments), count))

    def replay() -> None:
        for func, arguments, count in work:
            for _ in range(count):
                func(*arguments)

    return replay, sum(recorder.calls.values())
