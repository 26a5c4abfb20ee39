"""Images that are held out from training: which ones, that none of them trains, and in which batches they come."""

from collections import Counter
from hashlib import blake2b

import numpy as np
import pytest
import toml
from hypothesis import given, settings
from hypothesis import strategies as st

import sdxl_pretrain
from library.data.dataset import prepare_data
from library.data.order.held_out import Choice, ValidationPlan
from library.errors import InputError
from library.options.rules import problems_of

SHAPES = [(40, 30), (30, 40), (32, 32), (64, 24), (50, 50), (31, 42)]
REQUIRED = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--max_data_loader_n_workers=0"]


@pytest.fixture
def shards(tmp_path, make_shard):
    (tmp_path / "data").mkdir()
    for number in range(4):
        make_shard(tmp_path / "data", number, SHAPES * 2)
    return tmp_path / "data"


def prepare(*arguments, rank=0, world_size=1, seed=1):
    options = sdxl_pretrain.SCRIPT.options([*REQUIRED, *arguments]).data
    return prepare_data(options, seed, rank=rank, world_size=world_size, accumulation=1)


def prepared(data, *more, batch=4, **others):
    bucketed = ["--enable_bucket", "--min_bucket_reso=16", "--max_bucket_reso=64", "--bucket_reso_steps=8"]
    given = [f"--train_data_dir={data}", "--resolution=32", "--caption_extension=.txt", f"--train_batch_size={batch}"]
    return prepare(*given, *bucketed, *more, **others)


def trained(data, epochs=3):
    """Names of all samples of some epochs."""
    steps = data.plan.steps_before_epoch(epochs)
    return {name for batch in data.loader(lambda captions: (), steps) for name in batch.names}


def validated(data):
    """By its number, the name, caption and pixels of each image that validation looks at."""
    plan, batches = data.validation(lambda captions: ())
    found = {}
    for batch in batches:
        for place, number in enumerate(plan.numbers(batch.step)):
            assert number not in found
            found[number] = (batch.names[place], batch.captions[place], batch.images_BHWC[place].numpy().tobytes())
    return found


def held(data):
    return sorted(name for name, _, _ in validated(data).values())


def test_the_share_is_held_out_and_never_trains(shards):
    data = prepared(shards, "--validation_split=0.25", batch=2)
    names = held(data)
    assert len(names) == len(set(names))
    assert 5 <= len(names) <= 20  # of 48, by chance
    shown = trained(data)
    assert not shown & set(names)
    assert len(shown | set(names)) == 48
    assert f"{len(names)} validation images, held out from training (--validation_split)" in data.report()
    for bucket in range(len(data.buckets.sizes_K2)):  # nor in place of a bad one
        rows = data.plan.rows_of_bucket(bucket, np.arange(len(data.index.sources)))
        assert not {data.index.name(int(row)) for row in rows[np.arange(len(rows))]} & set(names)


def test_the_choice_depends_on_data_share_and_seed_alone(shards):
    first = held(prepared(shards, "--validation_split=0.25", "--validation_seed=7"))
    others = [
        prepared(
            shards, "--validation_split=0.25", "--validation_seed=7", "--shuffle_caption", "--keep_tokens=1", seed=9
        ),
        prepared(shards, "--validation_split=0.25", "--validation_seed=7", "--bucket_reso_steps=16", batch=3),
        prepared(shards, "--validation_split=0.25", "--validation_seed=7", "--shuffle_window_shards=2"),
        prepared(shards, "--validation_split=0.25", seed=7),  # the run's seed, where there is no other
    ]
    assert all(held(data) == first for data in others)
    assert held(prepared(shards, "--validation_split=0.25", "--validation_seed=8")) != first


def test_an_image_is_held_out_for_its_names_sake(shards, make_picture):
    """By hand: a hash below the share. And not one of the others changes with images that come or go."""
    share = 0.25

    def by_hand(name):
        digest = blake2b(name.encode(), digest_size=8, key=(7).to_bytes(8, "little")).digest()
        return int.from_bytes(digest, "little") < share * 2**64

    given = ("--validation_split=0.25", "--validation_seed=7")
    before = held(prepared(shards, *given))
    names = [f"{number:05d}.tar:{number:05d}{place:04d}" for number in range(4) for place in range(12)]
    assert before == [f"{shards}/{name}" for name in names if by_hand(name)]
    (shards / "some").mkdir()
    for number in range(20):
        (shards / "some" / f"{number}.jpg").write_bytes(make_picture(32, 32, seed=number))
    more = [f"{shards}/some/{number}.jpg" for number in range(20) if by_hand(f"some/{number}.jpg")]
    assert held(prepared(shards, *given)) == sorted([*before, *more])
    (shards / "00001.tar").unlink()
    (shards / "00001.parquet").unlink()
    left = [name for name in before if "00001.tar" not in name]
    assert held(prepared(shards, *given)) == sorted([*left, *more])
    shards.rename(shards.with_name("moved"))
    moved = held(prepared(shards.with_name("moved"), *given))
    assert [name.replace("/moved/", f"/{shards.name}/") for name in moved] == sorted([*left, *more])


@pytest.mark.parametrize("ranks", [2, 3, 5])
def test_processes_share_the_images_and_compute_as_many_batches_each(shards, ranks):
    given = (shards, "--validation_split=0.3")
    whole = validated(prepared(*given, batch=2))
    parts = [prepared(*given, batch=2, rank=rank, world_size=ranks) for rank in range(ranks)]
    assert len({len(data.validation(lambda captions: ())[1]) for data in parts}) == 1
    found = {}
    for data in parts:
        mine = validated(data)
        assert not mine.keys() & found.keys()
        found |= mine
    assert found == whole


