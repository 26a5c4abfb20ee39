"""Damaged shards: index, plan and loader end with samples or with the clear error, soon and in little memory.

A case is a small shard (tar of JPEG, PNG and WebP with captions and JSON, parquet beside it) in which a seed changes a
few things: bytes, lengths, blocks, tar headers with the checksum made right again, values in the JSON. Behind a third
of them stands a second tar of odd members: links, keys with dots, masks, names twice. What a seed gives never changes,
so a failing case is repeated by `run_case(folder, seed)`.
"""

import io
import json
import resource
import signal
import struct
import tarfile
import tempfile
import time
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image, ImageCms

from library.data.bad_samples import check_left_out
from library.data.fit import Fit
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import header
from library.data.index.rows import printable
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.indexed_batches import make_loader
from library.data.micro_batch import Share
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.sample.decode import decode
from library.data.sample.prepare import Treatment
from library.errors import InputError
from library.options.buckets import BucketOptions
from test.data.test_tar_kinds import of_index, of_stream

LONGEST_S = 20  # a case takes some 20 ms
MEMORY_GROWTH_MIB = 600
STEPS = 6
INTERESTING = (0, 1, 7, 8, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF)
VALUES = (None, -1, 0, 1, 2**31, 2**63, 10**400, 1.5, float("nan"), "", "x", "\ud800", [], {}, True, "9" * 5000)


def picture(seed, format):
    colours = np.random.default_rng(seed).integers(0, 256, (4, 4, 3), dtype=np.uint8)
    file = io.BytesIO()
    exif = Image.Exif()
    exif[0x0112] = 1 + seed % 8
    Image.fromarray(colours).resize((40, 24)).save(file, format, exif=exif, **{"progressive": True} if seed % 2 else {})
    return file.getvalue()


PICTURES = [picture(seed, format) for seed, format in enumerate(("JPEG", "JPEG", "PNG", "WEBP"))]
LARGE = zlib.compress(bytes(1 << 25))
SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
EXTENSIONS = ("jpg", "jpg", "png", "webp")


