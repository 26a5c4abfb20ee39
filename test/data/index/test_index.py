import io
import json
import os
import pickle
import re
import shutil
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from library.data import image_header
from library.data.bad_samples import SampleError
from library.data.index import kept_tables as index_cache
from library.data.index import shards as shards_module
from library.data.index import sources as sources_module
from library.data.index import table as index_module
from library.data.index import worker_pool as parallel
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.sample.reader import Reader
from library.errors import InputError


def sizes(index):
    records = [index.record(row) for row in range(len(index))]
    return [(int(record["width"]), int(record["height"])) for record in records]


def repeats(index):
    return [index.source(row).repeats for row in range(len(index))]


def captions(index):
    reader = Reader(index)
    return [reader.caption(row) for row in range(len(index))]


def build(path, extension=".txt", **options):
    return build_index([Subset(path, extension)], use_cache=options.pop("use_cache", False), **options)


@pytest.fixture
def pictures(tmp_path, make_picture):
    """A function that fills a folder: {file name: text, or (width, height) for an image}."""

    def fill(files, folder="images"):
        path = tmp_path / folder
        for name, content in files.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            if isinstance(content, str):
                (path / name).write_text(content, encoding="utf-8")
            else:
                (path / name).write_bytes(make_picture(*content))
        return path

    return fill


