from collections import Counter

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from library.data.plan import Plan
from library.errors import InputError


@st.composite
def plans(draw):
    """A plan over a few buckets, with or without repeats, and its ingredients."""
    buckets = np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=40)))
    repeats = np.array(draw(st.lists(st.integers(1, 3), min_size=len(buckets), max_size=len(buckets))))
    if draw(st.booleans()):
        repeats[:] = draw(st.integers(1, 2))
    largest = int(np.bincount(buckets, repeats).max())
    return Plan(buckets, repeats, draw(st.integers(0, 2**64 - 1)), draw(st.integers(1, largest))), buckets, repeats


@settings(max_examples=60, deadline=None)
@given(plans())
def test_every_pass_shows_each_sample_as_often_as_it_is_repeated(drawn):
    """All batches of as many epochs as a batch has samples: then no bucket has anything left over."""
    plan, buckets, repeats = drawn
    epochs = min(plan.global_batch, 6)
    steps = plan.steps_before_epoch(epochs)
    by_bucket = {}
    for step in range(steps):
        batch = plan.batch_of_step(step)
        assert len(batch.rows_G) == plan.global_batch
        assert set(buckets[batch.rows_G]) == {batch.bucket}
        by_bucket.setdefault(batch.bucket, Counter()).update(batch.rows_G.tolist())
    for bucket in set(buckets.tolist()):
        rows = np.flatnonzero(buckets == bucket)
        left = int(plan.left_over(epochs - 1)[bucket])
        assert 0 <= left < plan.global_batch
        seen = by_bucket.get(bucket, Counter())
        assert sum(seen.values()) + left == epochs * repeats[rows].sum()
        for row in rows:  # what is left over is the end of the last pass or passes
            whole_passes = epochs - -(-left // int(repeats[rows].sum()))
            assert whole_passes * repeats[row] <= seen[row] <= epochs * repeats[row]


@settings(max_examples=60, deadline=None)
@given(plans())
def test_epochs_and_steps_agree(drawn):
    plan, _, _ = drawn
    starts = [plan.steps_before_epoch(epoch) for epoch in range(8)]
    assert starts[0] == 0
    for step in range(starts[-1]):
        epoch = plan.epoch_of_step(step)
        assert starts[epoch] <= step < starts[epoch + 1]
        assert plan.batch_of_step(step).epoch == epoch


def test_one_epoch_without_rest_shows_each_sample_once():
    buckets = np.repeat([0, 1, 2], [8, 16, 4])
    plan = Plan(buckets, 1, seed=5, global_batch=4)
    assert plan.steps_before_epoch(1) == 7
    first = np.concatenate([plan.batch(step) for step in range(7)])
    second = np.concatenate([plan.batch(step) for step in range(7, 14)])
    assert sorted(first) == sorted(second) == list(range(28))
    assert first.tolist() != second.tolist()
    # Buckets come mixed, not one after the other.
    orders = {tuple(plan.batch_of_step(step).bucket for step in range(7 * e, 7 * e + 7)) for e in range(20)}
    assert len(orders) > 10


def test_each_pass_puts_other_samples_together():
    plan = Plan(np.zeros(40, int), 1, seed=5, global_batch=4)
    together = [{frozenset(plan.batch(step).tolist()) for step in range(10 * e, 10 * e + 10)} for e in range(3)]
    assert not together[0] & together[1] & together[2]


def test_what_is_left_over_comes_in_the_next_epoch():
    """10 samples in batches of 4: 2, 3, 2, 3 … batches; the third batch finishes the first pass."""
    plan = Plan(np.zeros(10, int), 1, seed=0, global_batch=4)
    assert [plan.steps_before_epoch(epoch) for epoch in range(5)] == [0, 2, 5, 7, 10]
    assert plan.left_over(0).tolist() == [2]
    assert plan.left_over(1).tolist() == [0]
    shown = Counter(np.concatenate([plan.batch(step) for step in range(5)]).tolist())
    assert set(shown.values()) == {2}
    first = set(np.concatenate([plan.batch(step) for step in range(2)]).tolist())
    assert len(first) == 8


def test_a_batch_larger_than_a_bucket_comes_every_few_epochs():
    plan = Plan(np.array([0] * 10 + [1] * 3), 1, seed=0, global_batch=5)
    assert plan.batches_in_epoch(0).tolist() == [2, 0]
    assert plan.batches_in_epoch(1).tolist() == [2, 1]
    rows = Counter(np.concatenate([plan.batch(step) for step in range(plan.steps_before_epoch(5))]).tolist())
    assert set(rows.values()) == {5}


def test_the_seed_and_nothing_else_chooses_the_order():
    buckets = np.arange(100) % 3
    one, same, other = (Plan(buckets, 1, seed, 8) for seed in (1, 1, 2))
    assert all((one.batch(step) == same.batch(step)).all() for step in (0, 1, 37, 5_000))
    assert any((one.batch(step) != other.batch(step)).any() for step in range(3))
    # Asking for a step does not depend on what was asked before.
    assert (Plan(buckets, 1, 1, 8).batch(5_000) == one.batch(5_000)).all()


def test_any_step_of_a_long_run_is_reached_at_once():
    plan = Plan(np.arange(1000) % 7, 3, seed=1, global_batch=16)
    step = 10**12
    assert plan.batch(step).shape == (16,)
    assert plan.steps_before_epoch(plan.epoch_of_step(step)) <= step


def test_a_set_smaller_than_a_batch_is_an_error_with_ways_out():
    with pytest.raises(InputError, match=r"7 images .* too few for one batch of 8 .*--train_batch_size.*accumulation"):
        Plan(np.zeros(7, int), 1, 0, 8)
    Plan(np.zeros(4, int), 2, 0, 8)  # repeats count


def test_buckets_that_are_all_smaller_than_a_batch_are_an_error():
    with pytest.raises(InputError, match=r"largest has 5.*none fills one of 8.*--bucket_reso_steps"):
        Plan(np.repeat([0, 1], 5), 1, 0, 8)
