"""Tars of all kinds: index and stream use the same samples of them, and count each image that they do not use."""

import gzip
import io
import shutil
import subprocess
import tarfile
from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from library.data.bad_samples import SampleError, check_left_out
from library.data.index.rows import row_keys
from library.data.index.shard_members import MemberName
from library.data.index.shards import scan_shard
from library.data.index.sources import Source, Subset
from library.data.index.table import build_index
from library.data.index.tar_headers import TornTarError, members
from library.data.sample.reader import Reader
from library.data.stream import reader as reader_module
from library.data.stream.reader import StreamReader
from library.data.stream.shard_bytes import Patience
from library.data.stream.shard_samples import StreamSubset, shard_samples
from library.errors import InputError
from test.data.conftest import picture, write_tar
from test.data.stream.test_streams import prepare_layout

JPEG = picture(40, 30)
QUICK = Patience(timeout_s=0.3, tries=1)


def file(name, content=JPEG):
    return name, content


def sample(key, text=b"a text"):
    return [file(f"{key}.jpg"), file(f"{key}.txt", text)]


def tar(*members, format=tarfile.GNU_FORMAT, **options):
    """The bytes of a tar; a member is (name, content), (name, content, pax fields) or (name, TarInfo)."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=format, **options) as archive:
        for name, content, *fields in members:
            info = content if isinstance(content, tarfile.TarInfo) else tarfile.TarInfo(name)
            info.name = name
            info.pax_headers = fields[0] if fields else {}
            if isinstance(content, bytes):
                info.size = len(content)
            archive.addfile(info, io.BytesIO(content) if isinstance(content, bytes) else None)
    return out.getvalue()


def link(name, target, kind=tarfile.LNKTYPE):
    info = tarfile.TarInfo()
    info.type, info.linkname = kind, target
    return name, info


def with_header(data, name, change):
    """The tar with a change of the header of a member, and its checksum made right."""
    data = bytearray(data)
    at = next(at for at in range(0, len(data), 512) if data[at : at + 100].rstrip(b"\0") == name.encode())
    header = data[at : at + 512]
    change(header)
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data[at : at + 512] = header
    return bytes(data)


def signed(data, name):
    """The tar with the checksum of one header as the sum of signed bytes."""
    data, at = bytearray(data), data.index(name.encode())
    header = data[at : at + 148] + b" " * 8 + data[at + 156 : at + 512]
    data[at + 148 : at + 156] = b"%06o\0 " % (sum(header) - 256 * sum(byte > 127 for byte in header))
    return bytes(data)


def set_bytes(at, value):
    def change(header):
        header[at : at + len(value)] = value

    return change


def sparse(keep_blocks):
    """A GNU sparse member of two pieces whose map goes on in blocks of its own."""
    content = JPEG.ljust(1024, b"\0")[:1024]
    data = bytearray(tar(*sample("a"), file("b.jpg", content), file("b.txt", b"b"), *sample("c")))
    at = data.index(b"b.jpg")
    header = data[at : at + 512]
    header[156:157] = b"S"
    header[386 : 386 + 48] = b"%011o\0%011o\0%011o\0%011o\0" % (0, 512, 9000, 512)
    header[482] = 1 if keep_blocks else 0
    header[483:495] = b"%011o\0" % 9512
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    blocks = [bytes(504) + b"\1" + bytes(7), bytes(512)][:keep_blocks]
    return bytes(data[:at] + header + b"".join(blocks) + data[at + 512 :])


def cut(data, name, more):
    """The tar up to so many bytes behind the beginning of a member's header."""
    return data[: data.index(name.encode()) + more]


