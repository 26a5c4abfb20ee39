import errno
import json
from dataclasses import replace
from functools import partial
from unittest.mock import Mock

import numpy as np
import pytest
import torch

from library.data.bad_samples import SampleError
from library.data.cache import npz_files, settings
from library.data.cache.block_files import BlockShelf
from library.data.cache.encodings import CaptionMaking, LatentMaking
from library.data.cache.entries import BLOCK, Cache, Caches, DamagedEntryError, Entry, Made, MemoryShelf, blocks_of
from library.data.cache.fill import fill
from library.data.cache.locations import disk_shelf, pictures_of, sources_beside_images
from library.data.cache.npz_files import NpzShelf, Picture, TextLayout, TextOutputs
from library.data.cache.settings import CaptionSettings
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import make_loader
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.sample.augmentation import ImageChanges
from library.data.sample.captions import CaptionChanges
from library.data.sample.prepare import Treatment
from library.data.sample.scaling import Filter
from library.errors import InputError
from library.families import FAMILIES
from library.options.buckets import BucketOptions

OPTIONS = BucketOptions((32, 32), True, 16, 64, 8)
TREATMENT = Treatment(CaptionChanges(caption_dropout_rate=0.3))
SIZES = [(40, 30), (30, 40), (32, 32)] * 30  # 90 images: two blocks


def moments(images_BHWC):
    """A stand-in for a VAE: means of 8×8 pixels, and of their squares."""
    pixels_BCHW = images_BHWC.permute(0, 3, 1, 2).float()
    mean = torch.nn.functional.avg_pool2d(pixels_BCHW, 8)
    return mean, torch.nn.functional.avg_pool2d(pixels_BCHW**2, 8).half()


class Data:
    """An indexed folder with the latents of its images, of which the encoded ones are counted."""

    def __init__(self, folder, shelves, encoder="vae", options=OPTIONS, batch_size=4, images=TREATMENT.images):
        self.index = build_index([Subset(folder, ".txt")], use_cache=False)
        self.buckets = bucket_rows(self.index, [options])
        self.encoded, self.images = 0, [images]
        self.making = LatentMaking(self.index, self.buckets, self.images, encoder, self._encode, batch_size)
        self.shelves = shelves(self)

    def _encode(self, images_BHWC):
        self.encoded += len(images_BHWC)
        return moments(images_BHWC)

    @property
    def blocks(self):
        return [block for source in range(len(self.index.sources)) for block in blocks_of(self.index, source)]

    def fill(self, blocks=None, **options):
        self.encoded = 0
        blocks = self.blocks if blocks is None else blocks
        return fill(self.making, self.index, self.shelves, blocks, **options)

    def entries(self):
        """All, as training reads them."""
        cache = Cache(self.index, self.shelves, {}, self.making.settings)
        return [cache.read(row) for row in range(len(self.index))]

    def batches(self, caches, steps=8):
        share = Share(4)
        plan = Plan(self.buckets, repeated(self.buckets.images_SK, self.index.repeats_S), 5, 4)
        return list(
            make_loader(self.index, self.buckets, plan, share, [TREATMENT], end_step=steps, caches=caches, workers=1)
        )


def block_shelf(folder):
    return lambda data: lambda source: BlockShelf(folder / str(source))


def npz_shelf(data):
    def shelf(source):
        buckets = data.buckets.buckets_of(source)
        first = int(data.index.starts_S[source])

        def picture(place):
            record = data.index.record(first + place)
            path = data.index.sources[source].path / data.index.key(first + place)
            size = int(record["width"]), int(record["height"])
            settings = data.making.settings(first + place)
            return Picture(path, settings, size, data.buckets.size(int(buckets[place])), "_sdxl.npz", channels=3)

        return NpzShelf(picture)

    return shelf


def memory_shelves(data):
    return {number: MemoryShelf() for number in range(len(data.index.sources))}.__getitem__


