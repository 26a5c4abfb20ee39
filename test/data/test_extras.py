"""Extra images of a sample: found, read, and laid over their image whatever happens to that; missing ones are bad."""

import io
import json
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from library.data.cache.encodings import LatentMaking
from library.data.cache.entries import Cache, Caches, MemoryShelf, blocks_of
from library.data.cache.fill import fill
from library.data.dataset import prepare_data
from library.errors import InputError
from test.data.shard_server import ShardServer

SIZES = [(64, 48), (48, 64), (96, 40), (56, 56)]
AUGMENTED = ("--flip_aug", "--random_crop")


def gradient(width, height, times=1.0):
    """Red grows to the right, green downwards: every pixel tells where it lies. At another resolution the same."""
    width, height = round(width * times), round(height * times)
    x, y = np.meshgrid((np.arange(width) + 0.5) / width, (np.arange(height) + 0.5) / height)
    return Image.fromarray((np.stack([x, y, 0 * x], axis=-1) * 255).round().astype(np.uint8))


def encoded(image, format="PNG"):
    file = io.BytesIO()
    image.save(file, format)
    return file.getvalue()


def members(key, size, without=(), cond_times=0.5):
    found = {
        "jpg": encoded(gradient(*size), "BMP"),  # by content, whatever the extension says
        "txt": b"a gradient",
        "cond.png": encoded(gradient(*size, cond_times)),
        "mask.png": encoded(gradient(*size).getchannel(0)),
        "other.png": b"no picture, and nobody asks for it",
    }
    return [(f"{key}.{extension}", data) for extension, data in found.items() if extension not in without]


@pytest.fixture
def shard(tmp_path, make_tar):
    def write(**of_first):
        (tmp_path / "data").mkdir(exist_ok=True)
        samples = [members(f"{n:04d}", SIZES[n % 4], **(of_first if n == 0 else {})) for n in range(12)]
        make_tar(tmp_path / "data" / "0.tar", list(chain(*samples)))
        return tmp_path / "data"

    return write


@pytest.fixture
def prepare(make_options):
    def prepare(data, *more, extras=("cond", "mask"), conditioning=None, batch=2):
        options = make_options(data, f"--train_batch_size={batch}", *more)
        if conditioning is not None:
            options = replace(
                options, subsets=tuple(replace(one, conditioning_data_dir=conditioning) for one in options.subsets)
            )
        return prepare_data(options, 3, rank=0, world_size=1, accumulation=1, extras=extras)

    return prepare


def batches_of(data, steps=12):
    return list(data.loader(lambda captions: (), steps))


def check_cover(batch, tolerance=14, names=("cond", "mask")):
    """The extra images show the places that the image shows, pixel by pixel."""
    assert list(batch.extras) == list(names)
    images = batch.images_BHWC.int()
    for name, found in batch.extras.items():
        assert found.dtype == torch.uint8 and found.is_contiguous()
        expected = images[..., 0] if name == "mask" else images
        assert found.shape == expected.shape
        assert (found.int() - expected).abs().max() <= tolerance


@pytest.mark.parametrize("workers", [0, 2])
def test_they_lie_over_their_image_however_it_is_cropped_and_mirrored(shard, prepare, workers):
    data = prepare(shard(), *AUGMENTED, f"--max_data_loader_n_workers={workers}")
    batches = batches_of(data)
    for batch in batches:
        check_cover(batch)
        red = batch.extras["mask"].float().mean(dim=1)
        for mirrored, row in zip(batch.mirrored, red, strict=True):
            assert (row[0] > row[-1]) == mirrored
    assert {mirrored for batch in batches for mirrored in batch.mirrored} == {True, False}
    assert "extra images of each sample: cond, mask" in data.report()


def test_colours_are_changed_in_the_image_alone(shard, prepare):
    plain, changed = (batches_of(prepare(shard(), *more)) for more in ((), ("--color_aug",)))
    assert any((a.images_BHWC != b.images_BHWC).any() for a, b in zip(plain, changed, strict=True))
    for one, other in zip(plain, changed, strict=True):
        assert all((one.extras[name] == other.extras[name]).all() for name in ("cond", "mask"))