TWO = tar(*sample("a"), *sample("b"))
KEPT, AND_C = {"a", "b"}, {"a", "c"}
# Kind: (the tar, the keys that are used, how many images are lost)
KINDS = {
    "plain": (TWO, KEPT, 0),
    "nothing": (b"", set(), 1),
    "zeros alone": (bytes(10240), set(), 1),
    "a page": (b"<html>" * 300, set(), 1),
    "gzip": (gzip.compress(TWO), set(), 1),
    "two tars behind each other": (TWO + tar(*sample("c"), *sample("d")), {"a", "b", "c", "d"}, 0),
    "of one key each": (TWO + tar(*sample("b"), *sample("c")), {"a", "b", "c"}, 1),
    "zeros within": (TWO.rstrip(b"\0").ljust(-(-len(TWO.rstrip(b"\0")) // 512) * 512, b"\0") + bytes(512)
                     + tar(*sample("c")), {"a", "b", "c"}, 0),
    "zeros first": (bytes(1024) + TWO, KEPT, 0),
    "much behind the end": (TWO + b"\1" * 2000, KEPT, 1),
    "a gzip behind the end": (TWO + gzip.compress(TWO).ljust(1024, b"\1"), KEPT, 1),
    "a few bytes behind the end": (TWO + b"\n", KEPT, 0),
    "a hard link as image": (tar(*sample("a"), link("b.jpg", "a.jpg"), file("b.txt", b"b"), *sample("c")), AND_C, 1),
    "a hard link as text": (tar(*sample("a"), file("b.jpg"), link("b.txt", "a.txt"), *sample("c")), {"a", "c"}, 1),
    "a symbolic link": (tar(*sample("a"), link("b.jpg", "a.jpg", tarfile.SYMTYPE), *sample("c")), {"a", "c"}, 1),
    "a link of no use": (tar(*sample("a"), link("a.cls", "b.cls"), *sample("b")), KEPT, 0),
    "a hard link that has a size": (
        with_header(tar(*sample("a"), link("c.jpg", "a.jpg"), *sample("b")), "c.jpg", set_bytes(124, b"00000001000\0")),
        KEPT, 1,
    ),
    "a device": (tar(*sample("a"), link("c.jpg", "", tarfile.CHRTYPE), *sample("b")), KEPT, 1),
    "sparse": (sparse(0), {"a", "c"}, 1),
    "sparse, with a long map": (sparse(2), {"a", "c"}, 1),
    "sparse in pax": (
        tar(*sample("a"), ("GNUSparseFile.1/b.jpg", JPEG, {"GNU.sparse.major": "1", "GNU.sparse.name": "b.jpg"}),
            file("b.txt", b"b"), *sample("c"), format=tarfile.PAX_FORMAT), {"a", "c"}, 1,
    ),
    "folders": (tar(link("x", "", tarfile.DIRTYPE), *sample("x/a"), *sample("y/a")), {"x/a", "y/a"}, 0),
    "folders as the oldest tars have them": (
        with_header(tar(file("x/", b""), *sample("x/a")), "x/", set_bytes(156, b"\0")), {"x/a"}, 0,
    ),
    "names that lead out": (tar(*sample("/a"), *sample("../b"), *sample("x/../../c"), *sample("d")), {"d"}, 3),
    "the same name at once": (tar(file("a.jpg"), *sample("a"), *sample("b")), {"b"}, 2),
    "the same name later": (tar(*sample("a"), *sample("b"), *sample("a")), KEPT, 1),
    "two images of a key": (tar(*sample("a"), file("c.jpg"), file("c.png"), file("c.JPEG"), *sample("b")), KEPT, 3),
    "no image": (tar(*sample("a"), file("c.txt"), file("d.heic"), file("d.txt"), *sample("b")), KEPT, 2),
    "an image without content": (tar(*sample("a"), file("c.jpg", b""), file("c.txt", b"c"), *sample("b")), KEPT, 1),
    "images without extension": (
        tar(*sample("a"), file("one"), file("two"), file("README", b"text"), *sample("b")), KEPT, 2,
    ),
    "hidden": (
        tar(file("._a.jpg", b"\0\5\x16\7"), *sample("a"), file(".c.jpg"), file(".DS_Store", b"x"), *sample("b")),
        KEPT, 1,
    ),
    "dots in keys": (
        tar(*sample("at 10.27.01"), *sample("at 10.27.02"), *sample("v1.5-3"), *sample("a")),
        {"at 10.27.01", "at 10.27.02", "v1.5-3", "a"}, 0,
    ),
    "words in keys": (tar(*sample("cat.one"), *sample("cat.two"), *sample("a")), {"a"}, 2),
    "words in keys beside an image": (tar(*sample("a"), *sample("a.final"), *sample("b")), KEPT, 1),
    "masks beside images": (tar(*sample("a"), file("a.mask.png"), *sample("b"), file("b.mask.png")), KEPT, 0),
    "masks without images": (tar(*sample("a"), file("c.depth.png"), file("c.mask.png"), *sample("b")), KEPT, 2),
    "several texts": (
        tar(file("a.0.txt", b"x"), file("a.1.txt", b"x"), *sample("a"), *sample("b"), file("b.0.txt", b"x")), KEPT, 0,
    ),
    "several texts without image": (
        tar(file("c.0.txt", b"x"), file("c.1.txt", b"x"), *sample("a"), *sample("b")), KEPT, 2,
    ),
    "cut within an image": (cut(tar(*sample("a"), *sample("b"), *sample("c")), "c.jpg", 700), KEPT, 1),
    "cut within a header": (cut(tar(*sample("a"), *sample("b"), *sample("c")), "c.jpg", 100), {"a"}, 1),
    "without an end mark": (cut(tar(*sample("a"), *sample("b"), *sample("c")), "c.jpg", 0), {"a"}, 1),
    "a size in base 256": (
        with_header(TWO, "b.jpg", set_bytes(124, b"\x80" + len(JPEG).to_bytes(11, "big"))), KEPT, 0,
    ),
    "a negative size": (
        with_header(tar(*sample("a"), *sample("b"), *sample("c")), "c.jpg", set_bytes(124, b"-0000000001\0")), {"a"}, 1,
    ),
    "a signed checksum": (signed(tar(*sample("a"), *sample("é")), "é.jpg"), {"a", "é"}, 0),
    "a size and a name in pax": (
        with_header(tar(*sample("a"), ("x", JPEG, {"path": "b.jpg", "size": str(len(JPEG))}), file("b.txt", b"b"),
                        format=tarfile.PAX_FORMAT), "x", set_bytes(124, b"00000000000\0")), KEPT, 0,
    ),
    "a name for all in pax": (
        tar(*sample("a"), *sample("b"), format=tarfile.PAX_FORMAT, pax_headers={"comment": "c" * 600}), KEPT, 0,
    ),
    "pax": (tar(*sample("é" * 80), *sample("x" * 200), format=tarfile.PAX_FORMAT), {"é" * 80, "x" * 200}, 0),
    "long names": (tar(*sample("y/" + "x" * 200), *sample("a")), {"y/" + "x" * 200, "a"}, 0),
}  # fmt: skip


def of_index(path, extension=".txt"):
    """The images of a shard's rows by key, and the names and reasons of what is lost."""
    part = scan_shard(Source(path, True, extension))
    keys = [key.decode("utf-8", "surrogateescape") for key in row_keys(part.rows, part.text)]
    data = path.read_bytes()
    images = [data[row["image_offset"] :][: row["image_bytes"]] for row in part.rows]
    assert len(set(keys)) == len(keys)
    return dict(zip(keys, images, strict=True)), part.bad


def lost(path):
    """How many samples of a shard are lost."""
    part = scan_shard(Source(path, True, ".txt"))
    return len(part.bad) + part.unnamed.total()


def of_stream(path, extension=".txt"):
    """The same of a stream, with a reason for each image that is lost."""
    images, lost, numbers = {}, [], []
    try:
        for found in shard_samples(f"file://{path}", StreamSubset(extension), QUICK):
            numbers.append(found.number)
            lost += [(found.name, found.bad)] * (found.lost if found.bad else 0) + list(found.beside)
            if not found.bad:
                images[found.name.rpartition(f"{path}:")[2]] = found.image
    except TornTarError as error:
        lost.append(("", str(error)))
    assert numbers == list(range(len(numbers)))
    return images, lost


@pytest.mark.parametrize("kind", KINDS)
def test_both_readers_use_the_same_samples_and_count_what_they_do_not_use(tmp_path, kind):
    data, used, lost = KINDS[kind]
    path = tmp_path / "0.tar"
    path.write_bytes(data)
    images, bad = of_index(path)
    assert (images.keys(), len(bad)) == (used, lost), bad
    assert set(images.values()) <= {JPEG}
    if used:
        index = build_index([Subset(path, ".txt")], use_cache=False)
        reader = Reader(index)
        assert all(reader.image(row) == JPEG and reader.caption(row) for row in range(len(index)))
    streamed, streamed_bad = of_stream(path)
    assert (streamed, len(streamed_bad)) == (images, lost), streamed_bad
    assert all(reason for _, reason in (*bad, *streamed_bad))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if not kind.startswith("sparse")])
