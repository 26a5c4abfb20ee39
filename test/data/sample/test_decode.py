import io
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from library.data import image_header
from library.data.bad_samples import SampleError
from library.data.fit import Fit
from library.data.image_formats.file_bytes import FileBytes
from library.data.order.buckets import fit
from library.data.sample import decode as decode_module
from library.data.sample import scaling
from library.data.sample.decode import decode
from library.data.sample.scaling import Filter, scaled_crop
from library.options.buckets import BucketOptions


def encoded(image, format="PNG", **options):
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def upright_size(data):
    return image_header.upright_size(FileBytes.of(data))


def smooth(width, height, seed=0):
    """A picture without sharp edges, (height, width, 3)."""
    small = np.random.default_rng(seed).integers(0, 256, (6, 6, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def plain(bucket_wh_px, scaled_wh_px=None, crop=(0, 0)):
    return lambda width, height: Fit(scaled_wh_px or bucket_wh_px, crop)


def covering(bucket_wh_px):
    options = BucketOptions(bucket_wh_px)
    return lambda width, height: fit((width, height), bucket_wh_px, options)


def psnr(one, other):
    error = np.mean((np.asarray(one, float) - np.asarray(other, float)) ** 2)
    return 10 * np.log10(255**2 / max(error, 1e-9))


def test_the_result_is_scaling_the_whole_and_cutting_out_the_crop():
    image = smooth(300, 200)
    pixels, size_ids = decode(encoded(image), (64, 96), covering((64, 96)))
    whole = image.resize((144, 96), Image.Resampling.BICUBIC)
    expected = np.asarray(whole.crop((40, 0, 104, 96)), int)
    assert pixels.shape == (96, 64, 3)
    assert pixels.dtype == np.uint8
    assert np.abs(pixels - expected).max() <= 1
    assert size_ids == (200, 300, 0, 40, 96, 64)  # original h, w; crop top, left; target h, w


def test_cropping_top_and_bottom():
    _, size_ids = decode(encoded(smooth(100, 300)), (64, 64), covering((64, 64)))
    assert size_ids == (300, 100, 64, 0, 64, 64)


def test_an_image_of_the_buckets_size_is_untouched():
    image = smooth(64, 48)
    pixels, _ = decode(encoded(image), (64, 48), covering((64, 48)))
    assert (pixels == np.asarray(image)).all()


@pytest.mark.parametrize("size", [(1000, 1000), (1001, 803), (333, 1999)])
@pytest.mark.parametrize("target", [64, 200, 384])
def test_jpegs_decoded_at_a_reduced_scale_keep_quality_and_place(size, target):
    """Against the fully decoded picture. Half a pixel of shift costs far more than this allows."""
    data = encoded(smooth(*size), "JPEG", quality=95)
    bucket = (target, target)
    pixels, _ = decode(data, bucket, covering(bucket))
    full = Image.open(io.BytesIO(data)).convert("RGB")
    expected, _ = decode(encoded(full), bucket, covering(bucket))
    assert psnr(pixels, expected) > 44


def test_a_reduced_jpeg_is_never_smaller_than_what_is_wanted(monkeypatch):
    """The decoded size is seen through the scaling."""
    seen = []

    def watched(pixels_HWC, *args):
        seen.append(pixels_HWC.shape[1::-1])
        return scaled_crop(pixels_HWC, *args)

    exif = Image.Exif()
    exif[0x0112] = 6
    data = encoded(smooth(1000, 1000), "JPEG")
    turned = encoded(smooth(1200, 300), "JPEG", exif=exif)  # upright it is 300×1200
    monkeypatch.setattr(decode_module, "scaled_crop", watched)
    for target, decoded in ((64, 125), (104, 250), (200, 250), (256, 500), (400, 500), (480, 1000), (504, 1000)):
        seen.clear()
        decode(data, (target, target), covering((target, target)))
        assert seen[0] == (decoded, decoded), target
    seen.clear()
    decode(turned, (32, 128), covering((32, 128)))
    assert seen[0] == (75, 300)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["JPEG", "PNG", "WEBP"])
def test_exif_orientation_is_applied_before_anything_else(orientation, format):
    image = smooth(600, 400)
    turned = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # what undoes it, as PIL's Transpose
    upright = image if orientation == 1 else image.transpose(Image.Transpose(turned[orientation]))
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(image, format, exif=exif, quality=95)
    bucket = (96, 64)
    expected, expected_ids = decode(encoded(upright), bucket, covering(bucket))
    pixels, size_ids = decode(data, bucket, covering(bucket))
    assert upright_size(data) == upright.size
    assert size_ids == expected_ids
    assert psnr(pixels, expected) > 40


def test_transparency_is_white():
    image = smooth(32, 32).convert("RGBA")
    image.putalpha(Image.linear_gradient("L").resize((32, 32)))
    pixels, _ = decode(encoded(image), (32, 32), covering((32, 32)))
    values = np.asarray(image, float)
    alpha = values[..., 3:] / 255
    assert np.abs(pixels - (values[..., :3] * alpha + 255 * (1 - alpha))).max() <= 1


def test_every_mode_becomes_rgb():
    colour = smooth(32, 32)
    grey = np.asarray(colour.convert("L"))
    palette = colour.quantize(8)
    grey_16 = Image.fromarray((np.arange(1024).reshape(32, 32) * 64).astype(np.uint16))
    cases = {
        "L": (encoded(colour.convert("L")), np.stack([grey] * 3, -1)),
        "P": (encoded(palette), np.asarray(palette.convert("RGB"))),
        "1": (encoded(colour.convert("1")), np.asarray(colour.convert("1").convert("RGB"))),
        "16 bit": (encoded(grey_16), np.stack([np.round(np.arange(1024).reshape(32, 32) * 64 / 257)] * 3, -1)),
        "CMYK": (encoded(colour.convert("CMYK"), "JPEG", quality=100), np.asarray(colour)),
    }
    for mode, (data, expected) in cases.items():
        pixels, _ = decode(data, (32, 32), covering((32, 32)))
        assert np.abs(pixels.astype(int) - expected).mean() < 2, mode


def test_a_transparent_palette_entry_is_white():
    image = Image.new("P", (16, 16), 0)
    image.putpalette([255, 0, 0, 0, 0, 255])
    pixels, _ = decode(encoded(image, transparency=0), (16, 16), covering((16, 16)))
    assert (pixels == 255).all()


@pytest.mark.parametrize("format", ["BMP", "WEBP", "AVIF"])
def test_other_formats(format):
    image = smooth(64, 48)
    data = encoded(image, format)
    assert upright_size(data) == (64, 48)
    assert psnr(decode(data, (64, 48), covering((64, 48)))[0], np.asarray(image)) > 30


def test_sizes_come_from_the_beginning_of_a_file():
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (400, 400, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = 6
    for format in ("PNG", "JPEG", "BMP", "WEBP", "AVIF"):
        for turned in (False, True):
            data = encoded(noise.crop((0, 0, 400, 390)), format, **({"exif": exif} if turned else {}))
            assert len(data) > 40_000
            asked = []

            def read_at(offset, count, data=data, asked=asked):
                asked.append(count)
                return data[offset : offset + count]

            expected = (390, 400) if turned and format != "BMP" else (400, 390)
            assert image_header.upright_size(FileBytes(read_at, len(data))) == expected, format
            assert sum(asked) <= 8192, format


@pytest.mark.parametrize(
    "data",
    [b"", b"GIF89a", b"<html>404</html>", encoded(smooth(90, 90), "JPEG")[:-400], encoded(smooth(90, 90))[:2000]],
    ids=["empty", "no image data", "html", "cut jpeg", "cut png"],
)
def test_what_cannot_be_decoded_is_a_sample_error_with_its_reason(data):
    with pytest.raises(SampleError, match=r"\w+Error: \w+"):
        decode(data, (32, 32), covering((32, 32)))


def test_damaged_files_raise_nothing_else():
    rng = np.random.default_rng(0)
    for format in ("JPEG", "PNG", "WEBP", "BMP", "AVIF"):
        good = encoded(smooth(40, 40), format)
        for _ in range(60):
            data = bytearray(good)
            for place in rng.integers(0, len(data), 4):
                data[place] = rng.integers(256)
            try:
                pixels, _ = decode(bytes(data), (32, 32), covering((32, 32)))
                assert pixels.shape == (32, 32, 3)
            except SampleError:
                pass


def test_decompression_bombs_are_refused(monkeypatch):
    monkeypatch.setattr(image_header, "MAX_PIXELS", 99 * 99)
    with pytest.raises(SampleError, match="100×100 px"):
        decode(encoded(Image.new("L", (100, 100))), (32, 32), covering((32, 32)))
    bomb = encoded(Image.new("1", (20_000, 20_000)))  # 50 KB of file, 400 million pixels
    with pytest.raises(SampleError, match=r"400000000 pixels|20000×20000"):
        upright_size(bomb)


@pytest.mark.parametrize("by", [Filter.LANCZOS, Filter.BICUBIC, Filter.BILINEAR])
@pytest.mark.parametrize(
    ("steps", "crop", "size"),
    [((1.5, 1.25), (7, 5), (40, 40)), ((0.7, 0.7), (20, 10), (64, 48)), ((3, 3), (0, 0), (30, 23))],
)
def test_torch_and_pillow_scale_alike(by, steps, crop, size):
    """Crops anywhere, up and down."""
    pixels = np.random.default_rng(3).integers(0, 256, (70, 90, 3), dtype=np.uint8)
    ours = scaling._by_torch(pixels, steps, crop, size, by).astype(int)
    assert ours.shape == (*size[::-1], 3)
    most = 2 if by == Filter.BILINEAR else 1
    assert np.abs(ours - scaling._by_pillow(pixels, steps, crop, size, by)).max() <= most


def test_a_long_strip_costs_no_memory_for_what_is_cropped_away(monkeypatch):
    """8×20,000 px scaled to a width of 256 is 640,000 rows, of which 256 are wanted."""
    monkeypatch.setattr(scaling, "_by_torch", None)
    pixels, size_ids = decode(encoded(Image.new("RGB", (8, 20_000), (1, 2, 3))), (256, 256), covering((256, 256)))
    assert (pixels == [1, 2, 3]).all()
    assert size_ids[2] == (640_000 - 256) // 2


def jpeg_of(mode, colour):
    """One flat colour, so that a JPEG keeps it."""
    return encoded(Image.new(mode, (16, 16), colour), "JPEG", quality=100)


def png_of(depth, colour_type, pixel, extra=b""):
    """A PNG of 16×16 equal pixels written by hand, for depths that Pillow does not write."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 16, 16, depth, colour_type, 0, 0, 0)
    rows = zlib.compress((b"\0" + pixel * 16) * 16)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + extra + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


def transparent_grey():
    """A PNG's tRNS chunk: the grey value 0x1234 is transparent."""
    return struct.pack(">I", 2) + b"tRNS" + b"\x12\x34" + struct.pack(">I", zlib.crc32(b"tRNS\x12\x34"))


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        (jpeg_of("CMYK", (0, 255, 255, 0)), (255, 0, 0)),  # magenta and yellow ink: red
        (jpeg_of("CMYK", (51, 0, 0, 102)), (122, 153, 153)),  # (1 - 0.2)·(1 - 0.4) = 0.48 and 0.6 of 255
        (jpeg_of("L", 77), (77, 77, 77)),
        (png_of(16, 0, b"\x80\x80"), (128, 128, 128)),  # 0x8080 / 257
        (png_of(16, 0, b"\x00\xff"), (1, 1, 1)),  # 255 / 257 rounded
        (png_of(16, 0, b"\x12\x34", transparent_grey()), (255, 255, 255)),
        (png_of(16, 2, b"\xff\xff\x80\x80\x00\x00"), (255, 128, 0)),
        (png_of(16, 6, b"\xff\xff\x00\x00\x00\x00\x80\x80"), (255, 127, 127)),  # red, half of it there, over white
        (png_of(8, 4, b"\x00\x40"), (191, 191, 191)),  # black, 64/255 of it there: 255·(1 - 64/255)
        (encoded(Image.new("RGBA", (16, 16), (9, 9, 9, 0)), "WEBP", lossless=True), (255, 255, 255)),
        (encoded(Image.new("RGBA", (16, 16), (10, 20, 30, 255))), (10, 20, 30)),
    ],
    ids=[
        "cmyk",
        "cmyk-mixed",
        "grey",
        "16",
        "16-dark",
        "16-transparent",
        "16-colour",
        "16-alpha",
        "grey-alpha",
        "webp-alpha",
        "opaque",
    ],
)
def test_colours_worked_by_hand(data, expected):
    pixels, _ = decode(data, (16, 16), plain((16, 16)))
    assert np.abs(pixels.astype(int) - expected).max() <= 1