def test_without_being_asked_for_they_are_other_members_and_the_order_stays(shard, prepare):
    folder = shard()
    with_extras, without = batches_of(prepare(folder)), batches_of(prepare(folder, extras=()))
    assert all(not batch.extras for batch in without)
    assert [batch.names for batch in with_extras] == [batch.names for batch in without]
    assert prepare(folder).fingerprint() != prepare(folder, extras=()).fingerprint()


@pytest.mark.parametrize(
    ("without", "reason"),
    [(("cond.png",), "it has no extra image 'cond'"), (("mask.png",), "it has no extra image 'mask'")],
)
def test_a_missing_one_makes_a_bad_sample(shard, prepare, without, reason):
    data = prepare(shard(without=without), "--max_bad_samples=0.2")
    ((name, found),) = data.left_out
    assert name.endswith("0.tar:0000") and found == reason
    assert not any(one.endswith(":0000") for batch in batches_of(data) for one in batch.names)
    with pytest.raises(InputError, match=reason):
        prepare(shard(without=without))


def test_one_of_another_shape_is_bad_and_another_sample_stands_for_it(shard, prepare, make_tar):
    folder = shard()
    samples = [members(f"{n:04d}", (56, 56)) for n in range(4)]
    samples[1] = [(name, encoded(gradient(56, 40)) if "cond" in name else content) for name, content in samples[1]]
    make_tar(folder / "0.tar", list(chain(*samples)))
    bad = {entry for batch in batches_of(prepare(folder)) for entry in batch.quarantined}
    reason = "extra image 'cond': 56×40 px, another aspect ratio than its image's 56×56"
    assert bad == {(f"{folder}/0.tar:0001", reason)}


class TestFolders:
    @pytest.fixture
    def folder(self, tmp_path):
        """Pictures at two depths, and conditioning images in a second folder of the same form."""
        for n, (width, height) in enumerate(SIZES * 2):
            inside = "some" if n % 2 else "."
            for part in ("train", "conditions"):
                (tmp_path / part / inside).mkdir(parents=True, exist_ok=True)
            gradient(width, height).save(tmp_path / "train" / inside / f"{n}.png")
            (tmp_path / "train" / inside / f"{n}.txt").write_text("a gradient")
            gradient(width, height, 2).save(tmp_path / "conditions" / inside / f"{n}.bmp")
        return tmp_path

    def test_a_second_folder_has_them_by_stem(self, folder, prepare):
        data = prepare(folder / "train", *AUGMENTED, extras=("cond",), conditioning=folder / "conditions", batch=1)
        for batch in batches_of(data, 16):
            check_cover(batch, names=("cond",))

    def test_it_has_the_masks_where_no_conditions_are_wanted(self, folder, prepare):
        data = prepare(folder / "train", extras=("mask",), conditioning=folder / "conditions", batch=1)
        for batch in batches_of(data, 8):
            check_cover(batch, names=("mask",))

    def test_it_may_lie_in_the_first_and_is_not_trained_on(self, folder, prepare):
        (folder / "conditions").rename(folder / "train" / "conditions")
        given = {"extras": ("cond",), "conditioning": folder / "train" / "conditions", "batch": 1}
        data = prepare(folder / "train", **given)
        assert data.samples == 8

    def test_one_that_goes_is_noticed_at_the_next_start(self, folder, prepare):
        given = {"extras": ("cond",), "conditioning": folder / "conditions", "batch": 1}
        assert not prepare(folder / "train", **given).left_out
        (folder / "conditions" / "0.bmp").unlink()
        data = prepare(folder / "train", "--max_bad_samples=0.2", **given)
        assert data.left_out == ((str(folder / "train" / "0.png"), "it has no extra image 'cond'"),)

    def test_two_of_one_stem_are_bad(self, folder, prepare):
        gradient(8, 8).save(folder / "conditions" / "0.png")
        given = {"extras": ("cond",), "conditioning": folder / "conditions", "batch": 1}
        data = prepare(folder / "train", "--max_bad_samples=0.2", **given)
        assert [reason for _, reason in data.left_out] == ["it has 2 extra images 'cond'"]

    def test_the_metadata_names_them(self, folder, prepare):
        (folder / "masks").mkdir()
        entries = {}
        for n, (width, height) in enumerate(SIZES[:3]):
            gradient(width, height).getchannel(0).save(folder / "masks" / f"m{n}.png")
            inside = "some/" if n % 2 else ""
            entries[f"{inside}{n}"] = {"caption": "named", "mask": f"../masks/m{n}.png"}
        (folder / "meta.json").write_text(json.dumps(entries))
        data = prepare(folder / "train", f"--in_json={folder / 'meta.json'}", extras=("mask",), batch=1)
        assert data.samples == 3
        for batch in batches_of(data, 6):
            check_cover(batch, names=("mask",))
            assert batch.captions == ["named"]

    def test_a_folder_and_the_metadata_are_two_places(self, folder, prepare):
        (folder / "meta.json").write_text(json.dumps({"0": {"caption": "named", "cond": "conditions/0.bmp"}}))
        with pytest.raises(InputError, match=r'"cond" and a folder \(conditioning_data_dir\) are two places'):
            prepare(
                folder / "train",
                f"--in_json={folder / 'meta.json'}",
                extras=("cond",),
                conditioning=folder / "conditions",
            )

    def test_a_folder_with_nothing_to_act_on_is_an_error(self, folder, prepare, shard):
        with pytest.raises(InputError, match=r"conditioning_data_dir .* takes neither conditioning images nor masks"):
            prepare(folder / "train", extras=(), conditioning=folder / "conditions")
        with pytest.raises(InputError, match=r"conditioning_data_dir .*nowhere: there is no such folder"):
            prepare(folder / "train", extras=("cond",), conditioning=folder / "nowhere")
        with pytest.raises(InputError, match=r"has nothing to act on: .* are shards.* KEY\.cond\.png"):
            prepare(shard(), extras=("cond",), conditioning=folder / "conditions")


