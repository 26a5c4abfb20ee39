"""Networks built without memory of their own and filled with tensors that were read: nothing is initialised twice."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.finite import is_finite

Network = TypeVar("Network", bound=nn.Module)
_SHOWN = 10


def build(
    construct: Callable[[], Network],
    tensors: Mapping[str, Tensor],
    dtype: torch.dtype,
    origin: str,
    kind: str,
    wanted: str,
) -> Network:
    """A network whose parameters are the given tensors, copied to memory of its own and converted to dtype.

    Args:
        construct: makes the network; called with the meta device as default, so it allocates nothing.
        tensors: by the network's own parameter names, all of them and no others.
        origin: the file or folder they are from, for messages.
        kind: what that seems to hold, in words, for messages.
        wanted: the family whose model it should be, for messages.

    Raises:
        InputError: names are missing or too many, a shape or a type differs, or a weight is no finite number; up to
            ten are listed.
    """
    try:
        with torch.device("meta"):
            network = construct()
    except InputError:
        raise
    except Exception as error:  # libraries have many ways to say that sizes do not go together
        raise InputError(
            f"{origin}: its configuration makes no network ({error}). It seems to be {kind}. Give an {wanted} base "
            "model."
        ) from error
    expected = network.state_dict()
    check_names(expected, tensors, origin, kind, wanted)
    wrong = [
        f"{name}: {tuple(tensors[name].shape)} instead of {tuple(like.shape)}"
        for name, like in expected.items()
        if tensors[name].shape != like.shape
    ]
    if wrong:
        raise InputError(f"{origin}: {len(wrong)} tensors of a wrong shape ({_listed(wrong)}). It seems to be {kind}.")
    integers = [name for name, like in expected.items() if like.is_floating_point() != _is_float(tensors[name])]
    if integers:
        raise InputError(
            f"{origin}: {len(integers)} tensors are no plain weights but of another type, as quantised models have "
            f"them ({integers[0]}: {tensors[integers[0]].dtype}). Give the model in fp32, fp16 or bf16."
        )
    owned = {
        name: tensors[name].to(
            dtype if like.is_floating_point() else like.dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, like in expected.items()
    }
    check_finite(owned, origin)
    network.load_state_dict(owned, assign=True)
    _fill_position_ids(network)
    return network.requires_grad_(True).eval()


def check_names(
    expected: Mapping[str, object], found: Mapping[str, object], origin: str, kind: str, wanted: str
) -> None:
    """Compare two sets of tensor names.

    Raises:
        InputError: they differ.
    """
    missing = [name for name in expected if name not in found]
    surplus = [name for name in found if name not in expected]
    if missing or surplus:
        parts = [
            f"{len(names)} tensors {what} ({_listed(names)})"
            for what, names in (("are missing", missing), ("do not belong there", surplus))
            if names
        ]
        raise InputError(
            f"{origin}: no complete {wanted} model: {'; '.join(parts)}. It seems to be {kind}. Give an {wanted} base "
            "model."
        )


def check_finite(tensors: Mapping[str, Tensor], origin: str) -> None:
    """Find weights that are no numbers: NaN or infinite. For all of SDXL's that takes half a second.

    Raises:
        InputError: there are some; up to ten tensors are named.
    """
    wrong = [
        f"{name} ({int((~tensor.isfinite()).sum())} of {tensor.numel()} numbers)"
        for name, tensor in tensors.items()
        if not is_finite(tensor)
    ]
    if wrong:
        raise InputError(
            f"{origin}: {len(wrong)} tensors have weights that are NaN or infinite ({_listed(wrong)}): the model is "
            "broken (a training that diverged, or a merge or conversion that overflowed), and all that is trained from "
            "it would be. Give another copy of it, or another model."
        )


def _is_float(tensor: Tensor) -> bool:
    return tensor.is_floating_point() and not tensor.is_complex()


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more


def _fill_position_ids(network: nn.Module) -> None:
    """Give memory to the buffers that are not saved; in the networks here only CLIP's 0, 1, 2, ... is one."""
    for name, buffer in list(network.named_buffers()):
        if not buffer.is_meta:
            continue
        owner, _, last = name.rpartition(".")
        if last != "position_ids":
            raise RuntimeError(f"{type(network).__name__}: nothing known to fill the buffer {name} with")
        network.get_submodule(owner).register_buffer(
            last, torch.arange(buffer.shape[-1]).expand(buffer.shape).clone(), persistent=False
        )
