"""Which blocks are swapped, and which of them is wanted next: pure functions of sizes and places."""

import itertools
from collections.abc import Sequence


def choose_blocks(sizes: Sequence[int], count: int) -> list[int]:
    """The numbers of the `count` largest blocks, in order.

    Of blocks of one size those are taken that lie evenly apart, so that what computes between them gives a transfer
    time.

    Args:
        sizes: bytes of each block's weights, in the order in which they compute.
    """
    chosen: list[int] = []
    for size in sorted(set(sizes), reverse=True):
        alike = [number for number, other in enumerate(sizes) if other == size]
        taken = min(count - len(chosen), len(alike))
        chosen += [alike[place * len(alike) // taken] for place in range(taken)]
    return sorted(chosen)


def next_wanted(place: int, count: int, in_backward: bool, backward_follows: bool = False) -> int | None:
    """The place, among `count` swapped blocks, of the one that computes after that at `place`; None if none does.

    Forward runs from 0 up. Where backward follows it runs down again, so the last one is wanted twice in a row.
    """
    if in_backward:
        return place - 1 if place else None
    if place + 1 < count:
        return place + 1
    return place if backward_follows else None


def largest_together(sizes: Sequence[int]) -> int:
    """Bytes of two swapped blocks that follow each other, at most: one computes, the other is on its way."""
    pairs = itertools.pairwise(sizes)
    return max((one + other for one, other in pairs), default=sum(sizes))