def odd_exif(random):
    """EXIF whose entries have any tag, type, count and value; the orientation is among them now and then."""
    order = random.choice(["<", ">"])
    tags = (0x0100, 0x010E, 0x0112, 0x011A, 0x0128, 0x0213, 0x8769, 0x8825, 0x9C9B)
    entries = b"".join(
        struct.pack(
            f"{order}HHII",
            int(random.choice(tags)),
            int(random.integers(14)),
            int(random.choice(INTERESTING)),
            int(random.choice([*INTERESTING, 3 << 16, 6 << 16])),
        )
        for _ in range(random.integers(5))
    )
    count = int(random.choice([len(entries) // 12, 0xFFFF, 3]))
    start = int(random.choice([8, 8, 8, 0, 0xFFFFFFFF]))
    mark = b"II*\0" if order == "<" else b"MM\0*"
    return (
        b"Exif\0\0" + mark + struct.pack(f"{order}IH", start, count) + entries + random.bytes(int(random.integers(40)))
    )


def odd_profile(random):
    """A profile of sRGB with some bytes changed, or none at all."""
    profile = bytearray(SRGB)
    for place in random.integers(0, len(profile), int(random.integers(4))):
        profile[place] = random.integers(256)
    return [bytes(profile), random.bytes(300), b"", bytes(profile[: random.integers(len(profile))])][random.integers(4)]


def jpeg_segment(random):
    """A segment of metadata."""
    part = bytes(random.integers(1, 4, 2, np.uint8))
    marker, content = (
        (0xE1, odd_exif(random)),
        (0xE1, b"http://ns.adobe.com/xap/1.0/\0" + random.bytes(40)),
        (0xE2, b"ICC_PROFILE\0" + part + odd_profile(random)),
        (0xE2, b"MPF\0" + random.bytes(60)),
        (int(random.integers(0xE3, 0xEE)), random.bytes(int(random.integers(3000)))),
        (0xED, b"Photoshop 3.0\x008BIM" + random.bytes(30)),
        (0xFE, random.bytes(50)),
    )[random.integers(7)]
    return b"\xff" + bytes([marker]) + struct.pack(">H", 2 + len(content)) + content


def png_chunk(random):
    """A chunk that pixels do not depend on, its checksum right or wrong."""
    name = random.choice([b"name\0\0", b"name\0\0", b"\0", b"name", b"Raw profile type exif\0\0"])
    packed = [zlib.compress(odd_profile(random)), LARGE, zlib.compress(b"\nexif\n 2\n4d4d")][random.integers(3)]
    kind = random.choice(
        [b"iCCP", b"zTXt", b"iTXt", b"tEXt", b"eXIf", b"pHYs", b"gAMA", b"cHRM", b"sRGB", b"tIME", b"acTL"]
    )
    content = odd_exif(random)[6:] if kind == b"eXIf" else name + packed if kind != b"pHYs" else random.bytes(9)
    checksum = zlib.crc32(kind + content) ^ int(random.integers(2))
    return struct.pack(">I", len(content)) + bytes(kind) + content + struct.pack(">I", checksum)


def with_odd_metadata(image, random):
    """A JPEG or PNG with metadata of any kind; others as they are."""
    for _ in range(random.integers(1, 4)):
        if image.startswith(b"\xff\xd8"):
            image = image[:2] + jpeg_segment(random) + image[2:]
        elif image.startswith(b"\x89PNG"):
            place = image.index(b"IDAT") - 4
            image = image[:place] + png_chunk(random) + image[place:]
    return image


def shard(random):
    """(tar, parquet): a good shard, but for a JSON value that may be strange, and odd metadata of images."""
    file, rows = io.BytesIO(), []
    with tarfile.open(fileobj=file, mode="w", format=random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for number, (extension, image) in enumerate(zip(EXTENSIONS, PICTURES, strict=True)):
            key = f"{number:09d}" if number else "größe" * 30  # long and not ASCII: extended headers
            facts = {"caption": f"picture {number}", "width": 40, "height": 24, "key": key}
            rows.append({"key": key, "status": "success", "caption": "stored", "width": 40, "height": 24})
            if random.random() < 0.2:
                facts[random.choice(["caption", "width", "height"])] = VALUES[random.integers(len(VALUES))]
            if random.random() < 0.3:
                image = with_odd_metadata(image, random)
            members = {extension: image, "json": json.dumps(facts).encode(), "txt": f"text {number}".encode()}
            for name, content in members.items():
                if random.random() < 0.1:
                    continue
                info = tarfile.TarInfo(f"{key}.{name}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    return bytearray(file.getvalue()[: file.tell()]).rstrip(b"\0") + bytes(1024), bytearray(table.getvalue())


def odd_tar(random):
    """A tar of some of what tars have besides plain samples."""
    names = ["a.jpg", "a.txt", "a.jpg", "at 1.2.jpg", "at 1.2.txt", "b.one.jpg", "b.two.jpg", "c.jpg", "c.mask.png",
             "d", "._e.jpg", ".f.jpg", "x/g.jpg", "x/g.0.txt", "000000001.jpg"]  # fmt: skip
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=random.choice([tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])) as tar:
        for name in random.permutation(names)[: random.integers(1, len(names))].tolist():
            info, content = tarfile.TarInfo(name), b"a text" if name.endswith("txt") else PICTURES[0]
            if random.random() < 0.2:
                info.type, info.linkname, content = random.choice([tarfile.LNKTYPE, tarfile.SYMTYPE]), "a.jpg", b""
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    return file.getvalue()


def change(data, random):
    """One change of a file's bytes, in place."""
    place, length = int(random.integers(len(data))), int(random.integers(1, 600))
    match random.integers(8):
        case 0:
            data[place] = random.integers(256)
        case 1:
            data[place] ^= 1 << int(random.integers(8))
        case 2:
            form = random.choice(["<B", "<H", ">H", "<I", ">I"])
            mask = (1 << 8 * struct.calcsize(form)) - 1
            data[place : place + struct.calcsize(form)] = struct.pack(form, int(random.choice(INTERESTING)) & mask)
        case 3:
            del data[place:]
        case 4:
            del data[place : place + length]
        case 5:
            data[place:place] = data[place : place + length]
        case 6:
            data[place : place + length] = bytes(min(length, len(data) - place))
        case 7:
            data[place : place + length] = random.bytes(min(length, len(data) - place))
    if not data:
        data += b"\0"


def change_header(data, random):
    """One change of a tar header whose checksum is then made right, so that it is believed."""
    headers = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not headers:
        return
    at = int(random.choice(headers))
    match random.integers(4):
        case 0:
            data[at + int(random.integers(512))] = random.integers(256)
        case 1:
            data[at + 124 : at + 136] = [b"%011o\0" % random.integers(2**33), b"\x80" + random.bytes(11)][
                random.integers(2)
            ]
        case 2:
            data[at + 156] = random.choice(list(b"01256LKxgSV\0"))
        case 3:
            data[at : at + 100] = random.choice([b"../../x.jpg", b"/x.png", b".jpg", b"\xff\x1b.txt", b""]).ljust(
                100, b"\0"
            )
    data[at + 148 : at + 156] = b" " * 8
    data[at + 148 : at + 156] = b"%06o\0 " % sum(data[at : at + 512])


def write_case(folder, seed):
    """The shard that belongs to a seed."""
    random = np.random.default_rng(seed)
    tar, parquet = shard(random)
    if seed % 3 == 1:
        tar += odd_tar(random)
    for _ in range(random.integers(1, 5)):
        chosen = random.random()
        if chosen < 0.3:
            change_header(tar, random)
        else:
            change(tar if chosen < 0.75 else parquet, random)
    (folder / "00000.tar").write_bytes(tar)
    (folder / "00000.parquet").unlink(missing_ok=True)
    if random.random() < 0.6:
        (folder / "00000.parquet").write_bytes(parquet)


def run_case(folder, seed):
    """What a run over the shard comes to: "error" (the clear one), "left out", "replaced" or "whole"."""
    write_case(folder, seed)
    upscale = seed % 3 == 0
    try:
        index = build_index([Subset(folder, ".txt")], use_cache=False)
        options = BucketOptions((32, 32), True, 16, 64, 8, bucket_no_upscale=upscale)
        buckets = bucket_rows(index, [options])
        plan = Plan(buckets, repeated(buckets.images_SK, index.repeats_S), seed, 1)
        batches = list(make_loader(index, buckets, plan, Share(1), [Treatment()], end_step=STEPS))
        check_left_out(index.bad, len(index), 1.0)
    except InputError as error:
        str(error).encode()
        return "error"
    for batch in batches:
        names = [name for name, _ in batch.quarantined]
        json.dumps([*names, *batch.captions, *(reason for _, reason in batch.quarantined)])
        "".join([*names, *batch.captions]).encode()
        assert batch.images_BHWC.shape[3] == 3
    if any(batch.quarantined for batch in batches):
        return "replaced"
    return "left out" if index.bad else "whole"


def run_cases(seeds):
    """How often each outcome came; fails on anything else than an outcome."""

    def too_long(*_):
        raise TimeoutError(f"case {seed} takes more than {LONGEST_S} s")

    outcomes, seed, slowest = Counter(), -1, 0.0
    before = signal.signal(signal.SIGALRM, too_long)
    memory = Path("/dev/shm")
    try:
        with tempfile.TemporaryDirectory(dir=memory if memory.is_dir() else None) as name:
            run_case(Path(name), 10**6)  # imports and first allocations are not the cases'
            peak_KiB = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
            for seed in seeds:
                signal.alarm(LONGEST_S)
                began = time.perf_counter()
                try:
                    outcomes[run_case(Path(name), seed)] += 1
                except Exception as error:
                    raise AssertionError(f"case {seed}: {error!r}") from error
                slowest = max(slowest, time.perf_counter() - began)
            grown_MiB = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak_KiB) / 1024
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
    print(f"{dict(outcomes)}; slowest {slowest:.2f} s; memory grew by {grown_MiB:.0f} MiB")
    assert grown_MiB < MEMORY_GROWTH_MIB
    return outcomes


@pytest.mark.parametrize("seeds", [range(150), pytest.param(range(150, 10_300), marks=pytest.mark.all)], ids=len)
def test_index_and_stream_use_the_same_samples_of_damaged_shards(tmp_path, seeds):
    """But for samples whose members do not follow one another, and for what only a look at the image shows."""
    for seed in seeds:
        write_case(tmp_path, seed)
        (tmp_path / "00000.parquet").unlink(missing_ok=True)
        images, bad = of_index(tmp_path / "00000.tar")
        images = {printable(key): image for key, image in images.items()}
        cut = {printable(key) for key, reason in bad if "damaged within it" in reason}
        streamed, streamed_bad = of_stream(tmp_path / "00000.tar")
        later = {name.rpartition("00000.tar:")[2] for name, reason in streamed_bad if not is_by_name(reason)}
        assert streamed.keys() <= images.keys() | cut and images.keys() - streamed.keys() <= later, seed
        assert all(images.get(key, image) == image for key, image in streamed.items()), seed
        torn = any("it ends" in reason for _, reason in streamed_bad)  # within an image without a key: it counts, too
        assert later or cut or 0 <= len(streamed_bad) - len(bad) <= torn, seed


def is_by_name(reason):
    """Whether a reason of a stream comes from the names and headers of members that follow one another."""
    by_name = (
        *(
            "no image, only",
            "of one name",
            "leads out",
            "not followed",
            "has no key",
            "own caption",
            "it ends at",
            "it ends by",
        ),
        *("tar header", "extended header", "is no number", "pax header", "sparse file"),
    )
    return any(phrase in reason for phrase in by_name)


def test_no_metadata_cost_a_picture():
    """Turned it may be, and in other colours by a profile that can be used; but its pixels are all there."""
    grey = Image.fromarray(np.tile(np.arange(8, 248, 6, dtype=np.uint8), (24, 1))).convert("RGB")
    for seed in range(200):
        random = np.random.default_rng(seed)
        file = io.BytesIO()
        grey.save(file, "JPEG" if seed % 2 else "PNG", quality=95)
        data = with_odd_metadata(file.getvalue(), random)
        size = header(FileBytes.of(data)).upright_wh_px
        assert sorted(size) == [24, 40], seed
        pixels, _ = decode(data, size, lambda width, height, size=size: Fit(size, (0, 0)))
        assert pixels.shape == (size[1], size[0], 3)
        if not header(FileBytes.of(data)).profile.transform:
            assert abs(float(pixels.mean()) - 125) < 1.5, seed


def test_damaged_shards_end_clearly():
    outcomes = run_cases(range(300))
    assert min(outcomes[outcome] for outcome in ("error", "left out", "replaced", "whole")) > 10, outcomes


@pytest.mark.all
def test_ten_thousand_damaged_shards_end_clearly():
    run_cases(range(300, 10_300))
