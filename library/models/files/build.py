"""Networks built without memory of their own and filled with tensors that were read: nothing is initialised twice."""

from collections.abc import Callable, Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from library.errors import InputError

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
        InputError: names are missing or too many, or a shape differs; up to ten are listed.
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
    owned = {
        name: tensors[name].to(
            dtype if like.is_floating_point() else like.dtype, copy=True, memory_format=torch.contiguous_format
        )
        for name, like in expected.items()
    }
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
