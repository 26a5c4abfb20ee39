"""What is said of the data before training."""

import pytest

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.report import caption_line, data_report
from library.data.sample.captions import CaptionChanges
from library.options.buckets import BucketOptions


@pytest.fixture
def index(tmp_path, make_shard):
    make_shard(tmp_path, 0, [(32, 32)] * 4 + [(20, 20), (64, 32)])
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (tmp_path / "broken.txt").write_text("a caption")
    return build_index([Subset(tmp_path, ".txt")], use_cache=False)


def words(captions):
    return [len(caption.split()) for caption in captions]


def test_upscaled_and_dropped_images_are_counted_and_named(index):
    buckets = bucket_rows(index, [BucketOptions((32, 32))])
    lines = data_report(index, buckets, Plan(buckets, repeated(buckets.images_SK, index.repeats_S), 0, 2))
    (upscaled,) = [line for line in lines if line.startswith("upscaled images: ")]
    assert upscaled.startswith("upscaled images: 1 of 6 (16.7%): ") and upscaled.endswith("00000.tar:000000004")
    (dropped,) = [line for line in lines if line.startswith("dropped images: ")]
    assert dropped.startswith("dropped images: 1 of 7: ") and "broken.png" in dropped and "UnidentifiedImage" in dropped
    (bucket,) = [line for line in lines if line.startswith("bucket 0: ")]
    assert bucket.endswith("cropped away: 8.3%")  # half of one image of six


def test_captions_that_are_cut_are_counted_with_their_prefix(index):
    """Each is "picture 0, place N, 32 by 32": seven words."""
    line = caption_line(index, [CaptionChanges()], words, 7)
    assert line == "captions cut to 7 tokens: none of 6, the longest has 7"
    options = CaptionChanges(caption_prefix="a good", caption_dropout_rate=1.0, caption_tag_dropout_rate=1.0)
    line = caption_line(index, [options], words, 8)
    assert line.startswith("captions cut to 8 tokens: 6 of 6 (100.0%), the longest has 9: ")
    assert "; and 3 more. " in line and line.count("00000.tar:") == 3


def test_only_some_captions_are_read_of_many(index, monkeypatch):
    monkeypatch.setattr("library.data.report._MOST_CAPTIONS", 3)
    assert "none of 3 looked at" in caption_line(index, [CaptionChanges()], words, 7)