def test_regular_members_are_those_that_tarfile_finds_where_it_reads_on_behind_zeros(tmp_path, kind):
    path = tmp_path / "0.tar"
    path.write_bytes(KINDS[kind][0])
    with path.open("rb") as opened:
        try:
            ours = [(member.name, member.offset, member.size) for member in members(opened.fileno()) if not member.odd]
        except TornTarError:
            return
    with tarfile.open(path, "r:", ignore_zeros=True) as archive:
        theirs = [
            (member.name, member.offset_data, member.size)
            for member in archive
            if member.type in (tarfile.REGTYPE, tarfile.AREGTYPE) and not member.issparse()
        ]
    assert ours == theirs


def test_keys_are_webdatasets_but_for_names_with_more_than_words_between_dots():
    from webdataset.tariterators import base_plus_ext

    for name in ("a.jpg", "x/y/a.json", "x.y/a.mask.png", "a.seg-1.PNG", "é.tar.gz", "a b.jpg", "a.JPG"):
        key, extension = base_plus_ext(name)
        assert MemberName.of(name) == MemberName(key, f".{extension.lower()}", key), name
    assert MemberName.of("x/.hidden.jpg") is None  # webdataset takes it for the folder's
    for name in ("README", ".jpg", "x.y/a", "._a.jpg"):
        assert MemberName.of(name) is None and base_plus_ext(name) == (None, None), name
    for name, key in {"at 10.27.jpg": "at 10.27", "v1.5-3.mask.png": "v1.5-3.mask", "a. b.jpg": "a. b"}.items():
        assert MemberName.of(name).key == key and MemberName.of(name).short_key == base_plus_ext(name)[0]


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
@pytest.mark.parametrize("format", ["gnu", "posix"])
def test_what_gnu_tar_makes_of_links_and_holes(tmp_path, format):
    data = tmp_path / "data"
    data.mkdir()
    for key in "abcd":
        (data / f"{key}.jpg").write_bytes(JPEG)
        (data / f"{key}.txt").write_text("a text")
    (data / "b.jpg").unlink()
    (data / "b.jpg").hardlink_to(data / "a.jpg")
    with (data / "c.jpg").open("wb") as hole:
        hole.write(JPEG)
        hole.truncate(1 << 20)
    names = [f"{key}.{ending}" for key in "abcd" for ending in ("jpg", "txt")]
    subprocess.run(
        ["tar", "--sparse", f"--format={format}", "-cf", str(tmp_path / "0.tar"), *names], cwd=data, check=True
    )
    images, bad = of_index(tmp_path / "0.tar")
    assert images.keys() == {"a", "d"} and of_stream(tmp_path / "0.tar")[0] == images
    assert [(name, reason.partition(",")[0]) for name, reason in bad] == [
        ("b", "its .jpg is a hard link to a.jpg"), ("c", "its .jpg is a sparse file"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("nothing", "0.tar: it is empty"),
        ("zeros alone", "0.tar: it holds no file"),
        ("a page", "0.tar: it is a page of HTML"),
        ("gzip", r"0.tar: it is a tar or file compressed by gzip; unpack it \(mv 0.tar 0.tar.gz; gunzip 0.tar.gz\)"),
    ],
)
def test_a_shard_that_is_none_is_named_with_what_it_is(tmp_path, kind, message):
    (tmp_path / "0.tar").write_bytes(KINDS[kind][0])
    with pytest.raises(InputError, match=message):
        build_index([Subset(tmp_path, ".txt")], use_cache=False)
    write_tar(tmp_path / "1.tar", sample("a"))
    index = build_index([Subset(tmp_path, ".txt")], use_cache=False)
    assert [name for name, _ in index.bad] == [str(tmp_path / "0.tar")]
    assert any("0.tar: it" in warning for warning in index.warnings)
    with pytest.raises(InputError, match="1 of 2 samples"):
        check_left_out(index.bad, len(index), 0.01)


