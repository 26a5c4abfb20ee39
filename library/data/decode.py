"""From an encoded image to the uint8 pixels of its bucket, with SDXL's size conditions.

JPEGs are decoded at 1/2, 1/4 or 1/8 where the result is still at least the wanted size (libjpeg's scaled inverse DCT,
Pillow's "draft"). Scaling is Lanczos with antialiasing, computed for the cropped part only. EXIF orientation is applied
first: sizes and crops here are those of the upright picture.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image, ImageOps

MAX_PIXELS = 178_956_970  # twice Pillow's own warning limit; more in one file is a decompression bomb
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = frozenset({5, 6, 7, 8})  # orientations that swap width and height
# Only the header's size is asked for: these bytes hold it in nearly every file, whatever metadata comes before.
HEADER_BYTES = 1 << 16
# A JPEG is decoded smaller only if this many times the wanted size is left for the Lanczos filter. Measured against a
# float Lanczos of the full picture, on pictures with a photograph's spectrum: 38 to 39 dB at 1.0 to 1.2 times the size,
# 40 to 43 dB from 1.25 on, where averaging all pixels (OpenCV's INTER_AREA, the reference's filter) has 39 to 41 dB.
_DRAFT_MARGIN = 1.25


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason. The caller puts another in its place."""


@dataclass(frozen=True)
class Fit:
    """How an image meets its bucket: scaled to scaled_wh_px, then the bucket's rectangle cut out at crop_xy_px."""

    scaled_wh_px: tuple[int, int]
    crop_xy_px: tuple[int, int]


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in px of an encoded image as it is to be seen, from its header.

    Args:
        data: the file or at least its beginning (HEADER_BYTES).

    Raises:
        SampleError: not an image, or too large.
    """
    return _reported(lambda: _upright_size(_open(data)))


def decode(
    data: bytes, bucket_wh_px: tuple[int, int], fit: Callable[[int, int], Fit]
) -> tuple[np.ndarray, tuple[int, int, int, int, int, int]]:
    """Decode, scale and crop one image.

    Args:
        data: the encoded file.
        bucket_wh_px: size of the result.
        fit: from the upright image's (width, height) to how it meets the bucket.

    Returns:
        Pixels (height, width, 3) uint8 RGB, and the size conditions (original h, w, crop top, left, target h, w).

    Raises:
        SampleError: it cannot be decoded.
    """
    return _reported(lambda: _decode(data, bucket_wh_px, fit))


def _decode(
    data: bytes, bucket_wh_px: tuple[int, int], fit: Callable[[int, int], Fit]
) -> tuple[np.ndarray, tuple[int, int, int, int, int, int]]:
    image = _open(data)
    width, height = _upright_size(image)
    found = fit(width, height)
    (scaled_w, scaled_h), (left, top) = found.scaled_wh_px, found.crop_xy_px
    bucket_w, bucket_h = bucket_wh_px
    wanted = (int(scaled_w * _DRAFT_MARGIN), int(scaled_h * _DRAFT_MARGIN))
    drafted = image.draft(None, wanted[::-1] if _is_turned(image) else wanted)  # None where the format cannot
    # The decoded size is rounded up: the picture itself ends a fraction of a pixel before the edge.
    shrink = 1.0 if drafted is None else max(width, height) / max(drafted[1])
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    upright = _rgb(image)
    x_unit, y_unit = width / shrink / scaled_w, height / shrink / scaled_h  # decoded px for one px of the scaled image
    box = (
        left * x_unit,
        top * y_unit,
        min((left + bucket_w) * x_unit, upright.width),
        min((top + bucket_h) * y_unit, upright.height),
    )
    scaled = upright.resize(bucket_wh_px, Image.Resampling.LANCZOS, box=box, reducing_gap=3.0)
    return np.asarray(scaled), (height, width, top, left, bucket_h, bucket_w)


def _open(data: bytes) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        image = Image.open(io.BytesIO(data))
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{image.width}×{image.height} px is more than the {MAX_PIXELS} that one image may have")
    return image


def _orientation(image: Image.Image) -> int:
    """EXIF orientation, 1 if there is none. (Asked for it, Pillow reads a whole PNG to find EXIF behind the pixels.)"""
    if image.format == "PNG" and not {"exif", "Raw profile type exif"} & image.info.keys():
        return 1
    return int(image.getexif().get(_ORIENTATION, 1))


def _is_turned(image: Image.Image) -> bool:
    return _orientation(image) in _TURNED


def _upright_size(image: Image.Image) -> tuple[int, int]:
    return (image.height, image.width) if _is_turned(image) else (image.width, image.height)


def _rgb(image: Image.Image) -> Image.Image:
    """8-bit RGB from any mode; white under transparency."""
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        values = np.asarray(image).astype(np.float64)
        return Image.fromarray((values / 257 + 0.5).clip(0, 255).astype(np.uint8)).convert("RGB")
    if image.has_transparency_data:
        pixels = image.convert("RGBA")
        white = Image.new("RGBA", pixels.size, "white")
        return Image.alpha_composite(white, pixels).convert("RGB")
    return image.convert("RGB")


def _reported(work: Callable[[], Any]) -> Any:
    """What work() returns; whatever an image decoder raises on damaged input becomes a SampleError with the reason."""
    try:
        return work()
    except SampleError:
        raise
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError …
        raise SampleError(f"{type(error).__name__}: {error}".replace("\n", " ")[:300]) from error
