"""Colours of images with a profile, against those of Little CMS, and by hand from the profile's numbers."""

import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image, ImageCms

from library.data.fit import Fit
from library.data.image_formats import colour_profile
from library.data.image_formats.file_bytes import FileBytes
from library.data.image_header import header
from library.data.index.sources import Subset
from library.data.index.table import build_index
from library.data.order.bucket_rows import bucket_rows
from library.data.order.plan import Plan, repeated
from library.data.report import data_report
from library.data.sample.decode import decode
from library.data.sample.extra_images import decode_extras
from library.options.buckets import BucketOptions

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
SIDE = 16


def with_tags(profile, tags):
    """A profile with other contents at some of its tags, of the same length."""
    changed, count = bytearray(profile), struct.unpack(">I", profile[128:132])[0]
    for number in range(count):
        tag, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * number)
        if tag in tags:
            changed[offset + 8 : offset + 8 + len(tags[tag])] = tags[tag]
    return bytes(changed)


def xyz(*values):
    return b"".join(struct.pack(">i", round(value * 65536)) for value in values)


def grey_profile(gamma):
    """A grey profile by hand: ICC.1:2022, 7.2 and 10.6, with one gamma as its curve."""
    curve = b"curv" + struct.pack(">IIH", 0, 1, round(gamma * 256)) + bytes(2)
    white = b"XYZ " + bytes(4) + xyz(0.9642, 1, 0.8249)
    table = struct.pack(">I4sII4sII", 2, b"wtpt", 156, 20, b"kTRC", 176, len(curve))
    body = table + white + curve
    head = bytearray(128)
    struct.pack_into(">I4sI4s4s4s", head, 0, 128 + len(body), bytes(4), 0x02400000, b"mntr", b"GRAY", b"XYZ ")
    head[36:40] = b"acsp"
    head[68:80] = xyz(0.9642, 1, 0.8249)
    return bytes(head) + body


ADOBE = with_tags(
    SRGB,
    {
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
    },
)  # Adobe RGB's primaries with sRGB's curve
GREY_GAMMA_1 = grey_profile(1.0)


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def flat(mode, colour):
    return Image.new(mode, (SIDE, SIDE), colour)


def trains_as(data, **options):
    pixels, _ = decode(data, (SIDE, SIDE), lambda width, height: Fit((SIDE, SIDE), (0, 0)), **options)
    return pixels[SIDE // 2, SIDE // 2].tolist()


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "AVIF"])
def test_the_same_colour_in_another_profile_trains_as_the_same(format):
    """60, 160, 80 is 102, 160, 85 in a profile with Adobe RGB's primaries."""
    options = {"quality": 100} if format != "PNG" else {}
    data = encoded(flat("RGB", (102, 160, 85)), format, icc_profile=ADOBE, **options)
    assert np.abs(np.subtract(trains_as(data), (60, 160, 80))).max() <= (1 if format == "PNG" else 4)
    without = encoded(flat("RGB", (102, 160, 85)), format, **options)
    assert np.abs(np.subtract(trains_as(without), (102, 160, 85))).max() <= 2


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_a_whole_picture_is_converted_before_it_is_scaled(format):
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 6, 3), dtype=np.uint8)).resize((96, 64))
    data = encoded(image, format, icc_profile=ADOBE, **({"quality": 95} if format == "JPEG" else {"lossless": True}))
    expected = ImageCms.profileToProfile(
        Image.open(io.BytesIO(data)).convert("RGB"),
        ImageCms.ImageCmsProfile(io.BytesIO(ADOBE)),
        ImageCms.createProfile("sRGB"),
    ).resize((72, 48), Image.Resampling.BICUBIC)
    pixels, _ = decode(data, (72, 48), lambda width, height: Fit((72, 48), (0, 0)))
    assert np.abs(pixels.astype(int) - np.asarray(expected, int)).max() <= 2


