"""A run's data as a whole: `prepare_data` from options."""

from collections import Counter

import numpy as np
import pytest
import toml

import sdxl_pretrain
from library.data.dataset import prepare_data
from library.errors import InputError

SHAPES = [(40, 30), (30, 40), (32, 32), (64, 24), (50, 50), (31, 42)]


@pytest.fixture
def shards(tmp_path, make_shard):
    for number in range(6):
        make_shard(tmp_path, number, SHAPES * 3)
    return tmp_path


def options_of(data, *more):
    arguments = ["--pretrained_model_name_or_path=m", "--output_dir=o", f"--train_data_dir={data}", "--resolution=32"]
    arguments += ["--enable_bucket", "--min_bucket_reso=16", "--max_bucket_reso=64", "--bucket_reso_steps=8"]
    arguments += ["--caption_extension=.txt", "--max_data_loader_n_workers=0", *more]
    return sdxl_pretrain.SCRIPT.options(arguments).data


def prepared(data, *more, seed=1, batch=4, rank=0, world_size=1, accumulation=1):
    options = options_of(data, f"--train_batch_size={batch}", *more)
    return prepare_data(options, seed, rank=rank, world_size=world_size, accumulation=accumulation)


@pytest.mark.parametrize(("given", "shown"), [("0.5", [1, 2, 3, 3]), ("3", [1, 1, 2, 3]), ("0.1", [3, 3, 3, 3])])
def test_token_warm_up_takes_steps_or_a_share_of_the_run(shards, given, shown):
    data = prepared(shards, f"--token_warmup_step={given}", "--token_warmup_min=1")
    assert [batch.captions[0].count(",") + 1 for batch in data.loader(lambda captions: (), 4)] == shown


@pytest.mark.parametrize("window", [0, 2])
def test_all_world_sizes_train_the_same_global_batches(shards, window):
    """8 micro-batches of 3 a step, dealt to 1, 2, 4 and 8 ranks, with and without accumulation."""

    def names(world_size, accumulation):
        found = {}
        for rank in range(world_size):
            data = prepared(
                shards,
                f"--shuffle_window_shards={window}",
                batch=3,
                rank=rank,
                world_size=world_size,
                accumulation=accumulation,
            )
            for batch in data.loader(lambda captions: (), 4):
                for place, name in zip(batch.places_B.tolist(), batch.names, strict=True):
                    found[batch.step, place] = name
        return found

    whole = names(1, 8)
    assert len(whole) == 4 * 24
    for world_size, accumulation in ((2, 4), (4, 2), (8, 1)):
        assert names(world_size, accumulation) == whole


class TestFingerprint:
    def test_it_is_the_same_at_the_next_start_and_on_other_ranks_seeds_and_batches(self, shards):
        first = prepared(shards).fingerprint()
        assert prepared(shards, seed=2, batch=1, rank=1, world_size=2, accumulation=3).fingerprint() == first
        assert len(first) == 64

    @pytest.mark.parametrize(
        "change", ["--bucket_no_upscale", "--resolution=40", "--shuffle_window_shards=2", "--caption_extension=.x"]
    )
    def test_it_changes_with_what_changes_the_order_or_the_captions(self, shards, change):
        assert prepared(shards, change).fingerprint() != prepared(shards).fingerprint()

    def test_it_changes_with_the_data(self, shards, make_shard):
        before = prepared(shards).fingerprint()
        make_shard(shards, 6, [(32, 32)])
        more = prepared(shards).fingerprint()
        (shards / "00006.tar").unlink()
        assert more != before == prepared(shards).fingerprint()


