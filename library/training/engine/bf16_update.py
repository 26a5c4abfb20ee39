"""--full_bf16: an optimizer whose weights, gradients and states are bf16 and whose arithmetic is fp32.

A piece of some million elements at a time becomes fp32, the optimizer steps on it as ever, and what it leaves is
rounded back, as --bf16_update has it. Rounding to the nearest loses every step that is smaller than half of bf16's
spacing: a weight of 1 then ignores steps below 2^-9, and AdamW's second moment, of which a step takes 0.1 %, never
falls again.

- stochastic: up or down at random, so that the mean is right (`library.training.engine.rounding`).
- kahan: weights to the nearest, with what that takes away kept beside them, in bf16 too, and put back before the next
  step (Kahan 1965, "Further remarks on reducing truncation errors"). Two more bytes a weight for 16 bits in place of 8.
- nearest: what plain bf16 training does; to compare with.

States of a parameter's shape are bf16, rounded stochastically in the first two ways. What else an optimizer keeps
(counters, AdaFactor's sums of rows and columns) stays as it makes it.
"""

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from library.options.precision import BF16_UPDATES, PrecisionOptions
from library.training.engine.group_entries import entries, restore
from library.training.engine.rounding import RoundingBits, check_integers, places_from, rounding_key, stochastic

PIECE_ELEMENTS = 2**22  # 16 MiB of fp32, of which an AdamW takes some nine at a time

# In the optimizer's state of a parameter, beside its own: the updates done, and what rounding took off the weights.
UPDATES_DONE, REMAINDER = "bf16_updates", "bf16_remainder"


@dataclass(frozen=True)
class Bf16Update:
    """What --bf16_update and --seed ask for."""

    how: str
    seed: int


def bf16_update(precision: PrecisionOptions, seed: int) -> Bf16Update | None:
    """What the flags of a run ask for; None where weights are fp32."""
    return Bf16Update(precision.bf16_update or BF16_UPDATES[0], seed) if precision.full_bf16 else None


@dataclass(frozen=True)
class Segment:
    """Elements start … stop of a parameter, laid out flat."""

    parameter: nn.Parameter
    start: int
    stop: int

    def of(self, tensor: Tensor) -> Tensor:
        """Those elements of a tensor that has the parameter's shape."""
        return tensor.detach().reshape(-1)[self.start : self.stop]

    def write(self, tensor: Tensor, values: Tensor) -> None:
        """Put values there."""
        if tensor.is_contiguous():
            tensor.detach().view(-1)[self.start : self.stop].copy_(values.view(-1))
        else:  # such a parameter is never cut
            tensor.detach().copy_(values.view(tensor.shape))

    @property
    def is_last(self) -> bool:
        """Whether it ends the parameter."""
        return self.stop == self.parameter.numel()