class TestShards:
    def test_real_shards_are_read_in_place(self, emoji_laion):
        index = build(emoji_laion)
        assert len(index) == 500
        assert index.warnings == ()
        reader, row = Reader(index), 0
        for path in sorted(emoji_laion.glob("*.tar")):
            with tarfile.open(path) as tar:
                content = {member.name: tar.extractfile(member).read() for member in tar}
            for name in filter(lambda name: name.endswith(".jpg"), content):
                assert index.name(row) == f"{path}:{name[:-4]}"
                assert reader.image(row) == content[name]
                assert reader.caption(row) == content[f"{name[:-4]}.txt"].decode()
                assert sizes(index)[row] == Image.open(io.BytesIO(content[name])).size
                row += 1
        assert row == 500

    @pytest.mark.parametrize("parquet", [True, False])
    def test_written_shards(self, tmp_path, make_shard, parquet):
        make_shard(tmp_path, 0, [(20, 10), (30, 40)], parquet=parquet)
        make_shard(tmp_path, 1, [(50, 60)], parquet=parquet)
        index = build(tmp_path)
        assert sizes(index) == [(30, 40), (20, 10), (50, 60)]
        assert captions(index)[1] == "picture 0, place 0, 20 by 10"
        assert index.key(2) == "000010000"
        assert repeats(index) == [1, 1, 1]

    def test_one_tar_may_be_given(self, tmp_path, make_shard):
        make_shard(tmp_path, 0, [(20, 10)])
        assert len(build(make_shard(tmp_path, 1, [(20, 10), (30, 40)]))) == 2

    def test_sizes_come_from_parquet_then_json_then_the_image(self, tmp_path, make_tar, make_picture):
        """Each source lies about the size, so that the test sees which one was asked."""
        image = make_picture(30, 20)
        facts = json.dumps({"width": 11, "height": 12}).encode()
        make_tar(
            tmp_path / "0.tar",
            [
                *[("a.jpg", image), ("a.json", facts), ("a.txt", b"a")],
                *[("b.json", facts), ("b.txt", b"b"), ("b.jpg", image)],
                *[("c.txt", b"c"), ("c.jpg", image), ("c.json", b"{not json")],
                *[("d.jpg", image), ("d.txt", b"d"), ("d.json", b'{"width": null, "height": 3}')],
            ],
        )
        rows = [{"key": "a", "status": "success", "width": 1, "height": 2}]
        rows += [{"key": "b", "status": "failed", "width": 3, "height": 4}]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
        assert sizes(build(tmp_path)) == [(1, 2), (11, 12), (30, 20), (30, 20)]

    def test_captions_come_from_the_member_then_json_then_parquet(self, tmp_path, make_tar, make_picture):
        image, facts = make_picture(30, 20), json.dumps({"caption": "of\njson"}).encode()
        make_tar(
            tmp_path / "0.tar",
            [
                *[
                    ("a.jpg", image),
                    ("a.json", facts),
                    ("a.txt", b"\xef\xbb\xbf\n of text \nsecond line"),
                    ("a.caption", b"other"),
                ],
                *[("b.jpg", image), ("b.json", facts), ("b.caption", b"other")],
                *[("c.jpg", image), ("c.json", b'{"caption": null}'), ("c.txt", b"")],
                *[("d.jpg", image)],
            ],
        )
        rows = [{"key": key, "status": "success", "caption": "of parquet"} for key in "abc"]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
        index = build(tmp_path)
        assert captions(index) == ["of text\nsecond line", "of\njson", "of parquet", ""]
        warning, blank, lines = index.warnings
        assert "1 of 4 images have no caption" in warning
        assert "0.tar:d" in warning
        assert blank.startswith("1 caption files") and f"{tmp_path}/0.tar:c" in blank
        assert lines.startswith("2 captions") and f"{tmp_path}/0.tar:a; {tmp_path}/0.tar:b." in lines
        assert captions(build(tmp_path, ".caption"))[:2] == ["other", "other"]

    def test_many_image_formats_and_folders_in_a_tar(self, tmp_path, make_tar, make_picture):
        formats = {
            "jpg": "JPEG",
            "jpeg": "JPEG",
            "png": "PNG",
            "webp": "WEBP",
            "bmp": "BMP",
            "avif": "AVIF",
            "JPG": "JPEG",
            "jfif": "JPEG",
            "jpe": "JPEG",
            "gif": "GIF",
            "tif": "TIFF",
            "tiff": "TIFF",
        }
        members = []
        for number, (extension, format) in enumerate(formats.items()):
            members.append((f"./{number}/x.{extension}", make_picture(16 + number, 8, format=format)))
            members.append((f"./{number}/x.txt", f"{number}".encode()))
        make_tar(tmp_path / "0.tar", members)
        index = build(tmp_path)
        assert sizes(index) == [(16 + number, 8) for number in range(len(formats))]
        assert captions(index) == [str(number) for number in range(len(formats))]

    def test_samples_without_image_or_with_a_broken_one_are_counted(self, tmp_path, make_tar, make_picture):
        members = [("a.jpg", make_picture(16, 8)), ("a.txt", b"a"), ("b.heic", b"?"), ("b.txt", b"b")]
        make_tar(tmp_path / "0.tar", [*members, ("c.jpg", b"<html>"), ("c.txt", b"c")])
        index = build(tmp_path)
        assert [index.key(row) for row in range(len(index))] == ["a"]
        (no_image, no_image_reason), (broken, broken_reason) = index.bad
        assert (no_image, no_image_reason) == (f"{tmp_path}/0.tar:b", "no image, only .heic .txt")
        assert broken == f"{tmp_path}/0.tar:c"
        assert "UnidentifiedImageError" in broken_reason
        assert any("0.tar:c" in warning and "2 images cannot be read" in warning for warning in index.warnings)
        assert any("1 samples" in warning and ".heic" in warning for warning in index.warnings)

    def test_a_torn_shard_gives_its_whole_samples_and_a_warning(self, tmp_path, make_shard):
        path = make_shard(tmp_path, 0, [(20, 10), (30, 40), (50, 60)])
        whole = build(tmp_path)
        # Inside the last sample's .json: its image is complete, but what else belongs to it is not.
        data = path.read_bytes()
        path.write_bytes(data[: data.rindex(b'"status"')])
        index = build(tmp_path)
        assert sizes(index) == sizes(whole)[:2]
        torn, _ = index.warnings
        assert "00000.tar" in torn
        assert "2 whole samples" in torn
        assert index.bad == ((f"{path}:000000000", "its shard ends or is damaged within it"),)
        path.write_bytes(data[: data.index(b"000000000.jpg")])  # before the last one: only the parquet knows of it
        assert dict(build(tmp_path).bad) == {
            f"{path}:000000001": "its shard ends or is damaged within it",
            f"{path}:000000000": "its shard's parquet has it, the tar does not",
        }

    def test_a_damaged_sidecar_is_a_warning(self, tmp_path, make_shard):
        make_shard(tmp_path, 0, [(20, 10)]).with_suffix(".parquet").write_bytes(b"PAR1 no")
        index = build(tmp_path)
        assert sizes(index) == [(20, 10)]
        assert "parquet" in index.warnings[0]

    def test_names_that_lead_out_of_the_tar_are_left_out(self, tmp_path, make_tar, make_picture):
        image = make_picture(16, 8)
        names = ["../up", "/etc/passwd", "a/../../up", "a..b/fine", "a/fine"]
        members = [(f"{name}{end}", data) for name in names for end, data in ((".jpg", image), (".txt", b"a"))]
        make_tar(tmp_path / "0.tar", members)
        index = build(tmp_path)
        assert [index.key(row) for row in range(len(index))] == ["a..b/fine", "a/fine"]
        assert [name.partition(".tar:")[2] for name, _ in index.bad] == ["../up", "/etc/passwd", "a/../../up"]
        assert all("leads out" in reason for _, reason in index.bad)

    def test_two_images_of_one_name_are_left_out_not_one_of_them_chosen(self, tmp_path, make_tar, make_picture):
        first, second = make_picture(16, 8), make_picture(8, 16, format="PNG")
        make_tar(tmp_path / "0.tar", [("a.jpg", first), ("a.png", second), ("b.jpg", first), ("b.txt", b"b")])
        index = build(tmp_path)
        assert [index.key(row) for row in range(len(index))] == ["b"]
        reason = "2 images of one name in the tar"
        assert index.bad == ((f"{tmp_path}/0.tar:a.jpg", reason), (f"{tmp_path}/0.tar:a.png", reason))

    def test_captions_and_images_of_absurd_size_are_left_out(self, tmp_path, make_tar, make_picture, monkeypatch):
        monkeypatch.setattr(shards_module, "MAX_BYTES", 50_000)
        image = make_picture(16, 8)
        members = [("a.jpg", image), ("a.txt", b"x" * (1 << 20) + b"y"), ("b.jpg", bytes(50_001)), ("b.txt", b"b")]
        make_tar(tmp_path / "0.tar", [*members, ("c.jpg", image), ("c.txt", b"c")])
        index = build(tmp_path)
        assert [index.key(row) for row in range(len(index))] == ["c"]
        assert [reason.partition(" bytes")[0] for _, reason in index.bad] == [
            "a caption of 1048577", "an image file of 50001",
        ]  # fmt: skip

    def test_json_nested_without_end_is_no_facts(self, tmp_path, make_tar, make_picture):
        members = [("a.jpg", make_picture(16, 8)), ("a.json", b"[" * 100_000), ("b.jpg", make_picture(8, 8))]
        make_tar(tmp_path / "0.tar", [*members, ("b.txt", b"b")])
        assert sizes(build(tmp_path)) == [(16, 8), (8, 8)]

    def test_half_characters_in_json_are_a_bad_sample(self, tmp_path, make_tar, make_picture):
        members = [("a.jpg", make_picture(16, 8)), ("a.json", b'{"caption": "\\ud800"}'), ("b.jpg", make_picture(8, 8))]
        make_tar(tmp_path / "0.tar", [*members, ("b.txt", b"b")])
        index = build(tmp_path)
        assert captions(index) == ["b"]
        assert index.bad == ((f"{tmp_path}/0.tar:a", r"its caption has half a character, '\ud800'"),)

    def test_text_json_and_parquet_give_the_same_caption(self, tmp_path, make_tar, make_picture):
        """The alt text of a web page, as img2dataset writes it three times."""
        text, image = "\nBlue Widget\r\n - 20% off\u2028today\n\n", make_picture(16, 8)
        as_json = json.dumps({"caption": text}).encode()
        members = [("a.jpg", image), ("a.txt", text.encode()), ("b.jpg", image), ("b.json", as_json), ("c.jpg", image)]
        make_tar(tmp_path / "0.tar", members)
        rows = [{"key": key, "status": "success", "caption": text} for key in "abc"]
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "0.parquet")
        assert captions(build(tmp_path)) == ["Blue Widget\n- 20% off today"] * 3
        assert not build_index([Subset(tmp_path, ".txt", any_line=True)], use_cache=False).warnings

    def test_json_is_never_trained_as_text(self, tmp_path, make_tar, make_picture):
        image = make_picture(16, 8)
        members = [
            ("a.jpg", image),
            ("a.json", b'{"caption": "a dog", "width": 16}'),
            ("b.jpg", image),
            ("b.json", b"{"),
        ]
        make_tar(tmp_path / "0.tar", members)
        assert captions(build(tmp_path, ".json")) == ["a dog", ""]

    def test_a_blank_caption_does_not_hide_the_next_source(self, tmp_path, make_tar, make_picture):
        image = make_picture(16, 8)
        members = [("a.jpg", image), ("a.txt", b" \n\t\n"), ("a.json", b'{"caption": "of json"}')]
        make_tar(tmp_path / "0.tar", [*members, ("b.jpg", image), ("b.json", b'{"caption": " "}')])
        (tmp_path / "c.jpg").write_bytes(image)
        (tmp_path / "c.txt").write_bytes(b"\xef\xbb\xbf\n")
        index = build_index([Subset(tmp_path, ".txt", class_words="words")], use_cache=False)
        assert captions(index) == ["of json", "words", "words"]
        assert index.warnings == (
            f"2 caption files of --train_data_dir {tmp_path} are blank, and count as if they were not there: "
            f"{tmp_path}/0.tar:a; {tmp_path}/c.jpg.",
        )

    @pytest.mark.parametrize(
        ("text", "reason"),
        [
            ("it\u2019s a caf\xe9".encode("cp1252"), "byte 2 is 0x92, perhaps Windows' CP1252 .*iconv -f CP1252"),
            ("一只猫坐在垫子上".encode("gbk"), "byte 6 is 0xd7, perhaps GBK.*iconv -f GBK"),
            ("a photo".encode("utf-16-le"), "zero bytes, as UTF-16 without its mark.*iconv -f UTF-16LE"),
        ],
    )
    @pytest.mark.parametrize("in_tar", [True, False])
    def test_captions_in_another_encoding_are_bad_before_training(
        self, tmp_path, make_tar, make_picture, text, reason, in_tar
    ):
        files = [("a.jpg", make_picture(16, 8)), ("a.txt", text), ("b.jpg", make_picture(8, 8)), ("b.txt", b"b")]
        if in_tar:
            make_tar(tmp_path / "0.tar", files)
        else:
            [(tmp_path / name).write_bytes(data) for name, data in files]
        index = build(tmp_path)
        assert captions(index) == ["b"]
        ((_, found),) = index.bad
        assert re.search(reason, found)

    @pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-8-sig"])
    def test_captions_with_a_mark_are_read(self, pictures, encoding):
        path = pictures({"a.jpg": (16, 8), "b.jpg": (16, 8)})
        (path / "a.txt").write_bytes("une photo d\u2019été".encode(encoding))
        (path / "b.txt").write_bytes("b".encode(encoding))
        assert captions(build(path)) == ["une photo d\u2019été", "b"]

    def test_names_of_any_bytes_can_be_shown(self, tmp_path, make_tar, make_picture):
        make_tar(tmp_path / "0.tar", [("\x1b[2J\udcff猫.jpg", make_picture(16, 8)), ("\x1b[2J\udcff猫.txt", b"a")])
        index = build(tmp_path)
        assert captions(index) == ["a"]
        assert index.name(0) == f"{tmp_path}/0.tar:\\x1b[2J\\udcff猫"


