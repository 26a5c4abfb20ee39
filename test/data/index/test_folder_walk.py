"""What lies in a data folder and is not used is said once, by its kind, with the first names and the way out."""

import gzip
import io
import json
import os
import re
from pathlib import PurePath

import numpy as np
import pytest
from PIL import Image

from library.data.index.extras import Extra
from library.data.index.folder_walk import stem_of
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.sample.decode import decode
from library.data.sample.reader import Reader
from library.errors import InputError


@pytest.fixture
def data(tmp_path, make_picture):
    """A folder with two captioned images."""
    folder = tmp_path / "data"
    for name in "ab":
        put(folder / f"{name}.jpg", make_picture(16, 8))
    return folder


def put(path, image, caption="text", extension=".txt"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(image)
    if caption is not None:
        (path.parent / f"{path.stem}{extension}").write_text(caption)


def build(path, extension=".txt", **of_subset):
    return build_index([Subset(path, extension, **of_subset)], use_cache=False)


def test_a_clean_folder_has_no_warnings(data, make_shard):
    make_shard(data, 0, [(20, 10)])
    (data / "00000_stats.json").write_text("{}")
    for name in ("notes.txt", "a.npz", "README.md"):
        (data / name).touch()
    assert build(data).warnings == ()


def test_links_that_lead_nowhere(data):
    for number in range(7):
        (data / f"{number}.jpg").symlink_to(f"../../blobs/{number}")
    (data / "more").symlink_to("/mnt/gone")
    (data / "good.jpg").symlink_to(data / "a.jpg")
    (data / "00000.tar").symlink_to("gone.tar")
    index = build(data)
    assert len(index) == 3
    links, _ = index.warnings
    assert links.startswith(f"9 links in {data} lead nowhere")
    assert f"{data}/00000.tar; {data}/0.jpg" in links.replace("; and", "") or "and 4 more" in links


def test_links_that_lead_to_themselves_and_what_is_no_file(data):
    (data / "c.jpg").symlink_to("c.jpg")
    (data / "d").symlink_to("e")
    (data / "e").symlink_to("d")
    os.mkfifo(data / "f.jpg")
    links, no_files = build(data).warnings
    assert links.startswith("3 links") and f"{data}/c.jpg; {data}/d; {data}/e." in links
    assert no_files.startswith("1 entries") and no_files.endswith(f"{data}/f.jpg.")


def test_pictures_of_kinds_that_are_not_read(data):
    for name in ("c.heic", "d.JXL", "e.jxl", "f.mp4"):
        (data / name).write_bytes(b"?")
    (warning,) = build(data).warnings
    assert warning.startswith(f"4 files in {data} are of kinds that are not read (2 .jxl, 1 .heic, 1 .mp4). Convert")
    assert f"{data}/c.heic; {data}/d.JXL; {data}/e.jxl; {data}/f.mp4." in warning


def test_archives_unfinished_downloads_and_sidecars_without_a_shard(data, make_shard):
    whole = make_shard(data, 0, [(20, 10)]).read_bytes()
    (data / "00001.tar.gz").write_bytes(gzip.compress(whole))
    (data / "00002.TAR").write_bytes(whole)
    (data / "00003.tar.part").write_bytes(whole[:100])
    (data / "00003.parquet").touch()
    (data / "00004_stats.json").write_text("{}")
    index = build(data)
    assert len(index) == 3
    archives, unfinished, sidecars = index.warnings
    assert (
        archives.startswith("2 archives")
        and f"gunzip) or rename them: {data}/00001.tar.gz; {data}/00002.TAR." in archives
    )
    assert unfinished.startswith("1 files") and "Fetch them again" in unfinished and "00003.tar.part" in unfinished
    assert sidecars.startswith("2 parquet and stats files") and "shards that are not there" in sidecars


def test_where_nothing_else_lies_there_the_error_says_what_does(tmp_path):
    (tmp_path / "00000.tar.gz").write_bytes(b"?")
    with pytest.raises(InputError, match=r"0 images found.*1 archives .* unpack \(gunzip\).*00000\.tar\.gz"):
        build(tmp_path)
    (tmp_path / "00000.tar.gz").rename(tmp_path / "train-00000.parquet")
    with pytest.raises(InputError, match=r"0 images found.*columns of a parquet are not read: make shards or files"):
        build(tmp_path)


def test_pictures_that_a_training_drew_are_pointed_out(data, make_picture):
    for name in ("last_20240101120000_e000001_00.png", "last_20240101_000200_01_7.png"):
        put(data / "sample" / name, make_picture(16, 8, format="PNG"))
    index = build(data)
    assert len(index) == 4
    (warning,) = index.warnings
    assert warning.startswith("2 images") and "a training drew" in warning


@pytest.mark.parametrize(
    ("files", "hint"),
    [
        ({f"{n}.jpg.txt": "a" for n in range(4)}, r"4 of them have a file NAME\.jpg\.txt: rename it to NAME\.txt"),
        (
            {f"{n}.TXT": "a" for n in range(4)},
            r"4 of them have a file ending in '\.TXT': give --caption_extension \.TXT",
        ),
        ({f"{n}.json": "{}" for n in range(4)}, r"4 of them have a file ending in '\.json'"),
        ({"metadata.jsonl": "{}"}, r"1 lists of captions.* \(--in_json\): .*metadata\.jsonl"),
        ({}, r"4 links in .* lead nowhere.*0\.txt"),
    ],
)
def test_where_captions_are_missing_the_error_names_what_lies_there(tmp_path, make_picture, files, hint):
    for number in range(4):
        put(tmp_path / f"{number}.jpg", make_picture(16, 8), caption=None)
        if not files:
            (tmp_path / f"{number}.txt").symlink_to("/gone/x")
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    with pytest.raises(InputError, match=f"none of the 4 images has a caption.*{hint}"):
        build(tmp_path)


def test_a_tiff_is_read_upright_and_one_without_a_white_is_not(tmp_path):
    exif = Image.Exif()
    exif[0x0112] = 6
    pixels_HWC = np.zeros((16, 32, 3), np.uint8)
    pixels_HWC[:8] = 255  # at the top: at the right once it is turned
    Image.fromarray(pixels_HWC).save(tmp_path / "a.tif", exif=exif)
    Image.fromarray(np.random.default_rng(0).random((16, 32), np.float32)).save(tmp_path / "b.tiff")
    (tmp_path / "a.txt").write_text("a")
    index = build(tmp_path)
    record = index.record(0)
    assert (record["width"], record["height"]) == (16, 32)
    from library.data.fit import Fit

    seen_HWC, _ = decode(Reader(index).image(0), (16, 32), lambda width, height: Fit((width, height), (0, 0)))
    assert (seen_HWC[:, 8:] == 255).all() and not seen_HWC[:, :8].any()
    assert [reason[:36] for _, reason in index.bad] == ["its pixels are numbers of 32 bits; s"]


class TestSecondFolder:
    def test_what_is_wrong_with_it_is_said_too(self, data, tmp_path, make_picture):
        second = tmp_path / "conditions"
        for name in ("a.png", "b.jfif", "c.png", "deep/a.png"):
            put(second / name, make_picture(16, 8), caption=None)
        (second / "d.png").symlink_to("d.png")
        (second / "e.heic").touch()
        index = build(data, extras=(Extra("cond", second),))
        assert len(index) == 2 and not index.bad
        links, kinds, others = index.warnings
        assert links.startswith(f"1 links in {second}") and kinds.startswith(f"1 files in {second}")
        assert others == (
            f"2 images in {second} have no image of their stem in the same sub-folder: c.png; deep/a.png."
        )

    def test_it_may_have_the_images_inside_it_but_not_be_their_folder(self, data, make_picture):
        put(data.parent / "a.png", make_picture(16, 8), caption=None)
        put(data.parent / "b.png", make_picture(16, 8), caption=None)
        index = build(data, extras=(Extra("cond", data.parent),))
        assert len(index) == 2
        with pytest.raises(InputError, match="is the folder of the images themselves"):
            build(data, extras=(Extra("cond", data / "."),))


def test_json_of_the_whole_set_is_a_list_not_a_caption(data):
    (data / "captions.json").write_text(json.dumps({"a": {"caption": "b"}, "b": {"caption": "c"}}))
    (warning,) = build(data).warnings
    assert "1 lists of captions" in warning
    assert build(data, metadata=data / "captions.json").warnings == ()  # it is read


def test_an_animation_is_its_first_picture(data):
    file = io.BytesIO()
    frames = [Image.new("RGB", (16, 8), colour) for colour in ("red", "blue")]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:])
    put(data / "c.gif", file.getvalue())
    index = build(data)
    assert [index.key(row) for row in range(3)] == ["a.jpg", "b.jpg", "c.gif"]


