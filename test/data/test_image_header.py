"""Headers read from bytes, against what Pillow reads from the whole file; and metadata that must not cost a picture."""

import io
import struct
import zlib
from contextlib import suppress

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, UnidentifiedImageError

from library.data import image_header
from library.data.bad_samples import SampleError
from library.data.fit import Fit
from library.data.image_formats import jpeg
from library.data.image_formats.exif import orientation_of
from library.data.image_formats.file_bytes import FileBytes
from library.data.sample.decode import decode

SIZE = (120, 80)
TURNED_6 = struct.pack("<HHIHH", 0x112, 3, 1, 6, 0)


def gradient(width=SIZE[0], height=SIZE[1]):
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[..., 0] = np.linspace(0, 255, width)
    pixels[..., 1] = np.linspace(0, 255, height)[:, None]
    return Image.fromarray(pixels)


def encoded(image, format="JPEG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def size_of(data):
    return image_header.upright_size(FileBytes.of(data))


def pixels_of(data, bucket=None):
    """The picture as it trains, as large as it is."""
    bucket = bucket or size_of(data)
    return decode(data, bucket, lambda width, height: Fit(bucket, (0, 0)))[0]


def entry(tag, kind, count, value):
    return struct.pack("<HHI", tag, kind, count) + value


def exif(entries, behind=b""):
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(entries) + bytes(4) + behind


GPS_BELOW_THE_SEA = struct.pack("<H", 1) + entry(6, 10, 1, struct.pack("<I", 56)) + bytes(4) + struct.pack("<ii", -3, 1)
ODD_EXIF = {
    "GPS altitude -3 as SRATIONAL": ([TURNED_6, entry(0x8825, 4, 1, struct.pack("<I", 38))], GPS_BELOW_THE_SEA, 6),
    "ResolutionUnit as BYTE": ([TURNED_6, entry(0x128, 1, 1, b"\2\0\0\0")], b"", 6),
    "XResolution as ASCII": ([TURNED_6, entry(0x11A, 2, 3, b"72\0\0")], b"", 6),
    "ImageWidth as ASCII": ([TURNED_6, entry(0x100, 2, 4, b"400\0")], b"", 6),
    "a value behind the end": ([TURNED_6, entry(0x10E, 2, 1 << 30, struct.pack("<I", 1 << 31))], b"", 6),
    "a type that TIFF does not have": ([TURNED_6, entry(0x10E, 99, 7, bytes(4))], b"", 6),
    "more entries than there are": ([TURNED_6] * 2, b"", 6),
    "ORIENTATION as BYTE": ([entry(0x112, 1, 1, b"\6\0\0\0")], b"", 6),
    "ORIENTATION as LONG": ([entry(0x112, 4, 1, struct.pack("<I", 8))], b"", 8),
    "ORIENTATION as ASCII": ([entry(0x112, 2, 4, b"Top\0")], b"", 1),
    "ORIENTATION 0": ([entry(0x112, 3, 1, bytes(4))], b"", 1),
    "ORIENTATION 9": ([entry(0x112, 3, 1, b"\t\0\0\0")], b"", 1),
    "ORIENTATION without a value": ([entry(0x112, 3, 0, b"\6\0\0\0")], b"", 1),
}


@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("kind", ODD_EXIF)
def test_odd_exif_costs_no_picture(kind, format):
    entries, behind, orientation = ODD_EXIF[kind]
    data = encoded(gradient(), format, exif=exif(entries, behind))
    turned = {1: None, 6: Image.Transpose.ROTATE_270, 8: Image.Transpose.ROTATE_90}[orientation]
    expected = gradient() if turned is None else gradient().transpose(turned)
    assert size_of(data) == expected.size
    assert np.abs(pixels_of(data).astype(int) - np.asarray(expected)).mean() < 4


@pytest.mark.parametrize("cut", [0, 3, 9, 11, 17, 20])
def test_exif_that_is_cut_short_says_nothing(cut):
    assert orientation_of(exif([TURNED_6])[:cut]) == 1
    assert orientation_of(exif([TURNED_6])) == 6


def chunk(kind, content, crc=None):
    crc = zlib.crc32(kind + content) if crc is None else crc
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", crc)


def with_chunk(extra, before=b"IDAT"):
    data = encoded(gradient(), "PNG")
    place = data.index(before) - 4
    return data[:place] + extra + data[place:]


LARGE_TEXT = b"Comment\0\0" + zlib.compress(bytes(1 << 27))
ODD_CHUNKS = {
    "eXIf of garbage": chunk(b"eXIf", b"garb"),
    "large text": chunk(b"zTXt", LARGE_TEXT),
    "large international text": chunk(b"iTXt", b"Comment\0\1\0\0\0" + zlib.compress(bytes(1 << 27))),
    "text that is not packed as it says": chunk(b"zTXt", b"Comment\0\0garbage"),
    "text in another way of packing": chunk(b"zTXt", b"Comment\0\7garbage"),
    "a bad checksum of text": chunk(b"tEXt", b"Comment\0hello", crc=1),
    "a bad checksum of a density": chunk(b"pHYs", bytes(9), crc=1),
    "a density that is cut short": chunk(b"pHYs", b"\0\0"),
    "a profile of garbage": chunk(b"iCCP", b"name\0\0garbage"),
    "an empty profile": chunk(b"iCCP", b""),
    "gamma that is cut short": chunk(b"gAMA", b"\0"),
    "a chunk of no known kind": chunk(b"abCd", b"hello", crc=7),
    "sRGB that is empty": chunk(b"sRGB", b""),
    "animation without frames": chunk(b"acTL", bytes(8)),
}


@pytest.mark.parametrize("kind", ODD_CHUNKS)
def test_odd_metadata_of_a_png_cost_no_picture(kind):
    data = with_chunk(ODD_CHUNKS[kind])
    assert size_of(data) == SIZE
    assert (pixels_of(data) == np.asarray(gradient())).all()


def test_exif_of_imagemagick_turns_a_png():
    raw = exif([TURNED_6])
    text = f"\nexif\n{len(raw):8d}\n{raw.hex()}\n".encode()
    for content in (
        chunk(b"tEXt", b"Raw profile type exif\0" + text),
        chunk(b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(text)),
    ):
        assert size_of(with_chunk(content)) == SIZE[::-1]


def test_damaged_pixels_of_a_png_are_named():
    data = bytearray(encoded(gradient(), "PNG"))
    data[data.index(b"IDAT") + 40] ^= 1
    with pytest.raises(SampleError, match="damaged: the checksum of a PNG's IDAT"):
        pixels_of(bytes(data))


@pytest.mark.parametrize("progressive", [False, True])
def test_what_stands_behind_a_jpeg_says_nothing_of_it(progressive):
    """Motion photos and archives: random bytes hold more than a hundred start-of-scan markers."""
    picture = encoded(gradient(), progressive=progressive)
    data = picture + np.random.default_rng(0).bytes(8_000_000)
    assert data.count(b"\xff\xda") > 100
    assert (pixels_of(data) == pixels_of(picture)).all()
    assert (pixels_of(picture + encoded(Image.new("RGB", (9, 9)))) == pixels_of(picture)).all()


def test_a_jpeg_that_lacks_only_its_end_mark_trains():
    data = encoded(gradient(), quality=95)
    assert (pixels_of(data[:-2]) == pixels_of(data)).all()
    reduced = (SIZE[0] // 4, SIZE[1] // 4)
    assert (pixels_of(data[:-2], reduced) == pixels_of(data, reduced)).all()


@pytest.mark.parametrize(
    "segment", [b"\xff\xe1\0\4XX", b"\xff\xe2\0\5MPF", b"\xff\xfe\0\2", b"\xff\xee\0\4Ad", b"\xff\xe0\0\3J"]
)
def test_odd_segments_of_a_jpeg_cost_no_picture(segment):
    data = encoded(gradient())
    odd = data[:2] + segment + data[2:]
    assert size_of(odd) == SIZE
    assert (pixels_of(odd) == pixels_of(data)).all()


def textured(seed=0):
    random = np.random.default_rng(seed)
    small = Image.fromarray(random.integers(0, 256, (40, 30, 3), dtype=np.uint8)).resize((320, 240))
    return Image.fromarray(
        (np.asarray(small, int) + random.integers(-12, 12, (240, 320, 3))).clip(0, 255).astype(np.uint8)
    )


def damaged(data, kind, random):
    """Its data changed in one place, markers left alone."""
    data, start = bytearray(data), data.index(b"\xff\xda") + 20
    place = int(random.integers(start, len(data) - 3000))
    if kind == "missing":
        del data[place : place + 200]
    elif kind == "random":
        data[place : place + 200] = random.bytes(200).replace(b"\xff", b"a")
    elif kind == "a marker":
        data[place : place + 2] = b"\xff\xc0"
    elif kind == "cut":
        data[place:-2] = b""
    return bytes(data)


@pytest.mark.parametrize("shrink", [1, 4])
@pytest.mark.parametrize("kind", ["missing", "a marker", "cut"])
@pytest.mark.parametrize("options", [{}, {"optimize": True}, {"subsampling": 0}], ids=str)
def test_damaged_data_of_a_jpeg_are_named_not_trained_grey(kind, options, shrink):
    random = np.random.default_rng(3)
    for seed in range(4):
        data = encoded(textured(seed), quality=90, **options)
        size = (320 // shrink, 240 // shrink)
        assert pixels_of(data, size).shape == (size[1], size[0], 3)
        with pytest.raises(SampleError, match=r"damaged inside|its data end before"):
            pixels_of(damaged(data, kind, random), size)


@pytest.mark.parametrize("options", [{"progressive": True}, {"restart_marker_blocks": 5}], ids=str)
def test_damage_that_libjpeg_sees_in_other_jpegs_is_named(options, capfd):
    random, named = np.random.default_rng(0), 0
    for seed in range(12):
        data = encoded(textured(seed), quality=90, **options)
        pixels_of(data)
        try:
            pixels_of(damaged(data, "missing", random))
        except SampleError as error:
            assert "Corrupt JPEG data" in str(error)
            named += 1
    assert named >= 7
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("options", [{}, {"progressive": True}], ids=str)
def test_a_jpeg_cut_anywhere_is_said_to_be_truncated(options):
    data = encoded(gradient(), **options)
    for end in range(data.index(b"\xff\xda") + 14, len(data) - 40, 7):
        with pytest.raises(SampleError, match=r"truncated|damaged inside"):
            pixels_of(data[:end], SIZE)


def test_whole_jpegs_of_all_kinds_are_whole():
    """Flat, black and grey endings, restart markers, and the bytes that encoders leave before the end mark."""
    random = np.random.default_rng(5)
    for number in range(300):
        width, height = (int(side) for side in random.integers(8, 120, 2))
        pixels = np.array(textured(number % 3).resize((width, height)))
        ending = (None, 0, 128, int(random.integers(256)))[number % 4]
        if ending is not None:
            pixels[height // 2 :] = ending
        options = {"restart_marker_blocks": int(random.integers(1, 9))} if random.integers(2) else {}
        data = encoded(
            Image.fromarray(pixels).convert(("RGB", "L", "CMYK")[number % 3]),
            quality=int(random.integers(1, 101)),
            progressive=bool(random.integers(2)),
            optimize=bool(random.integers(2)),
            subsampling=int(random.integers(3)),
            **options,
        )
        left = (b"", b"\xff\xff\xff", bytes(20), b"abcd")[int(random.integers(4))]
        shrink = int(random.integers(1, 4))
        pixels_of(data[:-2] + left + data[-2:], (max(8, width // shrink), max(8, height // shrink)))


@pytest.mark.parametrize("options", [{"lossless": True}, {"quality": 80}, {"exif": exif([TURNED_6])}], ids=str)
@pytest.mark.parametrize("mode", ["RGB", "RGBA"])
@pytest.mark.parametrize("size", [(64, 48), (301, 17), (1000, 999)])
def test_sizes_in_webp_are_pillows(options, mode, size):
    data = encoded(gradient(*size).convert(mode), "WEBP", **options)
    assert size_of(data) == (size[::-1] if "exif" in options else size)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_avif_is_turned_as_pillow_turns_it(orientation):
    options = Image.Exif()
    options[0x112] = orientation
    data = encoded(gradient(), "AVIF", exif=options, quality=90)
    expected = Image.open(io.BytesIO(data))
    orientation_by_pillow = expected.getexif().get(0x112, 1)
    assert orientation_by_pillow == orientation
    turns = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}
    if orientation > 1:
        expected = expected.transpose(Image.Transpose(turns[orientation]))
    assert size_of(data) == expected.size
    assert (pixels_of(data) == np.asarray(expected)).all()


def test_avif_with_odd_exif_trains():
    """Pillow writes the EXIF of a turned file anew when it opens it, which fails of an altitude of -3."""
    above_the_sea = GPS_BELOW_THE_SEA.replace(struct.pack("<i", -3), struct.pack("<i", 3))
    gps = entry(0x8825, 4, 1, struct.pack("<I", 38))
    data = encoded(gradient(), "AVIF", exif=exif([TURNED_6, gps], above_the_sea.replace(b"\n", b"\5", 1)), quality=90)
    expected = np.asarray(Image.open(io.BytesIO(data)).transpose(Image.Transpose.ROTATE_270))
    altitude = entry(6, 5, 1, b"") if entry(6, 5, 1, b"") in data else b"\0\6\0\5\0\0\0\1"
    below = altitude.replace(b"\5", b"\n")
    odd = data.replace(altitude, below).replace(struct.pack("<II", 3, 1), struct.pack("<iI", -3, 1))
    odd = odd.replace(struct.pack(">II", 3, 1), struct.pack(">iI", -3, 1))
    assert odd != data
    with pytest.raises(UnidentifiedImageError):
        Image.open(io.BytesIO(odd))
    assert size_of(odd) == SIZE[::-1]
    assert (pixels_of(odd) == expected).all()


def test_headers_of_damaged_files_raise_nothing_else():
    random = np.random.default_rng(1)
    for format in ("JPEG", "PNG", "WEBP", "AVIF", "BMP", "GIF"):
        options = {} if format in ("BMP", "GIF") else {"exif": exif([TURNED_6]), "icc_profile": bytes(200)}
        good = encoded(gradient(24, 16), format, **options)
        for _ in range(150):
            data = bytearray(good)
            for _ in range(int(random.integers(1, 4))):
                place = int(random.integers(len(data)))
                match random.integers(4):
                    case 0:
                        data[place] = random.integers(256)
                    case 1:
                        data[place : place + 4] = random.choice([b"\xff\xff\xff\xff", bytes(4), b"\0\0\0\1"])
                    case 2:
                        del data[place : place + int(random.integers(1, 40))]
                    case 3:
                        data[place:place] = data[place : place + 30]
            with suppress(SampleError):
                size_of(bytes(data))
            image_header.header_if_known(FileBytes.of(bytes(data)))
            with suppress(SampleError):
                pixels_of(bytes(data), (24, 16))


def test_of_a_jpeg_without_metadata_one_kib_is_read_once():
    data, asked = encoded(gradient(640, 480), quality=100), []

    def read_at(offset, count):
        asked.append((offset, count))
        return data[offset : offset + count]

    found = image_header.header_if_known(FileBytes(read_at, len(data)))
    assert (found.upright_wh_px, found.is_turned, asked) == ((640, 480), False, [(0, 1024)])


SEGMENTS = [b"\xff\xe0\0\x04JF", b"\xff\xdb\0\x43" + bytes(65), b"\xff\xfe\0\x02", b"\xff", b"\0", b"\xff\xd0"]
SEGMENTS += [b"\xff\xe1\0\x06ABCD", b"\xff\xda\0\x02", b"\xff\xd9", b"\xff\xfe\0\x01", b"\xff\xd8\0\x02"]
FRAME = b"\xff\xc2\0\x0b\x08\x01\x02\x03\x04\x01\x01\x11\0"


@given(st.lists(st.sampled_from(SEGMENTS), max_size=4), st.integers(0, 20))
def test_the_short_look_at_a_jpeg_says_what_the_long_one_does(segments, cut):
    data = jpeg.START + b"".join(segments) + FRAME + bytes(16)
    data = data[: len(data) - cut]
    if (found := jpeg.plain_facts(data)) is not None:
        assert found == jpeg.facts(FileBytes.of(data)) == (0x304, 0x102, 1, b"", 1)
    else:
        assert cut == 20 or set(segments) & {*SEGMENTS[3:10]}
