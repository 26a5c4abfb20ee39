"""Regularisation images: as many samples an epoch as of the images that they stand beside, spread over all."""

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from library.data.order.regularisation import balanced


@given(st.data())
def test_each_data_set_shows_as_many_of_both_and_every_cell_gets_its_share(data):
    sources, buckets = data.draw(st.tuples(st.integers(1, 6), st.integers(1, 4)))
    cells = st.lists(st.integers(0, 50), min_size=buckets, max_size=buckets)
    samples_SK = np.array(data.draw(st.lists(cells, min_size=sources, max_size=sources)), np.int32)
    is_reg_S = np.array(data.draw(st.lists(st.booleans(), min_size=sources, max_size=sources)))
    dataset_S = np.array(data.draw(st.lists(st.integers(0, 2), min_size=sources, max_size=sources)))
    for dataset in set(dataset_S[is_reg_S].tolist()):
        assume(samples_SK[is_reg_S & (dataset_S == dataset)].any())
    result_SK = balanced(samples_SK, is_reg_S, dataset_S)
    assert (result_SK[~is_reg_S] == samples_SK[~is_reg_S]).all()
    for dataset in set(dataset_S[is_reg_S].tolist()):
        reg_S = is_reg_S & (dataset_S == dataset)
        trained = samples_SK[~is_reg_S & (dataset_S == dataset)].sum()
        assert result_SK[reg_S].sum() == trained
        share_SK = samples_SK[reg_S] * trained / samples_SK[reg_S].sum()
        assert (abs(result_SK[reg_S] - share_SK) < 1).all()


def test_large_sets_do_not_overflow():
    samples_SK = np.array([[2_000_000_000, 1_500_000_000], [2_000_000_000, 1_000_000_000]])
    result_SK = balanced(samples_SK, np.array([False, True]), np.zeros(2, int))
    assert result_SK[1].sum() == 3_500_000_000
    assert result_SK[1] == pytest.approx([3_500_000_000 * 2 / 3, 3_500_000_000 / 3])