def test_stems_are_pathlibs():
    for name in ("a.jpg", "a.b.jpg", "a", "a.", "a..", "größe.png", "a b.c d.txt", "..a.txt", "a.JPG"):
        assert stem_of(name) == PurePath(name).stem


FOLDERS = ["", "10_sks dog", "10_sks dog/deep", "5 cat", "0_off", "reg", "img/3_x", "plain/er"]
IMAGES = [".jpg", ".JPEG", ".png", ".tif", ".gif", ".jfif", ".webp"]
OTHERS = [".heic", ".JXL", ".tar.gz", ".part", ".md", ".npz", ".mp4"]
CAPTIONS = [b"a cat", b"", b" \n", "caf\xe9".encode("cp1252"), "a".encode("utf-16"), b"one\ntwo", b"a\0b", None, None]


@pytest.mark.parametrize("seed", range(10))
def test_every_entry_of_any_folder_is_used_or_said(tmp_path, make_picture, seed):
    rng = np.random.default_rng(seed)
    folders = [FOLDERS[0], *rng.choice(FOLDERS[1:], 3, replace=False)]
    expected = {"images": 1, "links": 0, "kinds": 0, "archives": 0, "unfinished": 0}
    put(tmp_path / ("1_sure" if seed % 2 else "sure") / "sure.jpg", make_picture(16, 8))
    for number in range(40):
        folder = tmp_path / rng.choice(folders)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{number}{rng.choice(IMAGES + OTHERS)}"
        if rng.random() < 0.1:
            path.symlink_to(rng.choice(["gone", path.name, "/nowhere/at all"]))
            expected["links"] += 1
            continue
        path.write_bytes(make_picture(16, 8) if rng.random() < 0.7 else rng.bytes(int(rng.integers(0, 300))))
        caption = CAPTIONS[rng.integers(len(CAPTIONS))]
        if caption is not None:
            path.with_suffix(".txt").write_bytes(caption)
        suffix = path.suffix.lower()
        expected["images"] += suffix in (".jpg", ".jpeg", ".png", ".tif", ".gif", ".jfif", ".webp")
        expected["kinds"] += suffix in (".heic", ".jxl", ".mp4")
        expected["archives"] += suffix == ".gz"
        expected["unfinished"] += suffix == ".part"
    index = build(tmp_path)
    said = {}
    for warning in index.warnings:
        match = re.match(r"(\d+) (images .*are not used|links|files|archives)", warning)
        if match and match[2].startswith("images"):
            said["unused"] = said.get("unused", 0) + int(match[1])
        elif match:
            kind = "unfinished" if "not finished" in warning else {"files": "kinds"}.get(match[2], match[2])
            said[kind] = int(match[1])
    assert len(index) + len(index.bad) + said.pop("unused", 0) == expected.pop("images")
    assert said == {kind: count for kind, count in expected.items() if count}
    for row in range(len(index)):
        Reader(index).caption(row)  # each of them can be read