class TestConfig:
    """Two data sets in one run: shards at 32 px with shuffled captions, folders at 48 px with class words."""

    @pytest.fixture
    def prepare(self, tmp_path, make_shard, make_picture):
        (tmp_path / "shards").mkdir()
        make_shard(tmp_path / "shards", 0, SHAPES)
        folder = tmp_path / "images" / "7_cat"
        folder.mkdir(parents=True)
        for number in range(3):
            (folder / f"{number}.jpg").write_bytes(make_picture(48, 48, seed=number))
        (folder / "0.txt").write_text("one, two, three")

        def prepare(**changes):
            first = {"image_dir": str(tmp_path / "shards"), "shuffle_caption": True}
            second = {"image_dir": str(tmp_path / "images"), "num_repeats": 2, "class_tokens": "sks dog"}
            config = {
                "general": {"enable_bucket": True, "min_bucket_reso": 16, "max_bucket_reso": 64, "batch_size": 2}
                | {"bucket_reso_steps": 8, "caption_extension": ".txt"},
                "datasets": [
                    {"resolution": 32, "subsets": [first]},
                    {"resolution": 48, "enable_bucket": False, "subsets": [second | changes]},
                ],
            }
            (tmp_path / "data.toml").write_text(toml.dumps(config))
            arguments = ["--pretrained_model_name_or_path=m", "--output_dir=o", "--max_data_loader_n_workers=0"]
            arguments.append(f"--dataset_config={tmp_path / 'data.toml'}")
            options = sdxl_pretrain.SCRIPT.options(arguments).data
            return prepare_data(options, 3, rank=0, world_size=1, accumulation=1)

        return prepare

    def test_both_are_trained_each_with_its_own_options(self, prepare, tmp_path):
        data = prepare()
        steps = data.plan.steps_before_epoch(4)
        shown, captions = Counter(), {}
        for batch in data.loader(lambda captions: (), steps):
            is_folder = {name.startswith(str(tmp_path / "images")) for name in batch.names}
            assert len(is_folder) == 1  # their buckets differ
            size = tuple(batch.images_BHWC.shape[1:3])
            assert size == (48, 48) if is_folder == {True} else size[0] * size[1] <= 32 * 32
            shown.update(batch.names)
            for name, caption in zip(batch.names, batch.captions, strict=True):
                captions.setdefault(name.rpartition("/")[2], set()).add(caption)
        images = [count for name, count in shown.items() if "images" in name]
        assert images == [8, 8, 8]  # four epochs, two repeats; the 7 of the folder's name means nothing here
        assert captions["0.jpg"] == {"one, two, three"}  # not shuffled
        assert captions["1.jpg"] == {"sks dog"}
        assert any(len(found) > 1 for name, found in captions.items() if ":" in name)  # shuffled

    def test_an_error_names_the_file_and_the_folder(self, prepare, tmp_path):
        with pytest.raises(InputError, match=rf"data\.toml: image_dir {tmp_path / 'nowhere'}: there is no such folder"):
            prepare(image_dir=str(tmp_path / "nowhere"))

    def test_the_fingerprint_sees_the_repeats(self, prepare):
        first = prepare().fingerprint()
        assert prepare().fingerprint() == first != prepare(num_repeats=3).fingerprint()


def test_repeats_multiply_those_of_the_folders_names(tmp_path, make_picture):
    (tmp_path / "3_cat").mkdir()
    (tmp_path / "3_cat" / "1.jpg").write_bytes(make_picture(32, 32))
    assert prepared(tmp_path, "--dataset_repeats=2", batch=6).plan.samples_K.sum() == 6


class TestRegularisation:
    """Three images of a class shown twice, beside regularisation images."""

    @pytest.fixture
    def folders(self, tmp_path, make_picture):
        def make(reg_images, reg_name="1_dog"):
            for folder, count in ((tmp_path / "train" / "2_sks dog", 3), (tmp_path / "reg" / reg_name, reg_images)):
                folder.mkdir(parents=True)
                for number in range(count):
                    (folder / f"{number}.jpg").write_bytes(make_picture(32, 32, seed=number))
            return tmp_path / "train", f"--reg_data_dir={tmp_path / 'reg'}"

        return make

    def shown(self, data, epochs):
        """How often each image came, the training images first, and the weights by folder."""
        counts, weights = Counter(), {}
        for batch in data.loader(lambda captions: (), data.plan.steps_before_epoch(epochs)):
            for name, caption, weight in zip(batch.names, batch.captions, batch.loss_weights_B.tolist(), strict=True):
                counts[name] += 1
                weights.setdefault(caption, set()).add(weight)
        reg = [count for name, count in counts.items() if "/reg/" in name]
        return sorted(count for name, count in counts.items() if "/train/" in name), sorted(reg), weights

    def test_few_are_repeated_and_weighted(self, folders):
        data = prepared(*folders(4), "--prior_loss_weight=0.25", batch=6)
        trained, reg, weights = self.shown(data, 1)
        assert (trained, reg) == ([2, 2, 2], [1, 1, 2, 2])
        assert weights == {"sks dog": {1.0}, "dog": {0.25}}
        (line,) = [line for line in data.report() if "reg images" in line]
        assert line.startswith("4 reg images, of which an epoch uses 4, 6 with repeats; their loss counts 0.25 times")
        assert "6 train images with repeats." in data.report()

    def test_many_are_cut_and_come_in_the_same_batches(self, folders):
        data = prepared(*folders(40, "3_dog"), batch=6)
        trained, reg, weights = self.shown(data, 3)
        assert (trained, reg) == ([6, 6, 6], [3] * 6)
        assert weights == {"sks dog": {1.0}, "dog": {1.0}}
        batches = [data.plan.sources_of_batch(step).tolist() for step in range(6)]
        assert any(len(set(sources)) == 2 for sources in batches)
        assert any("40 reg images, of which an epoch uses 6, 6 with repeats" in line for line in data.report())

    def test_a_damaged_training_image_is_never_replaced_by_one_of_them_or_the_other_way_round(self, folders):
        data = prepared(*folders(9), "--prior_loss_weight=0.5", batch=3)
        train, reg = data.index.subsets
        for broken in (train.path / "2_sks dog" / "1.jpg", reg.path / "1_dog" / "4.jpg"):
            broken.write_bytes(b"no picture")
        replaced = 0
        for batch in data.loader(lambda captions: (), data.plan.steps_before_epoch(6)):
            replaced += batch.replaced
            planned = data.plan.micro_batch(batch.step, 0).rows_B.tolist()
            for row, name, weight in zip(planned, batch.names, batch.loss_weights_B.tolist(), strict=True):
                assert ("/reg/" in name) == ("/reg/" in data.index.name(row)) == (weight != 1.0)
        assert replaced > 6

    def test_where_a_subset_has_no_other_image_the_error_says_so(self, folders):
        data = prepared(*folders(9), batch=3)
        for broken in (data.index.subsets[0].path / "2_sks dog").iterdir():
            broken.write_bytes(b"no picture")
        with pytest.raises(InputError, match=r"--train_data_dir .*train: 3 samples of bucket 32×32.*no others"):
            list(data.loader(lambda captions: (), 3))

    def test_the_fingerprint_tells_them_from_images_to_train_on(self, folders, tmp_path):
        train, reg = folders(3, "2_dog")
        found = set()
        for is_reg in (True, False):
            subsets = [{"image_dir": str(train)}, {"image_dir": reg.partition("=")[2], "is_reg": is_reg}]
            for subset in subsets:
                subset["class_tokens"] = "dog"
            (tmp_path / "data.toml").write_text(toml.dumps({"datasets": [{"resolution": 32, "subsets": subsets}]}))
            arguments = ["--pretrained_model_name_or_path=m", "--output_dir=o"]
            arguments.append(f"--dataset_config={tmp_path / 'data.toml'}")
            options = sdxl_pretrain.SCRIPT.options(arguments).data
            found.add(prepare_data(options, 1, rank=0, world_size=1, accumulation=1).fingerprint())
        assert len(found) == 2

    def test_a_folder_that_is_not_there_is_named_with_its_flag(self, shards):
        with pytest.raises(InputError, match=r"--reg_data_dir .*nowhere: there is no such folder"):
            prepared(shards, "--reg_data_dir=/nowhere")