@pytest.mark.parametrize(
    ("beside", "content", "count"),
    [
        ("0_stats.json", b'{"successes": 70}', 70),
        ("0_stats.json", b'\xef\xbb\xbf{"successes": 70.0}', 70),
        ("0_stats.json", '{"successes": 70}'.encode("utf-16"), 70),
        ("0_stats.json", b'{"successes": -3}', 1),
        ("0_stats.json", b'{"successes": NaN}', 1),
        ("0_stats.json", b'{"successes": "70"}', 1),
        ("0_stats.json", b"{", 1),
        ("0_stats.json", b"[" * 100_000, 1),
        ("0.parquet", b"PAR1 no", 1),
    ],
)
def test_a_shard_that_is_none_counts_as_its_stats_say(tmp_path, beside, content, count):
    (tmp_path / "0.tar").write_bytes(b"<html>")
    (tmp_path / beside).write_bytes(content)
    assert lost(tmp_path / "0.tar") == count


def test_a_torn_shard_counts_as_its_stats_say_and_a_whole_one_does_not(tmp_path):
    (tmp_path / "0_stats.json").write_text('{"successes": 70}')
    (tmp_path / "0.tar").write_bytes(KINDS["cut within an image"][0])
    assert lost(tmp_path / "0.tar") == 68
    (tmp_path / "0.tar").write_bytes(TWO)
    assert of_index(tmp_path / "0.tar")[1] == []
    assert lost(tmp_path / "0.tar") == 0