def with_bf16_update(
    kind: type[torch.optim.Optimizer], by_element: bool, update: Bf16Update, places: Mapping[nn.Parameter, int]
) -> Any:
    """A class that is the optimizer `kind` for bf16 parameters.

    Args:
        by_element: each number's update needs its own gradient and state alone: then parameters are cut, and small ones
            put together; otherwise each is updated as a whole.
        places: of each parameter's first element, among all elements that train on all processes.
    """
    base: Any = kind

    class Rounded(base):
        """The optimizer, on pieces in fp32."""

        param_groups: list[dict[str, Any]]
        elements_at_once = PIECE_ELEMENTS if by_element else None

        @torch.no_grad()
        def step(self, closure: Any = None) -> None:
            """Update every parameter that has a gradient."""
            if closure is not None:
                raise ValueError("with bf16 weights the loss is computed before the step")
            groups = self.param_groups
            try:
                for group in groups:
                    parameters = group["params"]
                    wanted = [one for one in parameters if one.grad is not None]
                    self.param_groups = [group]
                    new = {one for one in wanted if not self.state.get(one)}
                    before = entries(group)
                    try:
                        for piece in list(pieces(wanted, self.state, by_element)):
                            restore(group, before)  # all pieces are of one step
                            self._step_piece(group, piece, piece[0].parameter in new)
                    finally:
                        group["params"] = parameters
            finally:
                self.param_groups = groups
            for parameter in itertools.chain.from_iterable(group["params"] for group in groups):
                if parameter.grad is not None and parameter.numel():  # a process may have no row of it
                    self.state[parameter][UPDATES_DONE] = _done(self.state, parameter) + 1
                    if update.how != "kahan":  # a state of a run with it may have been taken up
                        self.state[parameter].pop(REMAINDER, None)

        def _step_piece(self, group: dict[str, Any], piece: Sequence[Segment], new: bool) -> None:
            """The optimizer's own step on a copy of the piece, and the results back to where they belong."""
            first = piece[0].parameter
            weights = _in_fp32(piece, [segment.parameter for segment in piece])
            if update.how == "kahan" and not new and REMAINDER in self.state[first]:
                weights += _in_fp32(piece, [self.state[one.parameter][REMAINDER] for one in piece])
            proxy = nn.Parameter(weights if by_element else weights.view(first.shape))
            proxy.grad = _in_fp32(piece, [segment.parameter.grad for segment in piece]).view(proxy.shape)
            # The optimizer makes a state where there is none, of each piece of a parameter.
            self.state[proxy] = {} if new else dict(self._loaded(piece, proxy))
            group["params"] = [proxy]
            super().step()
            proxy.grad = None
            self._store(piece, proxy.detach(), self.state.pop(proxy))

        def _loaded(self, piece: Sequence[Segment], proxy: nn.Parameter) -> Iterator[tuple[str, Any]]:
            """The piece's state as the optimizer knows it; its segments have the same counters."""
            first = piece[0].parameter
            for key, value in self.state[first].items():
                if key in _OWN:
                    continue
                if _of_its_shape(value, first):
                    yield key, _in_fp32(piece, [self.state[one.parameter][key] for one in piece]).view(proxy.shape)
                else:
                    yield key, value.clone() if isinstance(value, Tensor) else value

        def _store(self, piece: Sequence[Segment], weights: Tensor, state: Mapping[str, Any]) -> None:
            """Round weights and states into the piece."""
            bits = None
            if update.how != "nearest":
                check_integers(weights.device)
                key = rounding_key(update.seed, _done(self.state, piece[0].parameter))
                bits = RoundingBits(_places(piece, places), key)
            draws = itertools.count()

            def rounded(values: Tensor) -> Tensor:
                flat = values.reshape(-1)
                return flat.bfloat16() if bits is None else stochastic(flat, bits.draw(next(draws)))

            if update.how == "kahan":
                nearest = weights.reshape(-1).bfloat16()
                self._write(piece, REMAINDER, rounded(weights.reshape(-1) - nearest))
                self._write(piece, None, nearest)
            else:
                self._write(piece, None, rounded(weights))
            for name, value in sorted(state.items()):  # their order is another one once a state is taken up
                if _of_its_shape(value, weights):
                    self._write(piece, name, rounded(value))
                    continue
                for segment in piece:
                    if segment.is_last:
                        self.state[segment.parameter][name] = value

        def _write(self, piece: Sequence[Segment], name: str | None, values: Tensor) -> None:
            """Put bf16 values into the state of that name, or into the parameters."""
            parts = values.split([segment.stop - segment.start for segment in piece])
            for segment, part in zip(piece, parts, strict=True):
                target: Tensor = segment.parameter
                if name is not None:
                    own = self.state[segment.parameter]
                    if name not in own or own[name].dtype != torch.bfloat16:
                        own[name] = torch.zeros_like(target, dtype=torch.bfloat16, requires_grad=False)
                    target = own[name]
                segment.write(target, part)

    Rounded.__name__ = Rounded.__qualname__ = kind.__name__
    return Rounded


_OWN = {UPDATES_DONE, REMAINDER}


def pieces(
    parameters: Sequence[nn.Parameter], states: Mapping[nn.Parameter, Mapping[str, Any]], by_element: bool
) -> Iterator[list[Segment]]:
    """The parameters cut and put together into pieces of at most `PIECE_ELEMENTS`, in their order.

    Those of one piece have been updated equally often. Without `by_element` each parameter is a piece.
    """
    piece: list[Segment] = []
    room = PIECE_ELEMENTS
    for parameter in parameters:
        size, start = parameter.numel(), 0
        if not (by_element and parameter.is_contiguous()):
            yield [Segment(parameter, 0, size)]
            continue
        other_count = bool(piece) and _done(states, piece[0].parameter) != _done(states, parameter)
        while start < size:
            if room == 0 or other_count:
                yield piece
                piece, room, other_count = [], PIECE_ELEMENTS, False
            stop = min(size, start + room)
            piece.append(Segment(parameter, start, stop))
            room -= stop - start
            start = stop
    if piece:
        yield piece


def _done(states: Mapping[nn.Parameter, Mapping[str, Any]], parameter: nn.Parameter) -> int:
    return states[parameter].get(UPDATES_DONE, 0) if parameter in states else 0


def _of_its_shape(value: Any, parameter: Tensor) -> bool:
    """Whether a state has a number for each of the parameter's, not one for all or for a row."""
    return (
        isinstance(value, Tensor) and value.is_floating_point() and value.dim() > 0 and value.shape == parameter.shape
    )


def _in_fp32(piece: Sequence[Segment], tensors: Sequence[Tensor | None]) -> Tensor:
    """The piece's elements of tensors of the parameters' shapes, as one flat copy."""
    parts = [segment.of(tensor) for segment, tensor in zip(piece, tensors, strict=True) if tensor is not None]
    return parts[0].to(torch.float32, copy=True) if len(parts) == 1 else torch.cat(parts).float()


def _places(piece: Sequence[Segment], places: Mapping[nn.Parameter, int]) -> Tensor:
    """(N,) int32: where the piece's elements are among all that train."""
    device = piece[0].parameter.device
    runs: list[list[int]] = []  # first place and number, those that follow each other as one
    for segment in piece:
        first, count = places[segment.parameter] + segment.start, segment.stop - segment.start
        if runs and sum(runs[-1]) == first:
            runs[-1][1] += count
        else:
            runs.append([first, count])
    parts = [places_from(first, count, device) for first, count in runs]
    return parts[0] if len(parts) == 1 else torch.cat(parts)
