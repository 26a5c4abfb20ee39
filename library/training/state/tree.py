"""Named state objects (state_dicts: nested dicts, lists, tuples of tensors and plain values) as tensors and JSON."""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

# A dict with one of these keys stands for what JSON has no form of.
_TENSOR, _TUPLE, _ITEMS = "__tensor__", "__tuple__", "__items__"


def pack(tree: Any) -> tuple[dict[str, Tensor], Any]:
    """Take the tensors out of a tree.

    Returns:
        The tensors by their path ("state.0.exp_avg"), and the tree as JSON values with references in their places.

    Raises:
        TypeError: a value that is neither a tensor nor plain, with its path.
    """
    tensors: dict[str, Tensor] = {}
    return tensors, _packed(tree, (), tensors)


def unpack(tensors: Mapping[str, Tensor], plain: Any) -> Any:
    """The tree that `pack` took apart, tuples and keys that are no text included.

    Raises:
        KeyError: a tensor is referred to and not there.
    """
    if isinstance(plain, list):
        return [unpack(tensors, value) for value in plain]
    if not isinstance(plain, dict):
        return plain
    if _TENSOR in plain:
        return tensors[plain[_TENSOR]]
    if _TUPLE in plain:
        return tuple(unpack(tensors, value) for value in plain[_TUPLE])
    if _ITEMS in plain:
        return {unpack(tensors, key): unpack(tensors, value) for key, value in plain[_ITEMS]}
    return {key: unpack(tensors, value) for key, value in plain.items()}


def _packed(value: Any, path: tuple[str, ...], tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        name = ".".join(path) or "value"
        while name in tensors:  # {"a": {"b": x}, "a.b": y}
            name += "'"
        tensors[name] = value.detach()
        return {_TENSOR: name}
    if isinstance(value, Mapping):
        keys_are_text = all(isinstance(key, str) for key in value)
        if keys_are_text and not {_TENSOR, _TUPLE, _ITEMS} & value.keys():
            return {key: _packed(inner, (*path, key), tensors) for key, inner in value.items()}
        items = [[_packed(key, (*path, "key"), tensors), inner] for key, inner in value.items()]
        return {
            _ITEMS: [
                [key, _packed(inner, (*path, str(name)), tensors)]
                for (key, inner), name in zip(items, value, strict=True)
            ]
        }
    if isinstance(value, tuple):
        return {_TUPLE: [_packed(inner, (*path, str(place)), tensors) for place, inner in enumerate(value)]}
    if isinstance(value, list):
        return [_packed(inner, (*path, str(place)), tensors) for place, inner in enumerate(value)]
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"{'.'.join(path) or 'value'}: a {type(value).__name__} is neither a tensor nor a plain value")