@pytest.mark.parametrize("beside", ["stats", "parquet"])
def test_many_samples_that_are_in_no_file_are_counted_without_an_entry_each(tmp_path, beside):
    (tmp_path / "0.tar").write_bytes(TWO if beside == "parquet" else b"<html>")
    write_tar(tmp_path / "1.tar", sample("x"))
    if beside == "stats":
        (tmp_path / "0_stats.json").write_text('{"successes": 10000}')
    else:
        keys, sizes = [f"far{number}" for number in range(10_000)], [64] * 10_000
        write_parquet(tmp_path / "0.parquet", key=keys, width=sizes, height=sizes)
    index = build_index([Subset(tmp_path, ".txt")], use_cache=False)
    assert index.left_out == 10_000 and len(index.bad) < 10
    assert any("10000 images cannot be read" in warning for warning in index.warnings)
    with pytest.raises(InputError, match=rf"10000 of {10_000 + len(index)} samples .*: 10000 ×"):
        check_left_out(index.bad, len(index), 0.5, index.unnamed)


def write_parquet(path, **columns):
    pq.write_table(pa.table(columns), path)


class TestParquet:
    def facts(self, tmp_path, keys, **columns):
        """Sizes by the parquet's say, of samples whose images are of another size, and what is lost."""
        write_tar(
            tmp_path / "0.tar", [member for key in keys for member in (file(f"{key}.jpg"), file(f"{key}.txt", b"t"))]
        )
        write_parquet(tmp_path / "0.parquet", **columns)
        part = scan_shard(Source(tmp_path / "0.tar", True, ".txt"))
        found = dict(zip(row_keys(part.rows, part.text), part.rows["width"].tolist(), strict=True))
        self.warnings = part.warnings
        return [found[key.encode()] for key in keys], [key for key, _ in part.bad]

    @pytest.mark.parametrize(
        "spelt",
        [
            ["000000001", "000000002"], [1, 2], [1.0, 2.0], ["1", "2"], [b"000000001", b"000000002"],
            pa.array([1, 2], pa.int32()), pa.array(["000000001", "000000002"]).dictionary_encode(),
        ],
        ids=str,
    )  # fmt: skip
    def test_keys_as_numbers_and_as_texts_are_the_same(self, tmp_path, spelt):
        sizes, bad = self.facts(tmp_path, ["000000001", "000000002"], key=spelt, width=[80, 81], height=[60, 60])
        assert (sizes, bad, self.warnings) == ([80, 81], [], [])

    def test_a_number_that_fits_two_keys_is_nobodys(self, tmp_path):
        sizes, bad = self.facts(tmp_path, ["01", "1", "2"], key=[1, 2], width=[80, 81], height=[60, 60])
        assert (sizes, bad) == ([40, 80, 81], [])  # "1" is the very text
        sizes, bad = self.facts(tmp_path, ["01", "001"], key=[1], width=[80], height=[60])
        assert (sizes, bad) == ([40, 40], [])

    def test_folders_in_the_tar_are_no_part_of_a_key(self, tmp_path):
        sizes, bad = self.facts(tmp_path, ["x/1", "y/1", "y/2"], key=["1", "2"], width=[80, 81], height=[60, 60])
        assert (sizes, bad) == ([40, 40, 81], [])

    @pytest.mark.parametrize(
        "width",
        [
            [float("nan"), -80.0], [None, 0], [True, True], ["80", "81"], [80.5, 1e300], [2**31, 2**62], [[80], [81]],
        ],
        ids=str,
    )  # fmt: skip
    def test_a_size_that_is_none_is_the_images(self, tmp_path, width):
        sizes, bad = self.facts(tmp_path, ["1", "2"], key=["1", "2"], width=width, height=[60, 60])
        assert (sizes, bad) == ([40, 40], [])

    def test_rows_of_another_shard_are_lost_and_named(self, tmp_path):
        sizes, bad = self.facts(tmp_path, ["1", "2"], key=["7", None, "8"], width=[80, 81, 82], height=[60, 60, 60])
        assert (sizes, bad) == ([40, 40], ["7", "8"])
        assert self.warnings == ["none of the 2 keys of its parquet file is in the tar: it may be another shard's."]

    def test_a_key_that_comes_twice_with_other_values_gives_none(self, tmp_path):
        sizes, bad = self.facts(tmp_path, ["1", "2"], key=["1", "1", "2"], width=[80, 81, 82], height=[60, 60, 60])
        assert (sizes, bad) == ([40, 82], [])
        assert "1 keys come twice" in self.warnings[0]

    def test_columns_that_are_missing_or_of_another_type_are_said(self, tmp_path):
        assert self.facts(tmp_path, ["1"], width=[80], height=[60]) == ([40], [])
        assert "no column 'key'" in self.warnings[0]
        assert self.facts(tmp_path, ["1"], key=["1"], caption=[["a", "b"]]) == ([40], [])
        assert "are no texts (list<" in self.warnings[0]
        path = tmp_path / "0.parquet"
        twice = pa.Table.from_arrays([pa.array(["1"]), pa.array(["1"])], names=["key", "key"])
        pq.write_table(twice, path)
        part = scan_shard(Source(tmp_path / "0.tar", True, ".txt"))
        assert len(part.rows) == 1 and "cannot be read" in part.warnings[0]


