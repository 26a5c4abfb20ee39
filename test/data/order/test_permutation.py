import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import chisquare

from library.data.order.permutation import ROUNDS, permute


def keys(seed):
    return np.random.default_rng(seed).integers(0, 2**64, ROUNDS, np.uint64)


@given(n=st.integers(1, 3000), seed=st.integers(0, 2**32))
def test_every_number_comes_exactly_once(n, seed):
    assert sorted(permute(np.arange(n), n, keys(seed))) == list(range(n))


@given(n=st.integers(1, 2**62 - 1), seed=st.integers(0, 99), place=st.integers(0, 2**62))
def test_entries_of_a_huge_set_stay_inside_and_apart(n, seed, place):
    places = np.unique([place % n, 0, n - 1])
    sent = permute(places, n, keys(seed))
    assert ((sent >= 0) & (sent < n)).all()
    assert len(set(sent.tolist())) == len(places)


def test_one_entry_is_the_same_as_among_all():
    whole = permute(np.arange(1000), 1000, keys(1))
    assert [int(permute(np.array([place]), 1000, keys(1))[0]) for place in range(1000)] == whole.tolist()


@pytest.mark.parametrize("n", [3, 4, 5, 12, 100])
def test_each_number_goes_everywhere_equally_often(n):
    """Chi-square over many keys, for the first, middle and last number, and for what follows the first."""
    many = np.stack([permute(np.arange(n), n, keys(seed)) for seed in range(3000)])
    for place in {0, n // 2, n - 1}:
        assert chisquare(np.bincount(many[:, place], minlength=n)).pvalue > 1e-4
    distance = (many[:, 1] - many[:, 0]) % n
    assert chisquare(np.bincount(distance, minlength=n)[1:]).pvalue > 1e-4


def test_the_order_shows_no_trace_of_the_original():
    order = permute(np.arange(10_000), 10_000, keys(3))
    assert abs(np.corrcoef(order, np.arange(10_000))[0, 1]) < 0.05
    assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.05