def test_captions_are_whole_in_validation(shards):
    options = ["--shuffle_caption", "--caption_dropout_rate=1", "--token_warmup_step=0.5", "--caption_prefix=photo"]
    data = prepared(shards, "--validation_split=0.5", *options)
    captions = {caption for _, caption, _ in validated(data).values()}
    assert len(captions) == data.buckets.held_SK.sum() > 12
    assert all(caption.startswith("photo picture ") and " place " in caption for caption in captions)


def test_so_many_batches_at_most_are_a_sample_of_all(shards):
    data = prepared(shards, "--validation_split=0.5", "--max_validation_steps=3")
    few = validated(data)
    assert 3 <= len(few) <= 12
    whole = validated(prepared(shards, "--validation_split=0.5"))
    assert few.items() <= whole.items()


def test_the_fingerprint_sees_what_is_held_out(shards):
    splits = (
        [],
        ["--validation_split=0.25"],
        ["--validation_split=0.5"],
        ["--validation_split=0.5", "--validation_seed=3"],
    )
    found = [prepared(shards, *split).fingerprint() for split in splits]
    assert len(set(found)) == 4
    limited = prepared(shards, "--validation_split=0.5", "--max_validation_steps=1", "--validate_every_n_steps=2")
    assert limited.fingerprint() == found[2]


def test_regularisation_images_and_subsets_without_a_share_are_not_held_out(shards, tmp_path):
    subsets = [
        {"image_dir": str(shards), "validation_split": 0.25},
        {"image_dir": str(shards / "00000.tar"), "is_reg": True, "validation_split": 0.5},
        {"image_dir": str(shards / "00001.tar")},
    ]
    content = {"general": {"caption_extension": ".txt", "validation_seed": 3}}
    content["datasets"] = [{"resolution": 32, "subsets": subsets}]
    (tmp_path / "data.toml").write_text(toml.dumps(content))
    data = prepare(f"--dataset_config={tmp_path / 'data.toml'}")
    assert 5 <= data.buckets.held_SK.sum() <= 20  # of 48, by chance
    assert {data.index.sources[source].subset for source in np.flatnonzero(data.buckets.held_SK.sum(axis=1))} == {0}


def test_a_share_that_comes_to_nothing_or_to_all_is_an_error(shards):
    with pytest.raises(InputError, match=r"--validation_split=0\.0001 of 48 images is none.*--validation_seed"):
        prepared(shards, "--validation_split=0.0001")
    with pytest.raises(InputError, match=r"0 images .* too few"):
        prepared(shards, "--validation_split=1")


def test_flags_that_have_nothing_to_act_on_are_an_error(shards):
    for flag in ("--validate_every_n_steps=1", "--validate_every_n_epochs=1", "--max_validation_steps=1"):
        options = sdxl_pretrain.SCRIPT.options([*REQUIRED, f"--train_data_dir={shards}", "--resolution=32", flag])
        (said,) = problems_of(sdxl_pretrain.SCRIPT.flags, options)
        assert said.startswith(f"{flag[:-2]} has nothing to act on without --validation_split")


@given(
    st.sets(st.text(max_size=8), max_size=30),
    st.sets(st.text(max_size=8), max_size=30),
    st.floats(0, 1),
    st.integers(0, 2**64 - 1),
)
def test_adding_images_reshuffles_no_other(some, more, share, seed):
    def chosen(names):
        keys = sorted(name.encode() for name in names)
        held_out = Choice(share, seed, "shard.tar:").holds_out(keys)
        return {key for key, is_held in zip(keys, held_out.tolist(), strict=True) if is_held}

    before, after = chosen(some), chosen(some | more)
    assert after & {name.encode() for name in some} == before
    assert chosen(()) == set()


@settings(max_examples=20, deadline=None)
@given(st.floats(0.02, 0.98), st.integers(0, 2**64 - 1))
def test_the_share_of_many_is_held_out_another_one_for_another_seed(share, seed):
    keys = [f"{number:06d}".encode() for number in range(20_000)]
    held_out = Choice(share, seed, "").holds_out(keys)
    assert held_out.mean() == pytest.approx(share, abs=0.02)
    other = Choice(share, seed ^ 1, "").holds_out(keys)
    assert (held_out & other).mean() == pytest.approx(share**2, abs=0.02)


class Rows:
    def __init__(self, images_SK):
        self.images_SK = np.array(images_SK)

    def rows(self, bucket, source, places_n):
        return places_n + 1000 * bucket + 100_000 * source


@settings(deadline=None)
@given(
    st.lists(st.lists(st.integers(0, 9), min_size=3, max_size=3), min_size=1, max_size=4),
    st.integers(1, 5),
    st.integers(1, 4),
)
def test_every_image_comes_once_in_full_batches_of_one_bucket(images_SK, batch, ranks):
    if not np.sum(images_SK):
        return
    rows = Rows(images_SK)
    plan = ValidationPlan(rows, 3, batch)
    shown = Counter()
    for step in range(-(-plan.batches // ranks) * ranks):
        found = plan.micro_batch(step)
        assert len(found.rows_B) == batch
        assert set((found.rows_B // 1000 % 100).tolist()) == {found.bucket}
        shown.update(found.rows_B[: len(plan.numbers(step))].tolist())
    assert set(shown.values()) == {1}
    assert len(shown) == np.sum(images_SK)
