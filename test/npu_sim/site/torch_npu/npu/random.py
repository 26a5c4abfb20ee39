"""Random state of the devices, apart from the CPU's."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from torch_npu.npu._device import _resolve


class _Generators:
    """The default generator of each device."""

    def __getitem__(self, index: int) -> torch.Generator:
        return torch.ops.npu_sim.default_generator(index)

    def __len__(self) -> int:
        return torch.ops.npu_sim.device_count()

    def __iter__(self) -> Iterator[torch.Generator]:
        return (self[index] for index in range(len(self)))


_default_generators = _Generators()


def manual_seed(seed: int) -> None:
    _default_generators[_resolve()].manual_seed(int(seed))


def manual_seed_all(seed: int) -> None:
    for generator in _default_generators:
        generator.manual_seed(int(seed))


def seed() -> int:
    return _default_generators[_resolve()].seed()


def seed_all() -> None:
    manual_seed_all(seed())


def initial_seed() -> int:
    return _default_generators[_resolve()].initial_seed()


def get_rng_state(device="npu") -> Tensor:
    """A CPU ByteTensor."""
    return _default_generators[_resolve(device)].get_state()


def set_rng_state(new_state: Tensor, device="npu") -> None:
    _default_generators[_resolve(device)].set_state(new_state)


def get_rng_state_all() -> list[Tensor]:
    return [generator.get_state() for generator in _default_generators]


def set_rng_state_all(new_states: Iterable[Tensor]) -> None:
    for index, state in enumerate(new_states):
        set_rng_state(state, index)
