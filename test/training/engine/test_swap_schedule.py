"""Which blocks are swapped, and which is wanted when: plain functions."""

import pytest

from library.training.engine.swap_schedule import choose_blocks, largest_together, next_wanted


def test_the_largest_blocks_are_chosen_and_of_like_ones_those_that_lie_apart():
    sizes = [10, 5, 20, 5, 20, 5, 20, 5, 20, 30]
    assert choose_blocks(sizes, 1) == [9]
    assert choose_blocks(sizes, 3) == [2, 6, 9]
    assert choose_blocks(sizes, 6) == [0, 2, 4, 6, 8, 9]
    assert choose_blocks(sizes, 8) == [0, 1, 2, 4, 5, 6, 8, 9]
    assert choose_blocks(sizes, 10) == list(range(10))


@pytest.mark.parametrize("count", [1, 2, 5])
def test_each_block_is_on_its_way_before_it_computes_and_no_other(count):
    """A pass as the hooks walk it: forward up, backward down; what is fetched beyond the one that computes is one."""
    forward = [next_wanted(place, count, in_backward=False, backward_follows=True) for place in range(count)]
    assert forward == [*range(1, count), count - 1]
    backward = [next_wanted(place, count, in_backward=True) for place in reversed(range(count))]
    assert backward == [*reversed(range(count - 1)), None]
    assert next_wanted(count - 1, count, in_backward=False) is None  # no backward: sample pictures, validation


def test_two_that_follow_each_other_are_there_together():
    assert largest_together([]) == 0
    assert largest_together([7]) == 7
    assert largest_together([5, 1, 4, 3, 6]) == 9