def test_images_whose_latents_are_no_numbers_are_named_and_not_kept(shard):
    """A VAE in fp16 overflows on some images: cached, they would make the loss NaN whenever they train."""
    data = Data(shard, memory_shelves, batch_size=4)
    exact = data.making._encode

    def overflows(images_BHWC):
        mean, std = exact(images_BHWC)
        if data.encoded == 4:  # the first batch
            mean[1, 0, 0, 0], std[2, 0, 0, 0] = float("nan"), float("inf")
        return mean, std

    data.making._encode = overflows
    filled = data.fill()
    assert len(filled.bad) == 2 and all(
        "NaN or infinite" in why and "--no_half_vae" in why for why in filled.bad.values()
    )
    assert (filled.computed, filled.kept) == (len(SIZES) - 2, 0)
    again = data.fill()
    assert again.kept == len(SIZES) - 2


@pytest.fixture
def shard(tmp_path, make_shard):
    folder = tmp_path / "shards"
    folder.mkdir()
    make_shard(folder, 0, SIZES)
    return folder


@pytest.fixture
def folder(tmp_path, make_picture):
    folder = tmp_path / "images"
    folder.mkdir()
    for number, (width, height) in enumerate(SIZES[:12]):
        (folder / f"{number:02d}.png").write_bytes(make_picture(width, height, seed=number, format="PNG"))
        (folder / f"{number:02d}.txt").write_text(f"number {number}")
    return folder


@pytest.mark.parametrize("kind", ["blocks", "npz", "memory"])
def test_the_loader_reads_what_the_images_would_give(folder, tmp_path, kind):
    shelves = {"blocks": block_shelf(tmp_path / "cache"), "npz": npz_shelf, "memory": memory_shelves}[kind]
    data = Data(folder, shelves)
    filled = data.fill(workers=1)
    assert (filled.computed, filled.kept, filled.bad, data.encoded) == (12, 0, {}, 12)
    plain = data.batches(Caches())
    cached = data.batches(Caches(latents=Cache(data.index, data.shelves, {}, data.making.settings)))
    for one, other in zip(plain, cached, strict=True):
        mean, std = moments(one.images_BHWC)
        assert other.images_BHWC is None
        assert torch.equal(other.moments[0], mean) and torch.equal(other.moments[1], std)
        assert other.moments[1].dtype == torch.float16
        assert torch.equal(one.size_ids_B6, other.size_ids_B6)
        assert (one.names, one.captions) == (other.names, other.captions)
    again = Data(folder, shelves).fill()
    assert (again.computed, again.kept) == ((12, 0) if kind == "memory" else (0, 12))


def test_a_stop_keeps_what_is_done_and_the_next_start_goes_on(shard, tmp_path):
    calls = 0

    def between():
        nonlocal calls
        calls += 1
        if calls == 8:
            raise KeyboardInterrupt

    data = Data(shard, block_shelf(tmp_path / "cache"))
    with pytest.raises(KeyboardInterrupt):
        data.fill(between=between)
    done = data.encoded
    assert 0 < done < 90
    filled = Data(shard, block_shelf(tmp_path / "cache")).fill()
    assert (filled.kept, filled.computed) == (done, 90 - done)


def test_processes_that_fill_a_share_each_fill_all(shard, tmp_path):
    whole = Data(shard, block_shelf(tmp_path / "whole"))
    whole.fill()
    shares = Data(shard, block_shelf(tmp_path / "shares"))
    assert [block.count for block in shares.blocks] == [BLOCK, 90 - BLOCK]
    for block in shares.blocks:
        shares.fill([block])
    for place in range(90):
        one, other = whole.shelves(0).read(place), shares.shelves(0).read(place)
        assert one.made == other.made and one.size_ids == other.size_ids
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.tensors, other.tensors, strict=True))


