import numpy as np
import pytest

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.order import bucket_rows as bucket_rows_module
from library.data.order.bucket_rows import bucket_rows
from library.data.order.buckets import assign_buckets
from library.errors import InputError
from library.options.buckets import BucketOptions

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


@pytest.mark.parametrize(
    "options",
    [OPTIONS, BucketOptions((48, 48)), BucketOptions((64, 64), True, bucket_no_upscale=True, bucket_reso_steps=8)],
)
def test_what_is_cropped_away_and_scaled_up_is_counted_image_by_image(index, options):
    buckets = bucket_rows(index, [options])
    cropped, upscaled, names = [], 0, []
    for bucket, rows in all_rows(buckets).items():
        width, height = buckets.size(bucket)
        shares = []
        for row in rows:
            size = int(index.record(row)["width"]), int(index.record(row)["height"])
            scaled = buckets.fit(bucket, *size).scaled_wh_px
            shares.append(1 - width * height / (scaled[0] * scaled[1]))
            if scaled[0] > size[0] or scaled[1] > size[1]:
                upscaled += 1
                names.append(index.name(row))
        assert buckets.mean_cropped_K[bucket] == pytest.approx(np.mean(shares))
        cropped += shares
    assert buckets.mean_cropped == pytest.approx(np.mean(cropped))
    assert buckets.upscaled_K.sum() == upscaled
    assert len(buckets.upscaled_names) == min(upscaled, 5)
    assert set(buckets.upscaled_names) <= set(names)
    assert (upscaled == 0) == options.bucket_no_upscale