class TestFolders:
    def test_captions_lie_beside_the_images(self, pictures):
        path = pictures({"b.jpg": (16, 8), "b.txt": "b", "a.x.PNG": (8, 16), "a.x.txt": "a\n", "notes.txt": "no image"})
        index = build(path)
        assert [index.name(row) for row in range(2)] == [str(path / "a.x.PNG"), str(path / "b.jpg")]
        assert sizes(index) == [(8, 16), (16, 8)]
        assert captions(index) == ["a", "b"]
        assert Reader(index).image(1) == (path / "b.jpg").read_bytes()
        assert index.warnings == ()

    def test_a_name_that_tells_of_a_face_finds_the_caption_without_it(self, pictures, monkeypatch):
        names = ["a_210_180_96_120.jpg", "b_1_2_3_4.jpg", "c_2_3_4.jpg"]
        texts = {"a.txt": "a face", "b_1_2_3_4.txt": "its own", "b.txt": "another", "c.txt": "three numbers are none"}
        path = pictures(dict.fromkeys(names, (16, 8)) | texts)
        assert captions(build(path)) == ["a face", "its own", ""]
        monkeypatch.setattr(sources_module, "_FILES_IN_SOURCE", 1)  # image and caption must be in one share
        index = build(path)
        assert {index.key(row): caption for row, caption in enumerate(captions(index))} == {
            names[0]: "a face", names[1]: "its own", names[2]: "",
        }  # fmt: skip

    def test_json_beside_an_image_is_its_caption(self, pictures):
        path = pictures({"a.jpg": (16, 8), "a.json": '{"caption": "a dog"}', "b.jpg": (16, 8), "b.json": "[1]"})
        pictures({"c.jpg": (16, 8), "c.json": '{"caption": NaN}', "d.jpg": (16, 8), "d.json": "{"})
        index = build(path, ".json")
        assert captions(index) == ["a dog", "", ""]
        ((name, reason),) = index.bad
        assert name == str(path / "d.jpg") and reason.startswith("its caption is no JSON")

    def test_sizes_are_those_of_the_upright_picture(self, tmp_path):
        exif = Image.Exif()
        exif[0x0112] = 6
        Image.new("RGB", (40, 20)).save(tmp_path / "a.jpg", exif=exif)
        (tmp_path / "a.txt").write_text("a")
        assert sizes(build(tmp_path)) == [(20, 40)]

    def test_dreambooth_directories_repeat_and_give_class_words(self, pictures):
        path = pictures(
            {
                "3_sks dog/1.jpg": (16, 8),
                "3_sks dog/2.jpg": (16, 8),
                "3_sks dog/2.txt": "a dog in the snow",
                "1_cat/1.jpg": (16, 8),
                "0_off/1.jpg": (16, 8),
                "others/1.jpg": (16, 8),
                "top.jpg": (16, 8),
            }
        )
        index = build(path)
        assert captions(index) == ["cat", "sks dog", "a dog in the snow"]
        assert repeats(index) == [1, 3, 3]
        assert sorted(warning.partition(" are not used")[0] for warning in index.warnings) == [
            f"1 images directly in {path}",
            f"1 images in {path / '0_off'}",
            f"1 images in {path / 'others'}",
        ]

    def test_a_subset_given_as_the_base_folder_is_noticed(self, pictures):
        path = pictures({"1.jpg": (16, 8), "1.txt": "a"}, "10_sks dog")
        index = build(path)
        assert repeats(index) == [1]
        assert "parent folder" in index.warnings[0]

    def test_shards_and_images_in_one_folder_are_both_read(self, pictures, make_shard):
        path = pictures({"1.jpg": (16, 8), "1.txt": "a"})
        make_shard(path, 0, [(20, 10)])
        assert sizes(build(path)) == [(20, 10), (16, 8)]

    def test_what_changed_since_is_a_sample_error(self, pictures):
        path = pictures({"1.jpg": (16, 8), "1.txt": "a", "2.jpg": (16, 8), "2.txt": "b"})
        index = build(path)
        (path / "1.jpg").unlink()
        (path / "2.txt").write_bytes(b"\xff\xfe\xfa")
        with pytest.raises(SampleError, match="No such file"):
            Reader(index).image(0)
        with pytest.raises(SampleError, match="its caption is no whole UTF-16 text"):
            Reader(index).caption(1)