@pytest.mark.parametrize("format", ["PNG", "WEBP", "GIF", "AVIF"])
def test_of_an_animated_file_the_first_frame_is_taken(format):
    frames = [Image.new("RGB", (16, 16), colour) for colour in ((200, 0, 0), (0, 200, 0), (0, 0, 200))]
    data = encoded(frames[0], format, save_all=True, append_images=frames[1:])
    assert Image.open(io.BytesIO(data)).n_frames == 3
    pixels, _ = decode(data, (16, 16), plain((16, 16)))
    assert np.abs(pixels.astype(int) - [200, 0, 0]).max() < 8


def test_what_is_smaller_than_a_latent_column_is_refused():
    with pytest.raises(SampleError, match="7×300 px is too small"):
        upright_size(encoded(Image.new("RGB", (7, 300))))
    assert upright_size(encoded(Image.new("RGB", (8, 300)))) == (8, 300)


def test_kinds_that_call_other_programs_are_not_opened():
    with pytest.raises(SampleError, match="UnidentifiedImageError: no image of a known kind"):
        decode(encoded(smooth(16, 16), "EPS"), (16, 16), plain((16, 16)))


def test_a_progressive_jpeg_of_endless_scans_is_refused():
    data = encoded(smooth(64, 64), "JPEG", progressive=True)
    assert decode(data, (64, 64), plain((64, 64)))[0].shape == (64, 64, 3)
    last = data.rindex(b"\xff\xda")
    with pytest.raises(SampleError, match="more than 100 scans"):
        decode(data[:-2] + data[last:-2] * 100 + data[-2:], (64, 64), plain((64, 64)))


