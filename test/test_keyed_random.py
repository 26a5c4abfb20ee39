"""Random numbers depend on what they are for and on nothing else."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from library.diffusion.random_draws import normal, timesteps
from library.keyed_random import Stream, generator


def test_the_same_key_gives_the_same_numbers_whatever_was_drawn_before():
    first = generator(1, Stream.NOISE, 5, 3).standard_normal(8)
    generator(1, Stream.NOISE, 5, 2).standard_normal(1000)
    assert np.array_equal(first, generator(1, Stream.NOISE, 5, 3).standard_normal(8))


@given(
    st.lists(
        st.tuples(st.integers(0, 2**64 - 1), st.sampled_from(Stream), st.integers(0, 10**9), st.integers(0, 10**6)),
        min_size=2,
        max_size=4,
        unique=True,
    )
)
def test_different_keys_give_different_numbers(keys):
    drawn = {generator(*key).bytes(16) for key in keys}
    assert len(drawn) == len(keys)


def test_long_draws_of_neighbouring_places_do_not_overlap():
    rows = [set(generator(0, Stream.NOISE, 7, place).integers(2**63, size=10_000).tolist()) for place in range(4)]
    assert len(set.union(*rows)) == 40_000


def test_noise_of_a_slice_is_the_slice_of_the_noise():
    whole = normal(3, Stream.NOISE, 11, range(6), (4, 5, 7))
    parts = [normal(3, Stream.NOISE, 11, places, (4, 5, 7)) for places in ([0, 1], [2, 3, 4], [5])]
    assert all(np.array_equal(a, b) for a, b in zip(whole, np.concatenate(parts), strict=True))


def test_noise_is_standard_normal_and_timesteps_are_uniform():
    noise = normal(0, Stream.NOISE, 0, range(64), (4, 32, 32)).numpy()
    assert abs(noise.mean()) < 5 / noise.size**0.5
    assert abs(noise.std() - 1) < 0.01
    t = np.concatenate([timesteps(0, step, range(100), 1000).numpy() for step in range(100)])
    assert t.min() >= 0 and t.max() <= 999
    counts = np.histogram(t, bins=10, range=(0, 1000))[0]
    assert np.all(np.abs(counts - 1000) < 5 * 30)  # five standard deviations of a binomial count of 1000


def test_counters_and_seed_are_checked():
    with pytest.raises(ValueError, match="three counters"):
        generator(0, Stream.NOISE, 1, 2, 3, 4)
    with pytest.raises(ValueError, match="seed must lie"):
        generator(-1, Stream.NOISE)