def test_windows_are_reported_with_how_well_they_shuffle(shards):
    lines = prepared(shards, "--shuffle_window_shards=2").report()
    (line,) = [line for line in lines if line.startswith("shuffle: ")]
    assert "windows of 2 of 6 shards and folders, about 36 samples" in line
    share = float(line.partition("of a batch, ")[2].partition(" %")[0])
    data = prepared(shards, "--shuffle_window_shards=2")
    shown = []
    for step in range(data.plan.steps_before_epoch(1)):
        sources = data.index.starts_S.searchsorted(data.plan.batch(step), side="right")
        shown.append(np.bincount(sources).max() / 4)
    assert share == pytest.approx(100 * np.mean(shown), abs=1)
    (line,) = [line for line in prepared(shards).report() if line.startswith("shuffle: ")]
    assert "whole set" in line


def test_crops_around_faces_need_names_that_tell_of_them(tmp_path, make_picture, caplog):
    for name in ("anna.jpg", "bert_16_16_8_8.jpg"):
        (tmp_path / name).write_bytes(make_picture(32, 32))
        (tmp_path / name).with_suffix(".txt").write_text("a face")
    with caplog.at_level("INFO"):
        prepared(tmp_path, "--face_crop_aug_range=1,3", batch=2)
    assert "1 of 2 names looked at tell of a face" in caplog.text
    (tmp_path / "bert_16_16_8_8.jpg").unlink()
    with pytest.raises(InputError, match=r"--face_crop_aug_range: none of 1 names .*anna\.jpg for one.*_X_Y_W_H"):
        prepared(tmp_path, "--face_crop_aug_range=1,3", batch=1)


def test_options_of_images_reach_the_samples_and_no_worker_changes_them(shards):
    options = ("--flip_aug", "--random_crop", "--alpha_mask", "--resize_interpolation=area")

    def found(workers, *more):
        data = prepared(shards, *options, f"--max_data_loader_n_workers={workers}", *more)
        return list(data.loader(lambda captions: (), 6))

    alone, shared = found(0), found(2)
    for one, other in zip(alone, shared, strict=True):
        assert (one.images_BHWC == other.images_BHWC).all()
        assert (one.size_ids_B6 == other.size_ids_B6).all()
        assert one.mirrored == other.mirrored
        assert one.masks_BHW.shape == one.images_BHWC.shape[:3]
        assert (one.masks_BHW == 255).all()  # JPEGs have no alpha
    assert {mirrored for batch in alone for mirrored in batch.mirrored} == {True, False}