def test_reasons_are_the_same_each_time():
    """They are counted by kind: no addresses, no places in a library's source."""
    cut = encoded(smooth(90, 90), "JPEG")[:-400]
    for data in (b"<html>404</html>", cut):
        reasons = set()
        for _ in range(2):
            with pytest.raises(SampleError) as error:
                decode(data, (80, 80), plain((80, 80)))
            reasons.add(str(error.value))
        (reason,) = reasons
        assert "0x" not in reason
        assert ".cpp" not in reason


@pytest.mark.parametrize("by", [Filter.LANCZOS, Filter.BICUBIC, Filter.BILINEAR])
def test_a_part_of_an_enlarged_image_as_long_as_the_image_itself_is_enlarged_too(by):
    """32×20 enlarged to 44×27: torch scales no side of which the part has as many pixels as the source."""
    picture = smooth(32, 20)
    step, pixels = (32 / 44, 20 / 27), np.asarray(picture.convert("RGB"))
    whole = scaled_crop(pixels, step, (0, 0), (44, 27), by).astype(int)
    for left, top, width, height in [(0, 0, 29, 20), (3, 0, 29, 27), (0, 2, 32, 18), (2, 1, 30, 19)]:
        part = scaled_crop(pixels, step, (left, top), (width, height), by).astype(int)
        assert abs(part - whole[top : top + height, left : left + width]).max() <= 2


