"""--torch_compile: whether the backend asked for works on this machine, tried before anything is loaded."""

import logging
from collections.abc import Callable

import torch
from torch import Tensor, nn

from library.errors import InputError

logger = logging.getLogger(__name__)

_TOLERANCE = 1e-3  # relative; a backend that is wrong is wrong by far more
_INSTEAD = "use --dynamo_backend=aot_eager or eager, which need nothing, or leave out --torch_compile"


def check_backend(backend: str, device: torch.device) -> None:
    """Compile a small layer on the device, and compare its output and gradients with the plain one's.

    Raises:
        InputError: there is no such backend, it cannot compile here, or what it compiles does not train.
    """
    known = torch.compiler.list_backends(exclude_tags=())
    if backend not in known:
        raise InputError(
            f"--dynamo_backend={backend}: torch {torch.__version__} has no backend of that name, and no package brings "
            f"one; {_INSTEAD}"
        )
    logger.info("trying torch.compile with %s", backend)
    # Larger than one in every direction and no multiple of anything, so that no backend has a special case for it.
    layer = nn.Sequential(nn.Linear(6, 10), nn.GELU(approximate="none")).to(device)
    x = torch.randn(3, 6, device=device)
    expected = _output_and_gradients(layer, layer, x)
    try:
        found = _output_and_gradients(torch.compile(layer, backend=backend), layer, x)
    except Exception as error:  # each backend has exceptions of its own
        raise InputError(f"--dynamo_backend={backend} cannot be used here: {_reason(error)}; {_INSTEAD}") from error
    if any((one - other).norm() > _TOLERANCE * other.norm() for one, other in zip(found, expected, strict=True)):
        raise InputError(
            f"--dynamo_backend={backend} gives other outputs or gradients than torch for a linear layer with GELU; "
            f"{_INSTEAD}"
        )


def _output_and_gradients(run: Callable[[Tensor], Tensor], layer: nn.Module, x: Tensor) -> list[Tensor]:
    """The output, and the gradients to the layer's parameters."""
    layer.zero_grad()
    out = run(x)
    if not out.requires_grad:
        raise RuntimeError("its output has no gradient, so it is for inference alone")
    out.square().sum().backward()
    return [out.detach(), *(one.grad.clone() for one in layer.parameters() if one.grad is not None)]


def _reason(error: Exception) -> str:
    """In one line, with the way out where it is known."""
    from torch._inductor.exc import CppCompileError, InvalidCxxCompiler

    chain: list[BaseException] = [error]
    while (earlier := chain[-1].__cause__ or chain[-1].__context__) is not None and earlier not in chain:
        chain.append(earlier)
    inner = [getattr(one, "inner_exception", one) for one in chain]
    if any(isinstance(one, InvalidCxxCompiler) for one in inner):
        return "it needs a C++ compiler and finds none; install g++ (CXX names another), or"
    if any(isinstance(one, CppCompileError) for one in inner):
        return "its C++ code could not be compiled; install a newer g++ and Python's headers (python3-dev), or"
    if any("triton" in type(one).__name__.lower() for one in inner):
        return "it needs a working triton and finds none; install the triton that belongs to this torch, or"
    return " ".join(str(inner[-1]).split())[:300] or type(error).__name__