def test_an_edited_image_another_encoder_and_other_buckets_are_computed_anew(folder, make_picture):
    data = Data(folder, npz_shelf)
    data.fill()
    (folder / "05.png").write_bytes(make_picture(*SIZES[5], seed=99, format="PNG"))
    edited = Data(folder, npz_shelf)
    filled = edited.fill()
    assert (filled.kept, filled.computed, filled.outdated) == (11, 1, 1)
    for other in (Data(folder, npz_shelf, encoder="another"), Data(folder, npz_shelf, options=BucketOptions((16, 16)))):
        filled = other.fill()
        assert (filled.kept, filled.computed, filled.outdated) == (0, 12, 12)


def test_an_edited_image_in_a_shard_is_noticed_though_size_and_time_are_the_same(shard, tmp_path):
    data = Data(shard, block_shelf(tmp_path / "cache"))
    data.fill()
    path = shard / "00000.tar"
    content = bytearray(path.read_bytes())
    record = data.index.record(7)
    place = int(record["image_offset"]) + int(record["image_bytes"]) - 12  # within the picture's own data
    content[place] ^= 1
    path.write_bytes(content)
    assert Data(shard, block_shelf(tmp_path / "cache")).fill(check=False).computed == 0
    filled = Data(shard, block_shelf(tmp_path / "cache")).fill()
    assert (filled.kept, filled.computed, filled.outdated) == (89, 1, 1)