def test_thousands_of_sizes_are_scaled_and_cut_as_pillow_does():
    """Enlarged and shrunk, crops at the centre and at random, with sides as long as the source's among them."""
    random = np.random.default_rng(0)
    picture = np.asarray(smooth(90, 90).convert("RGB"))
    worst = 0
    for number in range(3000):
        columns, rows = (int(side) for side in random.integers(8, 90, 2))
        pixels = picture[:rows, :columns]
        factor = float(random.uniform(0.4, 2.5)) if number % 2 else float(random.uniform(1, 1.1))
        scaled_w, scaled_h = max(8, round(columns * factor)), max(8, round(rows * factor))
        width, height = (int(random.integers(8, side + 1)) for side in (scaled_w, scaled_h))
        if number % 3 == 0:
            width = min(columns, scaled_w)
        if number % 5 == 0:
            height = min(rows, scaled_h)
        left, top = int(random.integers(scaled_w - width + 1)), int(random.integers(scaled_h - height + 1))
        by = (Filter.LANCZOS, Filter.BICUBIC, Filter.BILINEAR)[number % 3]
        ours = scaled_crop(pixels, (columns / scaled_w, rows / scaled_h), (left, top), (width, height), by)
        whole = Image.fromarray(pixels).resize((scaled_w, scaled_h), by.value)
        expected = np.asarray(whole.crop((left, top, left + width, top + height)), int)
        worst = max(worst, int(np.abs(ours - expected).max()))
    assert worst <= 2
