import numpy as np
import pytest

from library.data import bucket_rows as bucket_rows_module
from library.data.bucket_rows import bucket_rows
from library.data.buckets import BucketOptions, assign_buckets
from library.data.index import build_index
from library.data.sources import Subset
from library.errors import InputError

OPTIONS = BucketOptions((32, 32), True, 16, 64, 8)
SHAPES = [(40, 30), (30, 40), (32, 32), (64, 24), (50, 50), (31, 42)]


@pytest.fixture
def index(tmp_path, make_shard):
    make_shard(tmp_path, 0, SHAPES)
    make_shard(tmp_path, 1, [(64, 16), *SHAPES[::-1]])
    return build_index([Subset(tmp_path, ".txt")])


def all_rows(buckets):
    """{bucket: its rows}, source by source."""
    found = {}
    for bucket in range(len(buckets.sizes_K2)):
        parts = [
            buckets.rows(bucket, source, np.arange(count)) for source, count in enumerate(buckets.images_SK[:, bucket])
        ]
        found[bucket] = np.concatenate(parts).tolist()
    return found


def test_they_are_those_of_all_sizes_at_once(index):
    """Shard by shard, or the whole table in one go: the same buckets, the same rows, the same error."""
    sizes = np.array([[int(index.record(row)[side]) for side in ("width", "height")] for row in range(len(index))])
    whole = assign_buckets(sizes, OPTIONS)
    buckets = bucket_rows(index, [OPTIONS])
    assert buckets.sizes_K2.tolist() == whole.sizes_K2.tolist()
    assert buckets.images_K.tolist() == np.bincount(whole.bucket_of_row).tolist()
    assert all_rows(buckets) == {
        bucket: np.flatnonzero(whole.bucket_of_row == bucket).tolist() for bucket in range(len(whole.sizes_K2))
    }
    assert buckets.mean_error_K == pytest.approx(whole.error_K / buckets.images_K)
    assert buckets.mean_error == pytest.approx(whole.error_K.sum() / 13)
    assert buckets.fit(0, 100, 30).scaled_wh_px[1] >= buckets.size(0)[1]


def test_a_second_start_sorts_nothing_and_other_options_leave_the_first_table_there(index, monkeypatch):
    sorted_ = []
    assign = bucket_rows_module.assign_buckets
    monkeypatch.setattr(
        bucket_rows_module, "assign_buckets", lambda *rest: sorted_.append(rest[1].resolution) or assign(*rest)
    )
    first = bucket_rows(index, [OPTIONS])
    assert all_rows(bucket_rows(index, [OPTIONS])) == all_rows(first)
    assert len(sorted_) == 2  # one a shard
    bucket_rows(index, [BucketOptions((64, 64))])
    bucket_rows(index, [OPTIONS])
    assert len(sorted_) == 4


def test_only_a_changed_shard_is_sorted_again(tmp_path, index, make_shard, monkeypatch):
    bucket_rows(index, [OPTIONS])
    sorted_ = []
    assign = bucket_rows_module.assign_buckets
    monkeypatch.setattr(bucket_rows_module, "assign_buckets", lambda *rest: sorted_.append(1) or assign(*rest))
    make_shard(tmp_path, 0, [(64, 16)])
    buckets = bucket_rows(build_index([Subset(tmp_path, ".txt")]), [OPTIONS])
    assert len(sorted_) == 1
    assert buckets.images_K.sum() == 8


def test_subsets_of_equal_options_share_buckets_and_others_do_not(tmp_path, make_shard):
    for name in ("a", "b", "c"):
        (tmp_path / name).mkdir()
        make_shard(tmp_path / name, 0, [(32, 32), (32, 32)])
    index = build_index([Subset(tmp_path / name, ".txt") for name in ("a", "b", "c")])
    other = BucketOptions((32, 32))
    buckets = bucket_rows(index, [OPTIONS, other, OPTIONS])
    assert all_rows(buckets) == {0: [0, 1, 4, 5], 1: [2, 3]}
    assert buckets.sizes_K2.tolist() == [[32, 32], [32, 32]]
    assert [buckets.options[number] for number in buckets.options_K] == [OPTIONS, other]


def test_a_picture_too_small_for_its_bucket_is_named(tmp_path, make_shard):
    make_shard(tmp_path, 0, [(64, 64), (300, 7)])
    index = build_index([Subset(tmp_path, ".txt")])
    with pytest.raises(InputError, match=r"00000\.tar:000000001 \(300×7\)"):
        bucket_rows(index, [BucketOptions((64, 64), True, bucket_reso_steps=8, bucket_no_upscale=True)])