def test_the_alpha_channel_is_one_source_of_masks(tmp_path, prepare):
    for n in range(4):
        image = gradient(56, 56)
        image.putalpha(image.getchannel(0))
        image.save(tmp_path / f"{n}.png")
        (tmp_path / f"{n}.txt").write_text("a gradient")
    for batch in batches_of(prepare(tmp_path, "--alpha_mask", *AUGMENTED, extras=("mask",))):
        check_cover(batch, names=("mask",))
        assert batch.masks_BHW is batch.extras["mask"]


def test_cached_latents_leave_them_as_they_are(shard, prepare):
    data = prepare(shard(), "--flip_aug")

    def encode(images_BHWC):
        mean_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
        return mean_BCHW, torch.zeros_like(mean_BCHW)

    images = [treatment.images for treatment in data.treatments(0)]
    making, shelf = LatentMaking(data.index, data.buckets, images, "v", encode, 4), MemoryShelf()
    fill(making, data.index, lambda source: shelf, list(blocks_of(data.index, 0)))
    cached = replace(data, caches=Caches(latents=Cache(data.index, lambda source: shelf, {}, making.settings)))
    for plain, batch in zip(batches_of(data), batches_of(cached), strict=True):
        assert batch.images_BHWC is None and batch.mirrored == plain.mirrored
        for name, expected in plain.extras.items():
            assert (batch.extras[name] == expected).all()


def test_a_stream_has_them_too(shard, prepare, tmp_path):
    folder = shard(without=("cond.png",))
    server = ShardServer(folder)
    try:
        address = f"{server.address}/0.tar"
        data = prepare(address, *AUGMENTED, "--stream_shuffle_buffer=4")
        lost = {}
        for batch in batches_of(data, 20):
            check_cover(batch)
            lost |= dict(batch.quarantined)
        assert lost == {f"{address}:0000": "it has no extra image 'cond'"}
        with pytest.raises(InputError, match="--conditioning_data_dir needs an index"):
            prepare(address, conditioning=folder)
    finally:
        server.stop()