class TestErrors:
    def test_no_images(self, tmp_path):
        (tmp_path / "1.heic").touch()
        (tmp_path / ".hidden").mkdir()
        (tmp_path / ".hidden" / "1.png").touch()
        with pytest.raises(InputError) as error:
            build(tmp_path)
        message = str(error.value)
        assert f"--train_data_dir {tmp_path}: 0 images found" in message
        assert "*.tar" in message
        assert ".jpg" in message
        assert "1 files in" in message and "(1 .heic)" in message and f"{tmp_path / '1.heic'}." in message

    def test_no_such_folder(self, tmp_path):
        with pytest.raises(InputError, match="there is no such folder"):
            build(tmp_path / "nowhere")
        (tmp_path / "a.zip").write_bytes(b"PK")
        with pytest.raises(InputError, match="not a tar"):
            build(tmp_path / "a.zip")

    def test_a_wrong_caption_extension_is_named_with_the_right_one(self, pictures):
        path = pictures({f"{number}.{kind}": "text" for number in range(3) for kind in ("txt",)})
        pictures({f"{number}.jpg": (16, 8) for number in range(3)})
        with pytest.raises(InputError, match=r"none of the 3 images.*'\.caption'.*--caption_extension \.txt"):
            build(path, ".caption")
        (path / "0.caption").write_text("one")
        (warning,) = build(path, ".caption").warnings
        assert "2 of 3 images have no caption" in warning
        assert "--caption_extension .txt" in warning

    def test_shards_without_any_caption(self, tmp_path, make_tar, make_picture):
        make_tar(tmp_path / "0.tar", [("a.jpg", make_picture(16, 8)), ("a.cap", b"a")])
        with pytest.raises(InputError, match=r"none of the 1 images.*--caption_extension \.cap"):
            build(tmp_path)

    def test_only_broken_images(self, tmp_path):
        (tmp_path / "a.jpg").write_bytes(b"nothing")
        with pytest.raises(InputError, match=r"0 images found in 1 shards.*a\.jpg: UnidentifiedImageError"):
            build(tmp_path)

    def test_an_empty_shard(self, tmp_path):
        (tmp_path / "0.tar").touch()
        with pytest.raises(InputError, match=r"0 images found.*0\.tar: it is empty, it ends at byte 0"):
            build(tmp_path)