def test_tiff_by_its_profile_and_lab():
    adobe = encoded(flat("RGB", (102, 160, 85)), "TIFF", icc_profile=ADOBE)
    assert np.abs(np.subtract(trains_as(adobe), (60, 160, 80))).max() <= 1
    grey = encoded(flat("L", 128), "TIFF", icc_profile=GREY_GAMMA_1)
    assert np.abs(np.subtract(trains_as(grey), (188, 188, 188))).max() <= 1
    assert header(FileBytes.of(grey)).profile.usable
    lab = encoded(flat("LAB", (137, 128, 128)), "TIFF")  # L* = 53.7, a and b 0: 128 of 255 in sRGB
    assert np.abs(np.subtract(trains_as(lab), (128, 128, 128))).max() <= 2


def test_a_jpegs_profile_comes_in_any_number_of_parts_and_order():
    large = ADOBE + bytes(200_000 - len(ADOBE))
    large = struct.pack(">I", len(large)) + large[4:]
    data = encoded(flat("RGB", (102, 160, 85)), "JPEG", quality=100, icc_profile=large)
    assert data.count(b"ICC_PROFILE\0") == 4
    assert np.abs(np.subtract(trains_as(data), (60, 160, 80))).max() <= 4
    first = data.index(b"\xff\xe2")
    length = 2 + struct.unpack(">H", data[first + 2 : first + 4])[0]
    second = first + length
    behind = second + 2 + struct.unpack(">H", data[second + 2 : second + 4])[0]
    swapped = data[:first] + data[second:behind] + data[first:second] + data[behind:]
    assert trains_as(swapped) == trains_as(data)
    assert header(FileBytes.of(swapped)).profile == header(FileBytes.of(data)).profile


@pytest.mark.parametrize(("mode", "colour"), [("L", 128), ("LA", (128, 255)), ("I;16", 128 * 257)])
def test_grey_by_a_grey_profile(mode, colour):
    """Half of the light (gamma 1) is 188 in sRGB: 1.055 · 0.502 ** (1 / 2.4) - 0.055 = 0.7366."""
    image = flat(mode, colour) if mode != "I;16" else Image.fromarray(np.full((SIDE, SIDE), colour, np.uint16))
    data = encoded(image, icc_profile=GREY_GAMMA_1)
    assert np.abs(np.subtract(trains_as(data), (188, 188, 188))).max() <= 1


def test_grey_with_a_profile_for_colours_stays_grey():
    assert trains_as(encoded(flat("L", 77), icc_profile=SRGB)) == [77, 77, 77]
    red, green, blue = trains_as(encoded(flat("L", 77), icc_profile=ADOBE))
    assert max(red, green, blue) - min(red, green, blue) <= 1


def test_transparency_and_palettes_keep_what_they_are():
    half = encoded(flat("RGBA", (102, 160, 85, 128)), icc_profile=ADOBE)
    over_white = [round(value * 128 / 255 + 255 * 127 / 255) for value in (60, 160, 80)]
    assert np.abs(np.subtract(trains_as(half), over_white)).max() <= 1
    assert np.abs(np.subtract(trains_as(half, with_alpha=True), (60, 160, 80, 128))).max() <= 1
    palette = flat("P", 1)
    palette.putpalette([9, 9, 9, 102, 160, 85, 255, 0, 0])
    assert np.abs(np.subtract(trains_as(encoded(palette, icc_profile=ADOBE)), (60, 160, 80))).max() <= 1
    assert trains_as(encoded(palette, icc_profile=ADOBE, transparency=1)) == [255, 255, 255]


def test_turned_pictures_are_converted_too():
    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(flat("RGB", (102, 160, 85)), "JPEG", quality=100, icc_profile=ADOBE, exif=exif)
    assert np.abs(np.subtract(trains_as(data), (60, 160, 80))).max() <= 4


CMYK_WITHOUT_A_PROFILE = (255, 0, 0)


