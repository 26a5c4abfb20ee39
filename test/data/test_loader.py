import multiprocessing
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import make_loader
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.report import data_report
from library.data.sample.captions import CaptionChanges
from library.data.sample.prepare import Treatment
from library.errors import InputError
from library.models.text import Tokens
from library.options.buckets import BucketOptions

OPTIONS = BucketOptions((32, 32), True, 16, 64, 8)
SHAPES = [(40, 30), (30, 40), (32, 32), (64, 24), (50, 50), (31, 42)]
TREATMENT = Treatment(CaptionChanges(shuffle_caption=True, caption_dropout_rate=0.2))


class Set:
    """An indexed data set with its buckets, and loaders over it."""

    def __init__(self, folder, options=OPTIONS, seed=3):
        self.index = build_index([Subset(folder, ".txt")], use_cache=False)
        self.buckets = bucket_rows(self.index, [options])
        self.seed = seed

    def plan(self, batch_size, micro_batches=1):
        samples_SK = repeated(self.buckets.images_SK, self.index.repeats_S)
        return Plan(self.buckets, samples_SK, self.seed, batch_size, micro_batches)

    def loader(self, share, end_step, captions=TREATMENT.captions, **options):
        plan = self.plan(share.batch_size, share.micro_batches)
        treatments = [Treatment(captions)]
        return make_loader(self.index, self.buckets, plan, share, treatments, end_step=end_step, **options)

    def samples(self, share, end_step, **options):
        """What every place of every step holds, over all ranks: {(step, place): (name, caption, size ids, pixels)}."""
        found = {}
        for rank in range(share.world_size):
            mine = Share(share.batch_size, rank, share.world_size, share.accumulation)
            for batch in self.loader(mine, end_step, **options):
                assert len(batch) == share.batch_size
                for place, name, caption, size_ids, pixels in zip(
                    batch.places_B.tolist(),
                    batch.names,
                    batch.captions,
                    batch.size_ids_B6.tolist(),
                    batch.images_BHWC,
                    strict=True,
                ):
                    assert (batch.step, place) not in found
                    found[batch.step, place] = (name, caption, tuple(size_ids), pixels.numpy().tobytes())
        return found


@pytest.fixture
def shards(tmp_path, make_shard):
    for number in range(3):
        make_shard(tmp_path, number, SHAPES * 3)
    return tmp_path