def test_a_stream_counts_a_shard_as_the_stats_beside_it_say(tmp_path, monkeypatch):
    monkeypatch.setattr(reader_module, "_READERS_OF_SLOT", 1)
    write_tar(tmp_path / "1.tar", sample("a"))
    (tmp_path / "0.tar").write_bytes(b"<html>" * 100)
    layout = prepare_layout([f"file://{tmp_path}/0.tar", f"file://{tmp_path}/1.tar"], batch_size=1, pool=1)
    lost = []
    for samples in (None, 70):
        shards = tuple(replace(shard, samples=samples) for shard in layout.shards)
        reader = StreamReader(replace(layout, shards=shards), 0)
        batches = [reader.next_batch(lambda found, *_: found) for _ in range(3)]
        names = [name for batch in batches for name, _ in batch.bad]
        assert set(names) == {f"file://{tmp_path}/0.tar"}
        lost.append(sum(batch.lost for batch in batches) / len(names))
    assert lost == [1, 70]


@pytest.mark.parametrize("comment_bytes", [20_000, 1_000_000])
def test_an_image_behind_a_large_pax_header_is_read_by_its_name(tmp_path, comment_bytes):
    """Its name is not ASCII, so that it stands in the pax header, in front of the comment."""
    name, fields = "größe", {"comment": "x" * comment_bytes}
    content = tar((f"{name}.jpg", JPEG, fields), (f"{name}.txt", b"a text", fields), format=tarfile.PAX_FORMAT)
    (tmp_path / "0.tar").write_bytes(content)
    index = build_index([Subset(tmp_path, ".txt")], use_cache=False)
    reader = Reader(index)
    assert (index.key(0), reader.image(0), reader.caption(0)) == (name, JPEG, "a text")
    (tmp_path / "0.tar").write_bytes(content.replace("größe".encode(), "grüße".encode()))
    with pytest.raises(SampleError, match="has changed since it was indexed"):
        reader.image(0)