@pytest.mark.parametrize(
    ("mode", "colour", "icc", "expected"),
    [
        ("RGB", (102, 160, 85), b"garbage" * 50, (102, 160, 85)),
        ("RGB", (102, 160, 85), ADOBE[:200], (102, 160, 85)),
        ("RGB", (102, 160, 85), ADOBE[:-100], (102, 160, 85)),
        ("RGB", (102, 160, 85), GREY_GAMMA_1, (102, 160, 85)),
        ("CMYK", (0, 255, 255, 0), SRGB, CMYK_WITHOUT_A_PROFILE),
        ("L", 77, ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes(), (77, 77, 77)),
    ],
    ids=["garbage", "cut in its head", "cut", "grey for colours", "colours for CMYK", "Lab for grey"],
)
def test_a_profile_that_cannot_be_used_is_as_if_it_were_not_there(mode, colour, icc, expected):
    data = encoded(flat(mode, colour), "JPEG", quality=100, icc_profile=icc)
    assert np.abs(np.subtract(trains_as(data), expected)).max() <= 2
    assert not header(FileBytes.of(data)).profile.usable


def test_profiles_that_are_srgb_cost_nothing(monkeypatch):
    """Other words and rounding do not make it another one."""
    nearly = with_tags(SRGB, {b"cprt": b"\0" * 4, b"rXYZ": xyz(0.43607, 0.22249, 0.01392)})
    assert nearly != SRGB
    for icc in (SRGB, nearly):
        assert colour_profile.conversion(icc, 3).usable
        monkeypatch.setattr(ImageCms, "applyTransform", None)
        assert trains_as(encoded(flat("RGB", (1, 2, 3)), icc_profile=icc)) == [1, 2, 3]
        monkeypatch.undo()


def test_masks_hold_numbers_and_no_colours():
    data = encoded(flat("L", 128), icc_profile=GREY_GAMMA_1)
    found = decode_extras({"mask": data, "cond": data}, (SIDE, SIDE), Fit((SIDE, SIDE), (0, 0)), (SIDE, SIDE))
    assert (found["mask"] == 128).all()
    assert np.abs(found["cond"].astype(int) - 188).max() <= 1


@pytest.mark.parametrize("in_shard", [False, True])
def test_what_is_converted_and_what_cannot_be_is_counted_before_training(tmp_path, make_tar, in_shard):
    picture = flat("RGB", (102, 160, 85))
    files = {
        "a.png": encoded(picture, icc_profile=ADOBE),
        "b.jpg": encoded(picture, "JPEG", icc_profile=ADOBE),
        "c.webp": encoded(picture, "WEBP", icc_profile=ADOBE),
        "d.avif": encoded(picture, "AVIF", icc_profile=ADOBE),
        "e.png": encoded(picture, icc_profile=SRGB),
        "f.png": encoded(picture, icc_profile=b"garbage"),
        "g.png": encoded(picture),
    }
    captions = {f"{name[0]}.txt": b"c" for name in files}
    if in_shard:
        make_tar(tmp_path / "00000.tar", sorted((files | captions).items()))
    else:
        for name, content in (files | captions).items():
            (tmp_path / name).write_bytes(content)
    for _ in range(2):  # scanned, and read from what was kept
        index = build_index([Subset(tmp_path, ".txt")])
        buckets = bucket_rows(index, [BucketOptions((SIDE, SIDE))])
        lines = data_report(index, buckets, Plan(buckets, repeated(buckets.images_SK, index.repeats_S), 0, 1))
        assert "converted to sRGB by their colour profile: 4 of 7: sRGB built-in (4)" in lines
        (warning,) = [line for line in lines if "profile that is damaged" in line]
        assert warning.startswith("warning: 1 images have a colour profile")
        assert warning.endswith("f" if in_shard else "f.png")


def test_a_png_profile_that_inflates_without_end_is_not_unpacked():
    bomb = zlib.compress(bytes(1 << 26))
    content = b"name\0\0" + bomb
    chunk = struct.pack(">I", len(content)) + b"iCCP" + content + struct.pack(">I", zlib.crc32(b"iCCP" + content))
    data = encoded(flat("RGB", (1, 2, 3)))
    place = data.index(b"IDAT") - 4
    assert trains_as(data[:place] + chunk + data[place:]) == [1, 2, 3]