class TestCache:
    @pytest.fixture
    def scans(self, monkeypatch):
        """Names of the shards and folders that are really scanned."""
        seen = []
        scan_shard, scan_folder = index_module.scan_shard, index_module.scan_folder

        def shard(source):
            seen.append(source.path.name)
            return scan_shard(source)

        def folder(source, *rest):
            seen.append(source.path.name)
            return scan_folder(source, *rest)

        monkeypatch.setattr(index_module, "scan_shard", shard)
        monkeypatch.setattr(index_module, "scan_folder", folder)
        return seen

    @staticmethod
    def same(one, other):
        return one.fingerprint == other.fingerprint and one.warnings == other.warnings and sizes(one) == sizes(other)

    def test_only_what_changed_is_scanned_again(self, tmp_path, make_shard, make_tar, scans):
        data = tmp_path / "data"
        data.mkdir()
        for number in range(3):
            make_shard(data, number, [(20, 10), (30, 40)])
        make_tar(data / "torn.tar", [("x.jpg", b"<html>"), ("y.txt", b"y")])
        first = build(data, use_cache=True)
        assert sorted(scans) == ["00000.tar", "00001.tar", "00002.tar", "torn.tar"]
        scans.clear()
        second = build(data, use_cache=True)
        assert scans == []
        assert self.same(first, second)
        assert first.bad == second.bad
        (data / "00001.parquet").rename(data / "kept")
        make_shard(data, 1, [(50, 60)], parquet=False)
        (data / "kept").rename(data / "00001.parquet")  # the same as before: the tar alone has changed
        assert len(build(data, use_cache=True)) == 5
        assert scans == ["00001.tar"]
        scans.clear()
        (data / "00002.parquet").unlink()
        build(data, use_cache=True)
        assert scans == ["00002.tar"]
        scans.clear()
        build(data, ".caption", use_cache=True)
        assert len(scans) == 4
        assert {path.name for path in tmp_path.iterdir()} == {"data"}

    def test_a_pillow_that_knows_more_kinds_reads_what_one_without_them_left_out(self, pictures, scans, monkeypatch):
        path = pictures({"1.jpg": (16, 8), "1.txt": "a"})
        check = image_header.features.check
        with monkeypatch.context() as before:
            before.setattr(image_header.features, "check", lambda kind: kind != "avif" and check(kind))
            build(path, use_cache=True)
        build(path, use_cache=True)
        build(path, use_cache=True)
        assert scans == ["images", "images"]

    def test_a_moved_data_set_is_not_scanned_again_and_named_rightly(self, tmp_path, make_shard, scans):
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        make_shard(old, 0, [(20, 10)]).with_suffix(".parquet").write_bytes(b"damaged")
        build(old, use_cache=True)
        old.rename(new)
        scans.clear()
        index = build(new, use_cache=True)
        assert scans == []
        assert index.name(0) == f"{new / '00000.tar'}:000000000"
        assert index.warnings[0].startswith(str(new))

    def test_folders_are_kept_too_and_a_new_caption_is_seen(self, pictures, scans):
        path = pictures({"1.jpg": (16, 8), "1.txt": "a"})
        build(path, use_cache=True)
        build(path, use_cache=True)
        assert scans == ["images"]
        pictures({"2.jpg": (30, 8), "2.txt": "b"})
        assert captions(build(path, use_cache=True)) == ["a", "b"]
        pictures({"1.jpg": (64, 8)})
        assert sizes(build(path, use_cache=True)) == [(64, 8), (30, 8)]

    def test_data_that_may_not_be_written_is_kept_elsewhere(self, tmp_path, make_shard, scans, cache_home):
        make_shard(tmp_path, 0, [(20, 10)])
        tmp_path.chmod(0o555)
        try:
            build(tmp_path, use_cache=True)
            build(tmp_path, use_cache=True)
            assert scans == ["00000.tar"]
            assert sorted(path.name for path in tmp_path.iterdir()) == ["00000.parquet", "00000.tar"]
            assert len(list(cache_home.rglob("*.rows"))) == 1
        finally:
            tmp_path.chmod(0o755)

    def test_a_damaged_cache_is_replaced(self, tmp_path, make_shard, scans):
        make_shard(tmp_path, 0, [(20, 10)])
        first = build(tmp_path, use_cache=True)
        (kept,) = (tmp_path / ".image_index").glob("*.rows")
        data = kept.read_bytes()
        for damaged in (b"", data[:100], data[: len(data) // 2]):
            kept.unlink()  # and no other content for those who have it mapped
            kept.write_bytes(damaged)
            assert self.same(build(tmp_path, use_cache=True), first)
        scans.clear()
        build(tmp_path, use_cache=True)
        assert scans == []

    def test_tables_of_a_shard_as_it_was_are_deleted_when_they_are_old(self, tmp_path, make_shard):
        make_shard(tmp_path, 0, [(20, 10)])
        make_shard(tmp_path, 1, [(20, 10)])
        build(tmp_path, use_cache=True)
        build(tmp_path, ".caption", use_cache=True)
        kept = set((tmp_path / ".image_index").glob("*.rows"))
        make_shard(tmp_path, 0, [(64, 10)])
        build(tmp_path, use_cache=True)
        assert len(list((tmp_path / ".image_index").glob("*.rows"))) == 5
        for path in kept:
            os.utime(path, (0, 0))
        make_shard(tmp_path, 1, [(64, 10), (20, 10)])
        build(tmp_path, use_cache=True)
        now = set((tmp_path / ".image_index").glob("*.rows"))
        assert len(kept) == len(now) == 4  # two shards, two caption extensions
        assert len(kept & now) == 2  # those of the other caption extension

    def test_a_cache_that_cannot_be_written_is_done_without(self, tmp_path, make_shard):
        make_shard(tmp_path, 0, [(20, 10)])
        (tmp_path / ".image_index").write_text("a file where the cache's folder would be")
        assert len(build(tmp_path, use_cache=True)) == 1


class TestNested:
    def test_images_and_shards_are_found_at_any_depth(self, tmp_path, pictures, make_shard):
        path = pictures({"b/x/1.jpg": (16, 8), "b/x/1.txt": "one", "a/2.jpg": (20, 8), "a/2.txt": "two"})
        make_shard(path / "b", 0, [(30, 10)])
        (path / "b" / "round").symlink_to(path)  # a link that leads back is not followed for ever
        index = build(path)
        assert sizes(index) == [(30, 10), (20, 8), (16, 8)]
        assert captions(index)[1:] == ["two", "one"]
        assert index.name(2) == str(path / "b" / "x" / "1.jpg")

    def test_a_class_folder_has_what_lies_deeper_in_it(self, pictures):
        path = pictures({"3_sks dog/snow/1.jpg": (16, 8), "others/deep/1.jpg": (16, 8)})
        index = build(path)
        assert captions(index) == ["sks dog"]
        assert repeats(index) == [3]
        assert [warning[:20] for warning in index.warnings] == [f"1 images in {path / 'others'}"[:20]]

    def test_a_large_folder_is_scanned_in_shares_and_only_the_changed_one_again(self, pictures, monkeypatch):
        monkeypatch.setattr(sources_module, "_FILES_IN_SOURCE", 4)
        names = [f"{number}" for number in range(30)]
        path = pictures({f"{name}.jpg": (16, 8) for name in names} | {f"{name}.txt": name for name in names})
        seen = []
        scan_folder = index_module.scan_folder
        monkeypatch.setattr(
            index_module, "scan_folder", lambda *given: seen.append(len(given[1])) or scan_folder(*given)
        )
        index = build(path, use_cache=True)
        assert sorted(captions(index)) == sorted(names)
        assert [index.name(row) for row in range(30)] == [str(path / f"{name}.jpg") for name in captions(index)]
        assert len(seen) == 8
        seen.clear()
        pictures({"new.jpg": (16, 8), "new.txt": "new"})
        assert sorted(captions(build(path, use_cache=True))) == sorted([*names, "new"])
        assert len(seen) == 1


class TestMetadata:
    @pytest.fixture
    def path(self, pictures):
        names = ["a.jpg", "b.jpg", "c.png", "deep/d.jpg", "deep/e.jpg", "f.jpg"]
        return pictures(dict.fromkeys(names, (16, 8)) | {"c.txt": "from its file", "f.txt": "unnamed"})

    @staticmethod
    def build(path, content, **options):
        (path.parent / "meta.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return build_index([Subset(path, ".txt", path.parent / "meta.json")], **options)

    def test_its_images_and_no_others_train_with_its_captions(self, path):
        content = {
            "a": {"caption": "one", "tags": "x, y"},
            "b.jpg": {"tags": "z", "train_resolution": [512, 512]},
            "c": {},
            "deep/d": {"caption": "deep"},
            str(path / "deep" / "e.jpg"): {"caption": "whole path"},
            "gone": {"caption": "?"},
        }
        index = self.build(path, content)
        assert captions(index) == ["one, x, y", "z", "from its file", "deep", "whole path"]
        assert index.warnings == (
            f"1 images in {path} are not used, because {path.parent / 'meta.json'} does not name them.",
            f"1 keys of {path.parent / 'meta.json'} name no image in {path}: gone.",
        )

    def test_a_stem_alone_is_enough(self, path):
        assert captions(self.build(path, {"e": {"caption": "by stem"}})) == ["by stem"]

    def test_a_stem_is_that_of_the_image_on_top_or_of_the_only_one(self, path, pictures):
        """As in sd-scripts, where it never is that of several."""
        pictures(dict.fromkeys(["deep/a.jpg", "x/one.jpg", "x/one.png", "x/two.jpg", "y/two.jpg"], (16, 8)))
        index = self.build(path, {stem: {"caption": stem} for stem in ("a", "one", "two")})
        assert {index.name(row): caption for row, caption in enumerate(captions(index))} == {
            f"{path}/a.jpg": "a", f"{path}/x/one.jpg": "one", f"{path}/x/one.png": "one",
        }  # fmt: skip
        (several,) = [warning for warning in index.warnings if "several images" in warning]
        assert several == (
            f"1 keys of {path.parent / 'meta.json'} could be several images in {path}, and are not used: "
            "two (x/two.jpg, y/two.jpg …). Give their paths inside that folder."
        )
        assert not any("name no image" in warning for warning in index.warnings)

    def test_keys_are_paths_however_they_are_written(self, path, monkeypatch):
        monkeypatch.chdir(path.parent)
        (path.parent / "link").symlink_to(path)
        keys = ["./a.jpg", "deep\\d.jpg", f"{path}/deep/../b.jpg", "images/c", str(path.parent / "link/f.jpg")]
        assert captions(self.build(path, {key: {"caption": key} for key in keys[:4]})) == [
            keys[0], keys[2], keys[3], keys[1],
        ]  # fmt: skip
        (path.parent / "meta.json").write_text(json.dumps({key: {"caption": key} for key in keys}), "utf-8-sig")
        index = build_index([Subset(Path("link"), ".txt", Path("meta.json"))], use_cache=False)
        assert captions(index) == [keys[0], keys[2], keys[4], keys[1]]  # where the link leads, too

    def test_captions_keep_their_lines_each_with_the_tags(self, path):
        content = {
            "a": {"caption": "one\ntwo\u2028three\n", "tags": ["x", "y"]},
            "b": {"tags": "{x|{y|z}}\nw"},
            "c": {"caption": float("nan"), "tags": None},
            "f": {"caption": ["one", "two"]},
        }
        index = self.build(path, content)
        assert captions(index) == ["one, x, y\ntwo three, x, y", "{x|{y|z}}\nw", "from its file", "one\ntwo"]
        assert any("3 captions" in warning and "--enable_wildcard" in warning for warning in index.warnings)

    def test_captions_that_no_file_could_hold_are_bad_samples(self, path):
        index = self.build(path, {"a": {"caption": "\ud800"}, "b": {"caption": "x" * (1 << 21)}, "c": {"caption": "c"}})
        assert captions(index) == ["c"]
        assert [reason[:25] for _, reason in index.bad] == ["its caption has half a ch", "a caption of 2097152 char"]

    def test_keys_that_stand_twice_are_said(self, path):
        index = self.build(path, '{"a": {"caption": "first"}, "b": {"caption": "b"}, "a": {"caption": "second"}}')
        assert captions(index) == ["second", "b"]
        assert any(warning.startswith("1 keys stand twice") and warning.endswith(": a.") for warning in index.warnings)

    def test_a_list_of_lines_is_refused_by_its_name(self, path):
        (path.parent / "meta.jsonl").write_text('{"file_name": "a.jpg", "text": "a"}')
        with pytest.raises(InputError, match=r"meta\.jsonl: is a list of JSON lines. It must be one object"):
            build_index([Subset(path, ".txt", path.parent / "meta.jsonl")])

    def test_a_changed_caption_is_seen(self, path):
        first = self.build(path, {"a": {"caption": "one"}})
        assert captions(self.build(path, {"a": {"caption": "two"}})) == ["two"]
        assert captions(first) == ["one"]

    @pytest.mark.parametrize(
        ("content", "message"),
        [
            ("{", r"meta\.json: is not JSON"),
            ("[]", r"meta\.json: must be one object"),
            ({"a": "text"}, r"meta\.json: a: must be an object"),
            ({"a": {"caption": 3}}, r'meta\.json: a: "caption" must be a text, got 3'),
            ({"x": {"caption": "y"}}, r"0 images found.*1 keys .* name no image"),
            ({"a": {"caption": float("inf")}, "b": "x"}, r'a: "caption" must be a text, got inf; b: must be an object'),
            ({"a": {"tags": ["x", 1]}}, r'meta\.json: a: "tags" must be a text'),
            ("[" * 100_000, r"meta\.json: is not JSON"),
            ({"a": {}}, r"none of the 1 images has a caption.*or in .*meta\.json"),
        ],
    )
    def test_what_is_wrong_with_it_is_said(self, path, content, message):
        with pytest.raises(InputError, match=message):
            self.build(path, content, use_cache=False)

    def test_shards_are_not_its_business(self, path, make_shard):
        make_shard(path, 0, [(20, 10)])
        index = self.build(path, {"a": {"caption": "one"}})
        assert captions(index) == ["one"]
        assert any("1 shards are not used" in warning for warning in index.warnings)


class TestFingerprint:
    def test_it_stays_when_the_data_is_moved_or_touched(self, tmp_path, make_shard):
        old, new = tmp_path / "old", tmp_path / "new"
        old.mkdir()
        make_shard(old, 0, [(20, 10)])
        before = build(old).fingerprint
        old.rename(new)
        (new / "00000.tar").touch()
        assert build(new).fingerprint == before

    @pytest.mark.parametrize("change", ["picture", "caption", "name", "more", "repeats"])
    def test_it_changes_with_what_is_trained_in_which_order(self, pictures, change):
        path = pictures({"1_a/1.jpg": (16, 8), "1_a/1.txt": "a", "1_a/2.jpg": (16, 8)})
        before = build(path).fingerprint
        if change == "picture":
            pictures({"1_a/1.jpg": (17, 8)})
        elif change == "caption":
            (path / "1_a" / "1.txt").unlink()
        elif change == "name":
            (path / "1_a" / "2.jpg").rename(path / "1_a" / "0.jpg")
        elif change == "more":
            pictures({"2_b/1.jpg": (16, 8)})
        else:
            (path / "1_a").rename(path / "2_a")
        assert build(path).fingerprint != before


SLOW_BUILD = """
import sys, time
from pathlib import Path
from library.data.index import table as index
from library.data.index.sources import Subset
scan_shard = index.scan_shard

def slow(source):
    with open(sys.argv[2], "a") as log:
        log.write(source.path.name + "\\n")
    time.sleep(float(sys.argv[3]))
    return scan_shard(source)

index.scan_shard = slow
print(index.build_index([Subset(Path(sys.argv[1]), ".txt")]).fingerprint)
"""


class TestManyProcesses:
    @staticmethod
    def start(data, log, seconds):
        command = [sys.executable, "-c", SLOW_BUILD, str(data), str(log), str(seconds)]
        return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=Path(__file__).parents[3])

    def test_one_builds_and_the_others_wait_for_it(self, tmp_path, make_shard):
        data, log = tmp_path / "data", tmp_path / "log"
        data.mkdir()
        for number in range(3):
            make_shard(data, number, [(20, 10)])
        processes = [self.start(data, log, 0.2) for _ in range(3)]
        fingerprints = {process.communicate(timeout=60)[0] for process in processes}
        assert len(fingerprints) == 1
        assert sorted(log.read_text().split()) == ["00000.tar", "00001.tar", "00002.tar"]

    def test_one_that_waits_can_be_stopped(self, tmp_path, make_shard):
        """A signal asks for a stop by a flag, which `between` looks at: also while another process holds the lock."""
        make_shard(tmp_path, 0, [(20, 10)])
        builder = self.start(tmp_path, tmp_path / "log", 3)
        while not (tmp_path / "log").exists():
            time.sleep(0.02)

        def stop():
            raise InterruptedError

        with pytest.raises(InterruptedError):
            index_cache.tables([index_cache.Job(tmp_path / ".image_index" / "a.b.rows", dict)], between=stop)
        assert builder.poll() is None
        builder.kill()
        builder.wait()

    def test_one_that_is_killed_leaves_what_it_finished_and_nobody_waits_for_it(self, tmp_path, make_shard):
        data, log = tmp_path / "data", tmp_path / "log"
        data.mkdir()
        for number in range(2):
            make_shard(data, number, [(20, 10)])
        first = self.start(data, log, 0.5)
        while not (log.exists() and "00001.tar" in log.read_text()):
            assert first.poll() is None
            time.sleep(0.02)
        first.kill()
        first.wait()
        second = self.start(data, log, 0)
        assert second.communicate(timeout=60)[0].strip() == build(data).fingerprint
        assert log.read_text().split() == ["00000.tar", "00001.tar", "00001.tar"]

    def test_processes_find_what_one_does(self, tmp_path, make_shard, make_tar, monkeypatch):
        for number in range(3):
            make_shard(tmp_path, number, [(20, 10), (30, 40)])
        make_tar(tmp_path / "bad.tar", [("a.jpg", b"<html>"), ("a.txt", b"a")])
        alone = build(tmp_path)
        monkeypatch.setattr(parallel, "_ALONE_SECONDS", -1)
        monkeypatch.setattr(parallel, "_MOST", 2)
        kept, not_kept = build(tmp_path, use_cache=True), build(tmp_path)
        for index in (kept, not_kept):
            assert index.fingerprint == alone.fingerprint
            assert [name for name, _ in index.bad] == [name for name, _ in alone.bad]
            assert len(index.warnings) == len(alone.warnings) == 1
            assert captions(index) == captions(alone)
        make_shard(tmp_path, 0, [(5, 5)])
        (tmp_path / "00001.tar").unlink()
        (tmp_path / "00001.tar").mkdir()  # not a shard any more
        assert len(build(tmp_path, use_cache=True)) == 3

    def test_an_index_goes_to_other_processes_without_its_rows(self, tmp_path, make_shard):
        make_shard(tmp_path, 0, [(20, 10)] * 400)
        index = build(tmp_path, use_cache=True)
        assert captions(index)[0]
        sent = pickle.dumps(index)
        assert len(sent) < 3000
        assert captions(pickle.loads(sent)) == captions(index)


@pytest.mark.parametrize("told", ["parquet", "json", "nothing"])
@pytest.mark.parametrize(("extension", "format"), [("jpg", "JPEG"), ("webp", "WEBP"), ("png", "PNG"), ("avif", "AVIF")])
def test_an_image_that_exif_turns_has_its_upright_size_whatever_the_parquet_says(
    tmp_path, make_tar, told, extension, format
):
    """img2dataset without re-encoding stores the picture as it is, with the size of the picture as it is stored."""
    members, rows = [], []
    for number, orientation in enumerate((1, 3, 6, 8)):
        exif = Image.Exif()
        exif[0x0112] = orientation
        file = io.BytesIO()
        Image.new("RGB", (40, 20)).save(file, format, exif=exif)
        facts = {"key": f"{number:09d}", "status": "success", "width": 40, "height": 20, "caption": "c"}
        rows.append(facts)
        members += [(f"{number:09d}.{extension}", file.getvalue()), (f"{number:09d}.txt", b"c")]
        if told == "json":
            members.append((f"{number:09d}.json", json.dumps(facts).encode()))
    make_tar(tmp_path / "00000.tar", members)
    if told == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), tmp_path / "00000.parquet")
    assert sizes(build(tmp_path)) == [(40, 20), (40, 20), (20, 40), (20, 40)]


def test_progress_counts_to_the_end(tmp_path, make_shard, pictures):
    path = pictures({f"{number}.jpg": (16, 8) for number in range(3)} | {"0.txt": "a"})
    make_shard(path, 0, [(20, 10)])
    seen = []
    build(path, progress=lambda subset: lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 4)
    assert seen[-1] == (4, 4)
    assert {total for _, total in seen} == {4}
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)


def test_more_shards_than_are_kept_open(tmp_path, make_shard, monkeypatch):
    from library.data.sample import reader as reader_module

    monkeypatch.setattr(reader_module, "_MAX_OPEN", 2)
    for number in range(5):
        make_shard(tmp_path, number, [(20, 10)])
    index = build(tmp_path)
    reader = Reader(index)
    wanted = np.random.default_rng(0).integers(0, 5, 40)
    assert [reader.caption(row)[:9] for row in wanted] == [f"picture {row}" for row in wanted]
    assert len(reader._open) <= 2
    shutil.rmtree(tmp_path)
    assert reader.index.name(0)
