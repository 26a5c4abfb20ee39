import time
from collections import Counter

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from library.data.order.plan import Plan, repeated
from library.errors import InputError


class Rows:
    """Rows in buckets and sources, given one by one: row r is in bucket buckets[r] and source sources[r], ascending."""

    def __init__(self, buckets, sources=None):
        self.buckets = np.asarray(buckets)
        self.sources = np.zeros(len(self.buckets), int) if sources is None else np.asarray(sources)
        counts = Counter(zip(self.sources.tolist(), self.buckets.tolist(), strict=True))
        self.images_SK = np.zeros((self.sources.max() + 1, self.buckets.max() + 1), np.int32)
        for (source, bucket), count in counts.items():
            self.images_SK[source, bucket] = count

    def rows(self, bucket, source, places_n):
        return np.flatnonzero((self.buckets == bucket) & (self.sources == source))[places_n]


def make_plan(rows, repeats, *others, **options):
    return Plan(rows, repeated(rows.images_SK, repeats), *others, **options)


def plan_of(buckets, repeats, seed, batch_size, micro_batches=1):
    return make_plan(Rows(buckets), repeats, seed, batch_size, micro_batches)


def micro_batches_of(plan, steps):
    """All micro-batches of some steps, in the order of the run."""
    return [plan.micro_batch(step, number) for step in steps for number in range(plan.micro_batches)]