@pytest.mark.parametrize(
    ("batch_size", "world_size", "accumulation", "workers"),
    [(8, 1, 1, 2), (4, 2, 1, 0), (4, 1, 2, 2), (2, 4, 1, 0), (2, 2, 2, 0), (1, 2, 4, 2), (1, 8, 1, 0)],
)
def test_ranks_accumulation_and_workers_do_not_change_what_is_trained(
    shards, batch_size, world_size, accumulation, workers
):
    data = Set(shards)
    whole = data.samples(Share(batch_size, accumulation=8 // batch_size), 9)
    assert sorted(whole) == [(step, place) for step in range(9) for place in range(8)]
    assert data.samples(Share(batch_size, 0, world_size, accumulation), 9, workers=workers) == whole


def test_accumulation_goes_outside_and_ranks_inside():
    """Batch 2, 3 ranks: the first micro-batch of all ranks takes the places 0 … 5."""
    assert [Share(2, rank, 3, 2).places(0).tolist() for rank in range(3)] == [[0, 1], [2, 3], [4, 5]]
    assert Share(2, 1, 3, 2).places(1).tolist() == [8, 9]


def test_an_epoch_shows_every_image_of_the_real_set_once(emoji_laion):
    """In batches of one all samples fit, with none left over."""
    data = Set(emoji_laion, BucketOptions((64, 64), True, 32, 128, 8))
    plan = data.plan(1)
    batches = list(data.loader(Share(1), plan.steps_before_epoch(1), workers=2))
    assert len(batches) == 500
    assert set(Counter(name for batch in batches for name in batch.names).values()) == {1}
    assert not any(batch.quarantined for batch in batches)
    for batch in batches:
        height, width = batch.images_BHWC.shape[1:3]
        assert batch.size_ids_B6[0, 4:].tolist() == [height, width]
        assert width * height <= 64 * 64
        assert "3d emoji" in batch.captions[0] or batch.captions[0] == ""
        assert batch.images_BHWC.dtype == torch.uint8


def test_a_loader_starts_at_any_step(shards):
    data = Set(shards)
    share = Share(2, 0, 1, 2)
    all_batches = list(data.loader(share, 6))
    later = list(data.loader(share, 6, start_step=4, workers=2))
    assert [(batch.step, batch.micro) for batch in later] == [(4, 0), (4, 1), (5, 0), (5, 1)]
    assert [batch.names for batch in later] == [batch.names for batch in all_batches[8:]]
    assert [batch.captions for batch in later] == [batch.captions for batch in all_batches[8:]]
    assert len(data.loader(share, 6, start_step=4)) == 4


def test_captions_are_dropped_place_by_place_not_step_by_step(shards):
    steps = [[caption == "" for caption in batch.captions] for batch in Set(shards).loader(Share(6), 60)]
    assert 0.1 < np.mean(steps) < 0.3
    assert sum(any(dropped) for dropped in steps) > 30  # 74 % of the steps have one among their six


def test_captions_differ_between_passes(shards):
    data = Set(shards)
    by_name = {}
    for batch in data.loader(Share(6), 90):
        for name, caption in zip(batch.names, batch.captions, strict=True):
            by_name.setdefault(name, set()).add(caption)
    assert max(len(captions) for captions in by_name.values()) > 3


def test_epoch_and_step_that_captions_depend_on_are_those_of_the_plan(shards):
    """27 images of a bucket, batches of 6: epochs of 4 and 5 steps, which no count of steps alone would find."""
    data = Set(shards, BucketOptions((32, 32), False))
    captions = CaptionChanges(caption_dropout_every_n_epochs=2, token_warmup_min=1, token_warmup_steps=4)
    batches = list(data.loader(Share(6), 20, captions, start_step=1, workers=1))
    epochs = [data.plan(6).epoch_of_step(batch.step) for batch in batches]
    assert len(set(epochs)) > 2
    assert [set(batch.captions) == {""} for batch in batches] == [epoch % 2 == 1 for epoch in epochs]
    tags = [{len(caption.split(", ")) for caption in batch.captions} for batch in batches if "" not in batch.captions]
    assert tags[:4] == [{1}, {2}, {2}, {3}]  # steps 1, 2, 3 and beyond, of captions of three tags
    assert set.union(*tags[3:]) == {3}


def test_one_line_of_a_caption_file_is_taken_by_wildcards_and_the_first_one_without(tmp_path, make_tar, make_picture):
    names = [f"{number}" for number in range(8)]
    make_tar(
        tmp_path / "0.tar",
        [
            member
            for name in names
            for member in ((f"{name}.jpg", make_picture(32, 32)), (f"{name}.txt", b"\r\none\n\n {two|three}\r\n"))
        ],
    )
    data = Set(tmp_path)

    def found(**options):
        return {text for batch in data.loader(Share(8), 6, CaptionChanges(**options)) for text in batch.captions}

    assert found() == {"one"}
    assert found(enable_wildcard=True) == {"one", "two", "three"}


def fake_tokenize(captions):
    ids = torch.tensor([[len(caption)] * 77 for caption in captions])
    return Tokens((ids[:, None], ids[:, None] + 1))


@pytest.mark.parametrize("workers", [0, 1])
def test_captions_become_token_ids_in_the_workers(shards, workers):
    for batch in Set(shards).loader(Share(3), 2, tokenize=fake_tokenize, workers=workers):
        first, second = batch.tokens.ids
        assert first.shape == second.shape == (3, 1, 77)
        assert first[:, 0, 0].tolist() == [len(caption) for caption in batch.captions]
        assert (second == first + 1).all()


def break_images(folder, numbers):
    """Overwrite the middle of some images in the first shard, after indexing; returns the names."""
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    names = []
    with (folder / "00000.tar").open("r+b") as file:
        for row in numbers:
            file.seek(int(index.record(row)["image_offset"]))
            file.write(b"\0" * int(index.record(row)["image_bytes"]))
            names.append(index.name(row))
    return names


def test_a_sample_that_cannot_be_read_is_replaced_by_one_of_its_bucket_and_listed(shards):
    data = Set(shards)
    steps = data.plan(6).steps_before_epoch(3)
    before = data.samples(Share(6), steps)
    broken = break_images(shards, [0, 5, 9])
    quarantined, replaced = {}, 0
    for batch in data.loader(Share(6), steps):
        replaced += batch.replaced
        for name, reason in batch.quarantined:
            quarantined[name] = reason
        assert not set(batch.names) & set(broken)
    assert set(quarantined) == set(broken)
    assert all("UnidentifiedImageError" in reason for reason in quarantined.values())
    after = data.samples(Share(6), steps)
    changed = [key for key in before if after[key] != before[key]]
    assert replaced == len(changed)
    assert sorted(before[key][0] for key in changed) == sorted(n for n, *_ in before.values() if n in broken)
    # The same replacements whoever computes them.
    one = data.samples(Share(1, accumulation=6), steps)
    assert data.samples(Share(1, 0, 3, 2), steps, workers=2) == one


def test_a_bucket_of_two_is_helped_by_its_other_image(tmp_path, make_shard):
    make_shard(tmp_path, 0, [(32, 32), (32, 32)])
    data = Set(tmp_path)
    (broken,) = break_images(tmp_path, [0])
    names = [name for batch in data.loader(Share(2), 10) for name in batch.names]
    assert set(names) == {data.index.name(1)} != {broken}


def write_sizes(make_shard, folder, told):
    """A shard of 32×32 pictures whose parquet gives the sizes that are told."""
    path = make_shard(folder, 0, [(32, 32)] * len(told), parquet=False)
    rows = [
        {"key": f"00000{place:04d}", "status": "success", "width": width, "height": height}
        for place, (width, height) in enumerate(told)
    ]
    pq.write_table(pa.Table.from_pylist(rows), path.with_suffix(".parquet"))


def test_a_size_that_the_parquet_has_wrong_is_noticed_where_it_chose_a_wrong_bucket(tmp_path, make_shard):
    write_sizes(make_shard, tmp_path, [(64, 64), (320, 319), (32, 32)])  # other sizes of one aspect ratio do no harm
    assert not any(batch.quarantined for batch in Set(tmp_path).loader(Share(1), 6))
    write_sizes(make_shard, tmp_path, [(64, 16)] * 3)
    data = Set(tmp_path)
    with pytest.raises(InputError, match="32×32 px, but by its shard's parquet or JSON 64×16: another aspect ratio"):
        list(data.loader(Share(1), 6))
    Set(tmp_path, BucketOptions((32, 32))).samples(Share(1), 6)  # one bucket for all: sizes choose nothing


def test_an_image_smaller_than_its_parquet_says_is_not_enlarged_against_the_users_will(tmp_path, make_shard):
    write_sizes(make_shard, tmp_path, [(64, 64), (32, 32)])
    data = Set(tmp_path, BucketOptions((64, 64), True, 16, 64, 8, bucket_no_upscale=True))
    with pytest.raises(InputError, match="less than its bucket, and --bucket_no_upscale"):
        list(data.loader(Share(1), 2))


@pytest.mark.parametrize("workers", [0, 2])
def test_nothing_readable_in_a_bucket_is_an_error_that_names_the_files(tmp_path, make_shard, workers):
    make_shard(tmp_path, 0, [(32, 32)] * 4)
    data = Set(tmp_path)
    broken = break_images(tmp_path, range(4))
    with pytest.raises(InputError) as error:
        list(data.loader(Share(2), 3, workers=workers))
    assert any(name in str(error.value) for name in broken)
    assert "4 samples of bucket 32×32" in str(error.value)
    assert "Traceback" not in str(error.value)


def test_workers_end_with_their_loader(shards):
    batches = iter(Set(shards).loader(Share(2), 50, workers=2))
    next(batches)
    assert len(multiprocessing.active_children()) == 2
    del batches
    assert not multiprocessing.active_children()


def test_loading_leaves_the_global_random_numbers_alone(shards):
    state = torch.random.get_rng_state()
    list(Set(shards).loader(Share(2), 3, workers=1))
    assert (torch.random.get_rng_state() == state).all()


def test_few_files_are_open_at_once(shards):
    data = Set(shards)
    before = sum(1 for _ in Path("/proc/self/fd").iterdir())
    list(data.loader(Share(6), 20))
    assert sum(1 for _ in Path("/proc/self/fd").iterdir()) <= before + 3


def test_the_report_has_the_lines_that_users_search_for(tmp_path, make_shard):
    make_shard(tmp_path, 0, [(32, 32)] * 5 + [(64, 16)] * 3)
    data = Set(tmp_path)
    lines = data_report(data.index, data.buckets, data.plan(2))
    assert "number of images (including repeats): 8" in lines
    assert "make buckets" in lines
    assert any(
        line.startswith("bucket 0: resolution (32, 32), count: 5, images: 5, batches: 2, left") for line in lines
    )
    assert any(
        line.startswith("bucket 1: resolution (64, 16), count: 3, images: 3, batches: 1, left") for line in lines
    )
    assert "mean ar error (without repeats): 0.0000" in lines
    assert any("first epoch: 3, each of 1 batches of 2 " in line for line in lines)
    assert any("left over for the next: 0 batches, and 2 samples" in line for line in lines)


def test_the_report_is_never_hundreds_of_lines(tmp_path, make_shard):
    make_shard(tmp_path, 0, [(8 * width, 8 * height) for width in range(1, 10) for height in range(1, 10)])
    data = Set(tmp_path, BucketOptions((64, 64), True, bucket_reso_steps=8, bucket_no_upscale=True))
    lines = data_report(data.index, data.buckets, data.plan(1))
    assert len(data.buckets.sizes_K2) > 45
    assert len(lines) < 60
    assert any("more buckets" in line for line in lines)