@pytest.mark.parametrize("damage", ["bit", "cut", "empty"])
@pytest.mark.parametrize("kind", ["blocks", "npz"])
def test_a_damaged_entry_is_named_and_computed_anew(folder, tmp_path, kind, damage):
    shelves = block_shelf(tmp_path / "cache") if kind == "blocks" else npz_shelf
    data = Data(folder, shelves)
    data.fill()
    (path, *_) = sorted(folder.glob("*.npz") if kind == "npz" else (tmp_path / "cache").rglob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-20 if kind == "blocks" else len(content) // 2] ^= 1
    path.write_bytes({"bit": bytes(content), "cut": bytes(content[:-100]), "empty": b""}[damage])
    again = Data(folder, shelves)
    filled = again.fill()
    assert len(filled.damaged) == 1 and str(path) in filled.damaged[0]
    assert filled.computed == (12 if kind == "blocks" and damage != "bit" else 1)
    assert again.fill().kept == 12


def test_damage_that_is_met_while_training_is_an_error_that_says_what_to_do(folder, tmp_path):
    data = Data(folder, block_shelf(tmp_path / "cache"))
    data.fill()
    (path,) = (tmp_path / "cache").rglob("*.safetensors")
    content = bytearray(path.read_bytes())
    content[-20] ^= 1
    path.write_bytes(content)
    with pytest.raises(InputError, match=r"000000\.safetensors.*damaged.*without --skip_cache_check"):
        data.batches(Caches(latents=Cache(data.index, data.shelves, {}, data.making.settings)), steps=12)


def test_a_bad_image_gives_the_same_quarantine_with_a_cache_as_without(folder, tmp_path):
    (folder / "04.png").write_bytes((folder / "04.png").read_bytes()[:-30])
    data = Data(folder, block_shelf(tmp_path / "cache"))
    filled = data.fill()
    assert list(filled.bad) == [4] and filled.computed == 11
    cache = Cache(data.index, data.shelves, filled.bad, data.making.settings)
    with pytest.raises(SampleError):
        cache.read(4)
    plain, cached = data.batches(Caches()), data.batches(Caches(latents=cache))
    assert [(batch.names, batch.quarantined, batch.replaced) for batch in cached] == [
        (batch.names, batch.quarantined, batch.replaced) for batch in plain
    ]
    assert any(batch.replaced for batch in plain)


OTHER_SETTINGS = {
    "resolution": {"options": BucketOptions((48, 48), True, 16, 64, 8)},
    "steps": {"options": BucketOptions((32, 32), True, 16, 64, 16)},
    "no_upscale": {"options": replace(OPTIONS, bucket_no_upscale=True)},
    "flip": {"images": ImageChanges(flip_aug=True)},
    "filter": {"images": ImageChanges(resize_interpolation=Filter.AREA)},
    "vae": {"encoder": "another"},
}


@pytest.mark.parametrize("kind", ["blocks", "npz"])
@pytest.mark.parametrize("other", OTHER_SETTINGS)
def test_two_runs_with_other_settings_leave_each_other_their_entries(folder, tmp_path, kind, other):
    """Both over one folder, the second while the first trains."""

    def on_disk(data):
        settings, npz = data.making.settings, sources_beside_images(data.index) if kind == "npz" else frozenset()
        mirrored = [images.flip_aug for images in data.images]
        beside = partial(pictures_of, data.index, data.buckets, settings, mirrored, "_sdxl.npz", 8, 3)
        return partial(disk_shelf, data.index, "latents", settings, beside, [tmp_path / "cache"], npz)

    first, second = Data(folder, on_disk), Data(folder, on_disk, **OTHER_SETTINGS[other])
    first.fill()
    before = first.entries()
    assert second.fill().computed == 12
    after = first.entries()
    for one, again in zip(before, after, strict=True):
        assert one.made == again.made and one.size_ids == again.size_ids
        assert all(torch.equal(mine, theirs) for mine, theirs in zip(one.tensors, again.tensors, strict=True))
    assert {entry.made.settings for entry in second.entries()}.isdisjoint(entry.made.settings for entry in before)
    for data in (first, second, Data(folder, on_disk)):
        assert data.fill().kept == 12 and data.encoded == 0


@pytest.mark.parametrize("links", [True, False])
def test_of_two_runs_that_write_one_npz_at_once_the_second_takes_another_name(folder, monkeypatch, links):
    first, second = Data(folder, npz_shelf), Data(folder, npz_shelf, encoder="another")
    real, begun = npz_files._target, []

    def target(beside):
        found = real(beside)
        if not begun:  # the first run writes all between the second one's look and its renaming
            begun.append(True)
            first.fill()
        return found

    if not links:
        monkeypatch.setattr(npz_files.os, "link", Mock(side_effect=OSError(errno.EPERM, "no links here")))
    monkeypatch.setattr(npz_files, "_target", target)
    second.fill()
    assert len(first.entries()) == len(second.entries()) == 12
    names = {path.name for path in folder.glob("*.npz")}
    assert len(names) == 24 and sum(name.endswith("_sdxl.npz") for name in names) == 12


def test_an_npz_of_sd_scripts_stays_as_it_is(folder):
    path = folder / "00_0040x0030_sdxl.npz"
    arrays = {"latents": np.zeros((3, 4, 4), np.float32), "original_size": [40, 30], "crop_ltrb": [5, 0, 37, 32]}
    np.savez(path, **arrays)
    content = path.read_bytes()
    data = Data(folder, npz_shelf)
    assert data.fill().foreign == 1
    assert path.read_bytes() == content
    assert len(data.entries()) == 12
    again = Data(folder, npz_shelf).fill()
    assert (again.foreign, again.kept) == (0, 12)


@pytest.mark.parametrize("made", [Made("c", "other"), Made("", "")])
def test_what_another_run_wrote_over_an_entry_is_never_trained(folder, made):
    """However it came there: each read looks at what the entry was made with."""
    data = Data(folder, memory_shelves)
    data.fill()
    entry = data.shelves(0).read(3)
    data.shelves(0).write({3: replace(entry, made=made)})
    cache = Cache(data.index, data.shelves, {}, data.making.settings)
    cache.read(2)
    with pytest.raises(DamagedEntryError, match=r"03\.png has been written .*since this one began"):
        cache.read(3)
    with pytest.raises(InputError, match=r"since this one began\. Start again"):
        data.batches(Caches(latents=cache))
    unchecked = replace(cache, foreign=True)
    if made.settings:
        with pytest.raises(DamagedEntryError):
            unchecked.read(3)
    else:
        assert unchecked.read(3).tensors


def test_npz_files_are_what_sd_scripts_reads(folder):
    """Keys and order of numbers as in the issue trackers' examples of sd-scripts' latents caches."""
    Data(folder, npz_shelf).fill()
    file = np.load(folder / "00_0040x0030_sdxl.npz")
    assert file["latents"].shape == (3, 4, 4) and file["latents"].dtype == np.float32
    assert file["original_size"].tolist() == [40, 30]
    assert file["crop_ltrb"].tolist() == [5, 0, 27, 32]  # of 43×32, which 40×30 is scaled to for the bucket 32×32


def test_sd_scripts_reads_the_crop_of_the_mirrored_image(folder):
    """By its own formula: the third number is the right end in the bucket's coordinates."""
    data = Data(folder, npz_shelf, images=ImageChanges(flip_aug=True))
    data.fill()
    for row, entry in enumerate(data.entries()):
        file = np.load(next(folder.glob(f"{row:02d}_*_sdxl.npz")))
        bucket_w = file["latents_flipped"].shape[2] * 8
        left, top, right, _ = file["crop_ltrb"].tolist()
        assert entry.variant(False)[0][2:4] == (top, left)
        assert entry.variant(True)[0][2:4] == (top, bucket_w - right)
        assert min(left, top, bucket_w - right) >= 0
    assert data.entries()[0].variant(True)[0][3] == 43 - 32 - 5  # what the crop leaves at the other end


def test_the_crop_of_a_mirrored_image_is_read_as_sd_scripts_wrote_it(folder):
    latents = np.zeros((3, 4, 4), np.float32)
    arrays = {"latents": latents, "latents_flipped": latents, "original_size": [40, 30], "crop_ltrb": [0, 4, 31, 28]}
    np.savez(folder / "00.npz", **arrays)
    entry = Picture(folder / "00.png", "s", (40, 30), (32, 32), "_sdxl.npz", mirrored=True, channels=3)
    entry = entry.entry(np.load(folder / "00.npz"))
    assert entry.variant(False)[0] == (30, 40, 4, 0, 32, 32)
    assert entry.variant(True)[0] == (30, 40, 4, 1, 32, 32)


@pytest.mark.parametrize(
    ("name", "suffix"), [("{stem}.npz", ""), ("{stem}_{w:04d}x{h:04d}_sdxl.npz", ""), ("{stem}.npz", "_4x4")]
)
def test_npz_files_of_sd_scripts_train_as_they_are_if_one_asks_for_it(folder, name, suffix):
    latents = np.random.default_rng(0).standard_normal((3, 4, 4), dtype=np.float32)
    path = folder / name.format(stem="00", w=40, h=30)
    arrays = {"latents": latents, "original_size": np.array([40, 30]), "crop_ltrb": np.array([5, 0, 37, 32])}
    np.savez(path, **{f"{key}{suffix}": array for key, array in arrays.items()})
    data = Data(folder, npz_shelf)
    filled = data.fill(check=False)
    assert (filled.foreign, filled.kept, filled.computed) == (1, 1, 11)
    entry = data.shelves(0).read(0)
    assert entry.size_ids == (30, 40, 0, 5, 32, 32)
    mean, std = entry.tensors
    assert torch.equal(mean + std * torch.randn(3, 4, 4), torch.from_numpy(latents))
    checked = Data(folder, npz_shelf)
    filled = checked.fill()
    assert (filled.foreign, filled.kept, filled.computed) == (1, 11, 1)
    assert checked.shelves(0).read(0).made.settings


@pytest.mark.parametrize(
    "latents",
    [np.zeros((16, 4, 4), np.float32), np.zeros((1, 3, 4, 4), np.float32), np.zeros((3, 4, 4), np.int64),
     np.zeros((3, 4, 4), "V2")],
    ids=["16 channels", "a batch", "whole numbers", "bf16 of another library"],
)  # fmt: skip
def test_npz_of_another_kind_of_model_is_not_taken_and_stays(folder, latents):
    """SD3 and Flux have latents of 16 channels."""
    path = folder / "00_0040x0030_sdxl.npz"
    arrays = {"latents": latents, "original_size": np.array([40, 30]), "crop_ltrb": np.array([5, 0, 37, 32])}
    np.savez(path, **{f"{key}_4x4": array for key, array in arrays.items()})
    before = path.read_bytes()
    data = Data(folder, npz_shelf)
    filled = data.fill(check=False)
    assert (filled.foreign, filled.kept, filled.computed) == (0, 0, 12)
    assert path.read_bytes() == before and data.entries()[0].tensors[0].shape == (3, 4, 4)


def test_npz_of_another_resolution_is_not_taken(folder):
    shape = {"latents": np.zeros((3, 8, 8), np.float32), "original_size": [40, 30], "crop_ltrb": [0, 0, 64, 64]}
    np.savez(folder / "00.npz", **shape)
    filled = Data(folder, npz_shelf).fill(check=False)
    assert (filled.foreign, filled.kept, filled.computed) == (0, 0, 12)


def test_text_entries_are_of_the_caption_and_dropped_ones_are_the_empty_one(folder, tmp_path):
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    seen = []

    def encode(captions):
        seen.extend(captions)
        lengths = torch.tensor([[float(len(caption))] for caption in captions])
        return lengths.expand(-1, 3).unsqueeze(1), lengths

    def filled(encoder="clip"):
        seen.clear()
        making = CaptionMaking(index, [TREATMENT], encoder, encode, 5)
        shelves = lambda source: BlockShelf(tmp_path / "text")  # noqa: E731
        found = fill(making, index, shelves, list(blocks_of(index, 0)))
        return found, Cache(index, shelves, found.bad, making.settings, making.empty())

    found, cache = filled()
    assert found.computed == 12 and sorted(seen)[1] == "number 0"
    data = Data(folder, block_shelf(tmp_path / "latents"))
    data.fill()
    batches = data.batches(
        Caches(latents=Cache(data.index, data.shelves, {}, data.making.settings), text=cache), steps=12
    )
    captions = [caption for batch in batches for caption in batch.captions]
    assert "" in captions and any(captions)
    told = [length for batch in batches for length in batch.text[1][:, 0].tolist()]
    assert told == [float(len(caption)) for caption in captions]
    (folder / "07.txt").write_text("another caption")
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    found, _ = filled()
    assert (found.kept, found.computed, seen[0]) == (11, 1, "another caption")
    found, _ = filled("another encoder")
    assert (found.kept, found.computed) == (0, 12)


TEXT_LAYOUT = TextLayout(((5, 7), (4,)), (torch.float32, torch.float32), 3)


class Captions:
    """Text-encoder outputs beside the images of a folder, of a stand-in for the encoders."""

    def __init__(self, folder, encoder="clip", layout=TEXT_LAYOUT, captions=TREATMENT.captions, **subset):
        index = build_index([Subset(folder, subset.pop("extension", ".txt"), **subset)], use_cache=False)
        self._index = index
        self.shelf = NpzShelf(lambda place: TextOutputs(folder / index.key(place), self.making.settings(place), layout))
        self.making = CaptionMaking(index, [replace(TREATMENT, captions=captions)], encoder, self._encode, 5)

    def _encode(self, captions):
        numbers_BN = torch.tensor([[float(len(caption) + n) for n in range(35)] for caption in captions])
        return numbers_BN.unflatten(1, (5, 7)) / 3, numbers_BN[:, :4] / 7

    def fill(self, **options):
        return fill(self.making, self._index, lambda source: self.shelf, list(blocks_of(self._index, 0)), **options)


@pytest.mark.parametrize(
    "other",
    [
        {"encoder": "another"},
        {"captions": CaptionChanges(caption_prefix="photo of")},
        {"captions": CaptionChanges(secondary_separator=" ")},
        {"extension": ".tags"},
    ],
    ids=["encoder", "prefix", "separator", "extension"],
)
def test_two_runs_with_other_captions_leave_each_other_their_text(folder, other):
    for path in folder.glob("*.txt"):
        path.with_suffix(".tags").write_text(f"tags, {path.stem}")
    first, second = Captions(folder), Captions(folder, **other)
    assert first.fill().computed == 12
    before = [first.shelf.read(place) for place in range(12)]
    assert second.fill().computed == 12
    for place, one in enumerate(before):
        again = first.shelf.read(place)
        assert again.made == one.made and torch.equal(again.tensors[0], one.tensors[0])
        assert second.shelf.read(place).made != one.made
    assert first.fill().kept == second.fill().kept == 12


def test_two_runs_with_metadata_files_of_one_name_leave_each_other_their_text(folder, tmp_path):
    runs = []
    for number in range(2):
        metadata = tmp_path / f"{number}" / "meta.json"
        metadata.parent.mkdir()
        metadata.write_text(json.dumps({path.stem: {"caption": f"of {number}"} for path in folder.glob("*.png")}))
        runs.append(Captions(folder, metadata=metadata))
    for run in runs:
        assert run.fill().computed == 12
    for run in runs:
        assert run.fill().kept == 12


def test_a_caption_that_changes_while_training_is_not_trained_with_the_text_of_another(folder, tmp_path):
    captions = Captions(folder)
    captions.fill()
    data = Data(folder, block_shelf(tmp_path / "latents"))
    data.fill()
    making = captions.making
    text = Cache(data.index, lambda source: captions.shelf, {}, making.settings, making.empty())
    (folder / "03.txt").write_text("edited")
    batches = data.batches(Caches(latents=Cache(data.index, data.shelves, {}, data.making.settings), text=text), 12)
    bad = {entry for batch in batches for entry in batch.quarantined}
    reason = "its caption has changed since it was encoded; a new start encodes it anew"
    assert bad == {(str(folder / "03.png"), reason)}
    assert not any("edited" in batch.captions for batch in batches)


def test_text_outputs_beside_images_are_what_sd_scripts_reads(folder):
    """Its keys and shapes: the states of each encoder (tokens, channels), the second one's pooled text (channels,)."""
    captions = Captions(folder)
    assert captions.fill().computed == 12
    with np.load(folder / "03_te_outputs.npz") as file:
        assert [file[key].shape for key in ("hidden_state1", "hidden_state2", "pool2")] == [(5, 3), (5, 4), (4,)]
        states = np.concatenate([file["hidden_state1"], file["hidden_state2"]], axis=-1)
        assert states.dtype == np.float32 and states.ravel()[-1] == np.float32(len("number 3") + 34) / np.float32(3)
        assert file["pool2"][0] == np.float32(len("number 3")) / np.float32(7)
    context, pooled = captions.shelf.read(3).tensors
    wanted = captions.making.encode(["number 3"])
    assert torch.equal(context, wanted[0][0]) and torch.equal(pooled, wanted[1][0])
    assert Captions(folder).fill().kept == 12
    (folder / "07.txt").write_text("another caption")
    changed = Captions(folder).fill()
    assert (changed.kept, changed.computed, changed.outdated) == (11, 1, 1)
    assert Captions(folder, encoder="another").fill().outdated == 12


@pytest.mark.parametrize("dtype", [np.float16, np.float32])
def test_text_outputs_of_sd_scripts_train_as_they_are_if_one_asks_for_it(folder, dtype):
    generator = np.random.default_rng(0)
    shapes = {"hidden_state1": (5, 3), "hidden_state2": (5, 4), "pool2": (4,)}
    arrays = {key: generator.standard_normal(shape).astype(dtype) for key, shape in shapes.items()}
    np.savez(folder / "00_te_outputs.npz", **arrays)
    captions = Captions(folder)
    filled = captions.fill(check=False)
    assert (filled.foreign, filled.kept, filled.computed) == (1, 1, 11)
    context, pooled = captions.shelf.read(0).tensors
    assert context.dtype == pooled.dtype == torch.float32
    assert np.array_equal(context.numpy(), np.concatenate([arrays["hidden_state1"], arrays["hidden_state2"]], axis=1))
    assert np.array_equal(pooled.numpy(), arrays["pool2"])
    filled = Captions(folder).fill()
    assert (filled.foreign, filled.kept, filled.computed) == (1, 11, 1)
    assert captions.shelf.read(0).made.settings


def test_text_outputs_of_another_length_are_not_taken_and_strange_ones_are_named(folder):
    """As with another --max_token_length; the second file holds what no program of this kind writes."""
    np.savez(
        folder / "00_te_outputs.npz", hidden_state1=np.zeros((9, 3)), hidden_state2=np.zeros((9, 4)), pool2=np.zeros(4)
    )
    np.savez(
        folder / "01_te_outputs.npz", hidden_state1=np.array("a"), hidden_state2=np.zeros((5, 4)), pool2=np.zeros(4)
    )
    filled = Captions(folder).fill(check=False)
    assert (filled.foreign, filled.kept, filled.computed) == (0, 0, 12)
    (damaged,) = filled.damaged
    assert "01_te_outputs.npz" in damaged


def test_text_outputs_of_one_encoder_without_pooled_text_come_back(folder):
    """As of SD 1.x and 2.x."""
    layout = TextLayout(((5, 7),), (torch.float32,), 7)
    captions = Captions(folder, layout=layout)
    captions.making = CaptionMaking(captions._index, [TREATMENT], "clip", lambda texts: captions._encode(texts)[:1], 5)
    assert captions.fill().computed == 12
    with np.load(folder / "03_sd_te_outputs.npz") as file:
        assert sorted(file) == ["hidden_state1", "made_of"]
    (context,) = captions.shelf.read(3).tensors
    assert torch.equal(context, captions.making.encode(["number 3"])[0][0])


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_latents_have_the_names_of_sd_scripts_by_family(tmp_path, family):
    path = Picture(tmp_path / "a.png", "b", (40, 30), (40, 32), family.latents_ending).path
    assert path.name == {"sdxl": "a_0040x0030_sdxl.npz"}.get(family.name, "a_0040x0030_sd.npz")


def test_precisions_survive_the_disk(tmp_path):
    """bf16 has no place in numpy, and is kept exactly all the same."""
    tensors = tuple(torch.randn(3, 4, 5).to(dtype) for dtype in (torch.bfloat16, torch.float32))
    entry = Entry(Made("a", "b"), (30, 40, 0, 1, 32, 40), tensors)
    block = BlockShelf(tmp_path / "block")
    npz = NpzShelf(lambda place: Picture(tmp_path / "image.png", "b", (40, 30), (40, 32), "_sdxl.npz"))
    for shelf in (block, npz):
        shelf.write({0: entry})
        again = shelf.read(0)
        assert again.made == entry.made and again.size_ids == entry.size_ids
        assert all(torch.equal(one.float(), other.float()) for one, other in zip(again.tensors, tensors, strict=True))
    assert block.read(0).tensors[0].dtype == torch.bfloat16
    layout = TextLayout(((4, 5), (5,)), (torch.bfloat16, torch.float16), 2)
    text = Entry(Made("a", "b"), (), (torch.randn(4, 5).bfloat16(), torch.randn(5).half()))
    beside = NpzShelf(lambda place: TextOutputs(tmp_path / "image.png", "b", layout))
    beside.write({0: text})
    for one, other in zip(beside.read(0).tensors, text.tensors, strict=True):
        assert one.dtype == other.dtype and torch.equal(one, other)


def test_settings_of_captions_are_digested_once_a_source(folder, monkeypatch):
    index = build_index([Subset(folder, ".txt")], use_cache=False)
    of_row = CaptionSettings(index, [TREATMENT.captions], "encoders")
    digest = Mock(side_effect=settings.digest_of)
    monkeypatch.setattr(settings, "digest_of", digest)
    assert {of_row(row) for row in range(len(index))} == {of_row.of_source(0)}
    assert digest.call_count == len(index.sources) == 1