@st.composite
def plans(draw):
    """A plan over a few buckets and sources, with or without repeats and windows, and its ingredients."""
    buckets = np.array(draw(st.lists(st.integers(0, 3), min_size=1, max_size=40)))
    sources = np.sort(draw(st.lists(st.integers(0, 6), min_size=len(buckets), max_size=len(buckets))))
    repeats_S = np.array(draw(st.lists(st.integers(1, 3), min_size=7, max_size=7)))[: sources.max() + 1]
    if draw(st.booleans()):
        repeats_S[:] = draw(st.integers(1, 2))
    repeats = repeats_S[sources]
    samples_K = np.bincount(buckets, repeats).astype(int)
    seed, batch, window = draw(
        st.tuples(st.integers(0, 2**64 - 1), st.integers(1, int(samples_K.max())), st.integers(0, 8))
    )
    micro_batches = draw(st.integers(1, min(8, int((samples_K // batch).sum()))))
    return make_plan(Rows(buckets, sources), repeats_S, seed, batch, micro_batches, window), buckets, repeats


@settings(max_examples=100, deadline=None)
@given(plans())
def test_every_pass_shows_each_sample_as_often_as_it_is_repeated(drawn):
    """Over some epochs; what waits in the end is less than a micro-batch in each bucket, and fewer than a step has."""
    plan, buckets, repeats = drawn
    epochs = min(plan.global_batch, 6)
    steps = plan.steps_before_epoch(epochs)
    by_bucket = {}
    shown = micro_batches_of(plan, range(steps))
    carried = plan.carried_over(epochs - 1)
    assert 0 <= carried < plan.micro_batches
    waiting = micro_batches_of(plan, [steps])[:carried]
    for batch in shown + waiting:
        assert len(batch.rows_B) == plan.batch_size
        assert set(buckets[batch.rows_B]) == {batch.bucket}
        by_bucket.setdefault(batch.bucket, Counter()).update(batch.rows_B.tolist())
    for bucket in set(buckets.tolist()):
        rows = np.flatnonzero(buckets == bucket)
        left = int(plan.left_over(epochs - 1)[bucket])
        assert 0 <= left < plan.batch_size
        seen = by_bucket.get(bucket, Counter())
        assert sum(seen.values()) + left == epochs * repeats[rows].sum()
        for row in rows:  # what is left over is the end of the last pass or passes
            whole_passes = epochs - -(-left // int(repeats[rows].sum()))
            assert whole_passes * repeats[row] <= seen[row] <= epochs * repeats[row]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 12)), min_size=1, max_size=5), st.integers(0, 3))
def test_samples_of_a_source_are_spread_evenly_over_its_images(cells, window):
    """Sources of so many images and samples in one bucket: in a pass each image comes n / m times, down or up."""
    images, samples = (np.array(numbers) for numbers in zip(*((m, n if m else 0) for m, n in cells), strict=True))
    assume(samples.sum())
    sources = np.repeat(np.arange(len(images)), images)
    rows = Rows(np.zeros(len(sources), int), sources)
    plan = Plan(rows, samples[: sources.max() + 1, None], 1, 1, window_sources=window)
    shown = Counter(int(plan.batch(step)[0]) for step in range(plan.steps_before_epoch(1)))
    for source, (m, n) in enumerate(zip(images.tolist(), samples.tolist(), strict=True)):
        counts = [shown[row] for row in np.flatnonzero(sources == source).tolist()]
        assert sum(counts) == n
        assert all(n // m <= count <= -(-n // m) for count in counts)


@settings(max_examples=60, deadline=None)
@given(plans())
def test_epochs_and_steps_agree(drawn):
    plan, _, _ = drawn
    starts = [plan.steps_before_epoch(epoch) for epoch in range(8)]
    assert starts[0] == 0
    for step in range(starts[-1]):
        epoch = plan.epoch_of_step(step)
        assert starts[epoch] <= step < starts[epoch + 1]
        assert plan.micro_batch(step, 0).epoch == epoch


@settings(max_examples=60, deadline=None)
@given(plans(), st.sampled_from([1, 2, 3, 4, 8]), st.data())
def test_a_ranks_micro_batches_are_the_batch_at_its_places(drawn, ranks, data):
    """Rank r asks for its own only, in any order of steps, and gets what the whole batch has there."""
    plan, buckets, _ = drawn
    steps = data.draw(st.lists(st.integers(0, 3 * plan.steps_before_epoch(1)), min_size=1, max_size=6))
    for step in steps:
        whole = plan.batch(step).reshape(plan.micro_batches, plan.batch_size)
        for rank in range(ranks):
            for number in range(rank, plan.micro_batches, ranks):
                own = plan.micro_batch(step, number)
                assert own.rows_B.tolist() == whole[number].tolist()
                assert set(buckets[own.rows_B]) == {own.bucket}


def test_one_epoch_without_rest_shows_each_sample_once():
    buckets = np.repeat([0, 1, 2], [8, 16, 4])
    plan = plan_of(buckets, 1, seed=5, batch_size=4)
    assert plan.steps_before_epoch(1) == 7
    first = np.concatenate([plan.batch(step) for step in range(7)])
    second = np.concatenate([plan.batch(step) for step in range(7, 14)])
    assert sorted(first) == sorted(second) == list(range(28))
    assert first.tolist() != second.tolist()
    # Buckets come mixed, not one after the other.
    orders = {tuple(plan.micro_batch(step, 0).bucket for step in range(7 * e, 7 * e + 7)) for e in range(20)}
    assert len(orders) > 10


def test_each_pass_puts_other_samples_together():
    plan = plan_of(np.zeros(40, int), 1, seed=5, batch_size=4)
    together = [{frozenset(plan.batch(step).tolist()) for step in range(10 * e, 10 * e + 10)} for e in range(3)]
    assert not together[0] & together[1] & together[2]


def test_what_is_left_over_comes_in_the_next_epoch():
    """10 samples in batches of 4: 2, 3, 2, 3 … batches; the third batch finishes the first pass."""
    plan = plan_of(np.zeros(10, int), 1, seed=0, batch_size=4)
    assert [plan.steps_before_epoch(epoch) for epoch in range(5)] == [0, 2, 5, 7, 10]
    assert plan.left_over(0).tolist() == [2]
    assert plan.left_over(1).tolist() == [0]
    shown = Counter(np.concatenate([plan.batch(step) for step in range(5)]).tolist())
    assert set(shown.values()) == {2}
    first = set(np.concatenate([plan.batch(step) for step in range(2)]).tolist())
    assert len(first) == 8


def test_a_batch_larger_than_a_bucket_comes_every_few_epochs():
    plan = plan_of(np.array([0] * 10 + [1] * 3), 1, seed=0, batch_size=5)
    assert plan.micro_batches_in_pass(0).tolist() == [2, 0]
    assert plan.micro_batches_in_pass(1).tolist() == [2, 1]
    rows = Counter(np.concatenate([plan.batch(step) for step in range(plan.steps_before_epoch(5))]).tolist())
    assert set(rows.values()) == {5}


def test_the_seed_and_nothing_else_chooses_the_order():
    buckets, sources = np.arange(100) % 3, np.arange(100) // 9
    for window in (0, 2):
        one, same, other = (make_plan(Rows(buckets, sources), 1, seed, 4, 2, window) for seed in (1, 1, 2))
        assert all((one.batch(step) == same.batch(step)).all() for step in (0, 1, 37, 5_000))
        assert any((one.batch(step) != other.batch(step)).any() for step in range(3))
        # Asking for a step does not depend on what was asked before.
        assert (make_plan(Rows(buckets, sources), 1, 1, 4, 2, window).batch(5_000) == one.batch(5_000)).all()


def test_the_order_without_windows_is_the_contract_of_resuming():
    """Written down from an earlier version: a run that was begun with it goes on in the same order."""
    plan = plan_of(np.arange(30) % 3, 2, seed=7, batch_size=4)
    assert [plan.batch(step).tolist() for step in (0, 1, 16)] == [[21, 6, 6, 27], [19, 13, 1, 22], [2, 23, 14, 11]]


def test_any_step_of_a_long_run_is_reached_at_once():
    plan = make_plan(
        Rows(np.arange(1000) % 7, np.arange(1000) // 10), 3, seed=1, batch_size=4, micro_batches=4, window_sources=4
    )
    step = 10**12
    began = time.process_time()
    assert plan.batch(step).shape == (16,)
    assert plan.steps_before_epoch(plan.epoch_of_step(step)) <= step
    assert time.process_time() - began < 1


class Billions:
    """4 billion rows in 40,000 sources and 30 buckets, of which nothing is written down."""

    images_SK = np.random.default_rng(0).integers(3000, 3700, (40_000, 30), dtype=np.int32)

    def rows(self, bucket, source, places_n):
        return places_n + 1_000_000 * bucket + 100_000_000 * source


def test_a_plan_over_billions_is_as_small_and_quick_as_its_shards():
    rows = Billions()
    began = time.process_time()
    plan = make_plan(rows, 1, 1, 8, 256, window_sources=64)
    for step in (0, 10**6, 1_999_999, 10**8):
        batch = plan.micro_batch(step, 255)
        assert set((batch.rows_B // 1_000_000 % 100).tolist()) == {batch.bucket}
        assert (batch.rows_B % 1_000_000 < 3700).all()
    assert time.process_time() - began < 3
    kept = sum(array.nbytes for arrays in plan._passes.values() for array in arrays)
    assert kept < 3e6


class TestWindows:
    """20 sources with 30 rows each in 3 buckets, read four sources at a time."""

    SOURCES = np.repeat(np.arange(20), 30)
    BUCKETS = np.arange(600) % 3

    def plan(self, window=4, batch=5, seed=3):
        return make_plan(Rows(self.BUCKETS, self.SOURCES), 1, seed, batch, window_sources=window)

    def windows(self, plan, first_step):
        """The sets of sources that an epoch's five times 24 batches show."""
        return [
            {source for step in range(start, start + 24) for source in self.SOURCES[plan.batch(step)].tolist()}
            for start in range(first_step, first_step + 120, 24)
        ]

    def test_the_sources_of_a_window_come_together_and_each_window_once(self):
        plan = self.plan()
        assert [plan.steps_before_epoch(epoch) for epoch in range(3)] == [0, 120, 240]
        first, second = self.windows(plan, 0), self.windows(plan, 120)
        for windows in (first, second):
            assert [len(window) for window in windows] == [4] * 5
            assert set.union(*windows) == set(range(20))
        assert first != second

    def test_batches_mix_the_sources_and_the_buckets_of_a_window(self):
        plan = self.plan()
        mixed = [len(set(self.SOURCES[plan.batch(step)].tolist())) for step in range(24)]
        assert np.mean(mixed) > 2.4  # five of four sources at random: 3.05
        buckets = [plan.micro_batch(step, 0).bucket for step in range(24)]
        assert buckets != sorted(buckets)

    def test_a_batch_that_windows_do_not_fill_reaches_into_the_next(self):
        plan = self.plan(batch=7)
        steps = plan.steps_before_epoch(1)
        seen = Counter(np.concatenate([plan.batch(step) for step in range(steps)]).tolist())
        assert set(seen.values()) == {1}
        assert len(seen) == 600 - plan.left_over(0).sum()

    def test_the_sources_of_a_batch_are_known_without_its_rows(self):
        plan = self.plan()
        for step in (0, 50, 119, 500):
            assert plan.sources_of_batch(step).tolist() == self.SOURCES[plan.batch(step)].tolist()

    def test_a_window_of_all_sources_is_none(self):
        none = self.plan(window=0)
        for window in (20, 100):
            plan = self.plan(window=window)
            assert all((plan.batch(step) == none.batch(step)).all() for step in (0, 50, 119, 500))


def test_all_rows_of_a_bucket_are_found_one_by_one():
    rows = Rows(np.arange(50) % 3, np.arange(50) // 7)
    plan = make_plan(rows, 2, 1, 4)
    found = plan.rows_of_bucket(1, np.arange(8))
    assert found[np.arange(len(found))].tolist() == list(range(1, 50, 3))
    assert found[np.array([3, 0])].tolist() == [10, 1]
    found = plan.rows_of_bucket(1, np.array([2, 5]))
    assert found[np.arange(len(found))].tolist() == [16, 19, 37, 40]


def test_a_set_smaller_than_a_batch_is_an_error_with_ways_out():
    with pytest.raises(InputError, match=r"7 images .* too few for one batch of 8 .*--train_batch_size.*accumulation"):
        plan_of(np.zeros(7, int), 1, 0, 8)
    plan_of(np.zeros(4, int), 2, 0, 8)  # repeats count


def test_buckets_that_are_all_smaller_than_a_batch_are_an_error():
    with pytest.raises(InputError, match=r"largest has 5.*fill 0 times .*batch size, 8.*--bucket_reso_steps"):
        plan_of(np.repeat([0, 1], 5), 1, 0, 8)
    with pytest.raises(InputError, match=r"10 images .*fill 2 times .*batch size, 3, and a step takes 3"):
        plan_of(np.repeat([0, 1], 5), 1, 0, 3, 3)


NINE_BUCKETS = np.repeat(np.arange(9), [6, 5, 4, 3, 2, 2, 1, 1, 1])  # 25 pictures


@pytest.mark.parametrize(("batch_size", "micro_batches"), [(1, 8), (2, 4), (1, 16), (2, 8)])
def test_25_pictures_in_9_buckets_are_all_shown_at_a_global_batch_of_8_and_16(batch_size, micro_batches):
    """Two passes fill a pair in each bucket; a step holds as many samples as it should, of several buckets."""
    plan = plan_of(NINE_BUCKETS, 1, 3, batch_size, micro_batches)
    until = 25 * batch_size // (batch_size * micro_batches) + 1  # steps
    shown = Counter(np.concatenate([plan.batch(step) for step in range(until)]).tolist())
    assert set(shown) == set(range(25))
    assert max(len({batch.bucket for batch in micro_batches_of(plan, [step])}) for step in range(until)) > 1
    many = Counter(np.concatenate([plan.batch(step) for step in range(plan.steps_before_epoch(40))]).tolist())
    assert set(many.values()) <= {38, 39, 40}


def test_micro_batches_that_do_not_fill_a_step_come_in_the_next_epochs_first_one():
    """25 of one picture each, 8 a step: 3, 6, 9, 12 and 15 steps, and then one more from what was carried over."""
    plan = plan_of(NINE_BUCKETS, 1, 3, 1, 8)
    assert [plan.steps_before_epoch(epoch) for epoch in range(9)] == [0, 3, 6, 9, 12, 15, 18, 21, 25]
    assert [plan.carried_over(epoch) for epoch in range(8)] == [1, 2, 3, 4, 5, 6, 7, 0]
    run = np.concatenate([plan.batch(step) for step in range(25)]).reshape(8, 25)  # each pass beside the others
    assert all(sorted(one) == list(range(25)) for one in run.tolist())
    assert len({tuple(one) for one in run.tolist()}) == 8


def test_how_many_micro_batches_a_step_has_does_not_change_their_sequence():
    """So that another number of devices goes on with the same samples, only in other steps."""
    run = [plan_of(NINE_BUCKETS, 1, 3, 2, micro_batches) for micro_batches in (1, 2, 4, 8)]
    rows = [np.concatenate([plan.batch(step) for step in range(40 // plan.micro_batches)]).tolist() for plan in run]
    assert all(one == rows[0] for one in rows)
