"""From an encoded image to the uint8 pixels of its bucket, with SDXL's size conditions.

JPEGs are decoded at 1/2, 1/4 or 1/8 where the result is still well over the wanted size (libjpeg's scaled inverse DCT,
Pillow's "draft"); others that need no more than decoding go through torchvision, which spares Pillow's fourth byte a
pixel. EXIF orientation is applied first: sizes and crops here are those of the upright picture. Of an animated file the
first frame is taken. docs/measurements/data.md has the figures behind each choice.
"""

import io
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps, UnidentifiedImageError

from library.data.sample.scaling import Filter, scaled_crop

# By content, whatever the file's extension says. Pillow knows more kinds, of which some call other programs.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "AVIF", "GIF")
MIN_SIDE_PX = 8  # one column of the VAE's latents; what is smaller holds no picture (a tracking pixel)
MAX_PIXELS = 178_956_970  # twice Pillow's own warning limit; more in one file is a decompression bomb
_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = frozenset({5, 6, 7, 8})  # orientations that swap width and height
# Only the header's size is asked for: these bytes hold it in nearly every file, whatever metadata comes before.
HEADER_BYTES = 1 << 16
MAX_BYTES = 1 << 29  # of one encoded image; more is no picture, and would be read into memory as a whole
_MAX_SCANS = 100  # of a progressive JPEG, each of which costs a pass over all pixels; ten are usual
# A JPEG is decoded smaller only if this many times the wanted size is left for the Lanczos filter: nearer to 1 the
# result is farther from a Lanczos of the full picture than averaging all pixels (OpenCV's INTER_AREA) is.
DRAFT_MARGIN = 1.25


SizeIds = tuple[int, int, int, int, int, int]  # original height and width, crop top and left, target height and width


class SampleError(Exception):
    """A sample that cannot be used; the message is the reason. The caller puts another in its place."""


@dataclass(frozen=True)
class Fit:
    """How an image meets its bucket: scaled to scaled_wh_px, the bucket's rectangle cut out at crop_xy_px, mirrored."""

    scaled_wh_px: tuple[int, int]
    crop_xy_px: tuple[int, int]
    mirrored: bool = False

    def seen_left_px(self, bucket_w_px: int) -> int:
        """How much is cropped away left of what is seen: of a mirrored image, what was right of it before."""
        left = self.crop_xy_px[0]
        return self.scaled_wh_px[0] - bucket_w_px - left if self.mirrored else left


def upright_size(data: bytes) -> tuple[int, int]:
    """(width, height) in px of an encoded image as it is to be seen, from its header.

    Args:
        data: the file or at least its beginning (HEADER_BYTES).

    Raises:
        SampleError: not an image, too small or too large.
    """
    return _reported(lambda: _upright_size(_open(data)))


def decode(
    data: bytes,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    by: Filter | None = None,
    with_alpha: bool = False,
) -> tuple[np.ndarray, SizeIds]:
    """Decode, scale and crop one image.

    Args:
        data: the encoded file.
        bucket_wh_px: size of the result.
        fit: from the upright image's (width, height) to how it meets the bucket.
        by: the filter of scaling, applied to the whole picture; None: what docs/measurements/data.md found best.
        with_alpha: leave the colours as they are stored, not over white, and give alpha, too.

    Returns:
        Pixels (height, width, 3) uint8 RGB, or (height, width, 4) with alpha, and the size conditions (original h, w,
        crop top, left, target h, w), all as in the mirrored image if it is mirrored.

    Raises:
        SampleError: it cannot be decoded.
    """
    return _reported(lambda: _decode(data, bucket_wh_px, fit, by, with_alpha))


def _decode(
    data: bytes,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    by: Filter | None,
    with_alpha: bool,
) -> tuple[np.ndarray, SizeIds]:
    image = _open(data)
    width, height = _upright_size(image)
    found = fit(width, height)
    (scaled_w, scaled_h), (left, top) = found.scaled_wh_px, found.crop_xy_px
    bucket_w, bucket_h = bucket_wh_px
    wanted = (int(scaled_w * DRAFT_MARGIN), int(scaled_h * DRAFT_MARGIN))
    # None where the format cannot.
    drafted = None if by is not None else image.draft(None, wanted[::-1] if _is_turned(image) else wanted)
    # The decoded size is rounded up: the picture itself ends a fraction of a pixel before the edge.
    shrink = 1.0 if drafted is None else max(width, height) / max(drafted[1])
    plain = shrink == 1 and _is_plain_jpeg(image) and not with_alpha
    pixels_HWC = _plain_jpeg(data) if plain else _pixels(image, with_alpha)
    step_xy_px = width / shrink / scaled_w, height / shrink / scaled_h
    best = Filter.BICUBIC if shrink == 1 else Filter.LANCZOS
    scaled_HWC = scaled_crop(pixels_HWC, step_xy_px, (left, top), bucket_wh_px, by or best)
    if found.mirrored:
        scaled_HWC = scaled_HWC[:, ::-1]
    return scaled_HWC, (height, width, top, found.seen_left_px(bucket_w), bucket_h, bucket_w)


def _open(data: bytes) -> Image.Image:
    """The image with its header read, its size and cost within bounds."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of strange metadata and of sizes, which are judged here
        image = Image.open(io.BytesIO(data), formats=_FORMATS)
    if image.width * image.height > MAX_PIXELS:
        raise SampleError(f"{image.width}×{image.height} px is more than the {MAX_PIXELS} that one image may have")
    if min(image.size) < MIN_SIDE_PX:
        raise SampleError(f"{image.width}×{image.height} px is too small, {MIN_SIDE_PX} a side are the least")
    if image.info.get("progressive") and data.count(b"\xff\xda") > _MAX_SCANS:  # start-of-scan markers
        raise SampleError(f"a progressive JPEG of more than {_MAX_SCANS} scans, made to take long")
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


def _is_plain_jpeg(image: Image.Image) -> bool:
    """True where decoding alone gives upright RGB."""
    return image.format == "JPEG" and image.mode == "RGB" and _orientation(image) == 1


def _plain_jpeg(data: bytes) -> np.ndarray:
    """(height, width, 3) uint8. torchvision's tensor is a turned view of just that."""
    from torchvision.io import ImageReadMode, decode_jpeg  # takes a second, which what only reads headers need not wait

    encoded = torch.frombuffer(bytearray(data), dtype=torch.uint8)  # a copy, since torch warns of bytes as read-only
    return decode_jpeg(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()


def _pixels(image: Image.Image, with_alpha: bool) -> np.ndarray:
    """(height, width, 3) uint8 RGB of any image, upright; (height, width, 4) with alpha."""
    if _orientation(image) != 1:
        ImageOps.exif_transpose(image, in_place=True)
    image = _eight_bit(image)
    if with_alpha:
        return np.asarray(image.convert("RGBA"))
    if image.has_transparency_data:
        return np.asarray(_over_white(image))
    return np.asarray(image if image.mode == "RGB" else image.convert("RGB"))


def _eight_bit(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey, with alpha where a value is transparent. (Pillow's own conversion clips at 255.)"""
    if not image.mode.startswith("I"):
        return image
    values = np.asarray(image).astype(np.uint32)
    grey = Image.fromarray(((values * 255 + 32895) >> 16).astype(np.uint8))  # rounds values / 257
    if "transparency" in image.info:
        grey.putalpha(Image.fromarray(255 * (values != image.info["transparency"]).astype(np.uint8)))
    return grey


def _over_white(image: Image.Image) -> Image.Image:
    """RGB of an image with transparency, white under it."""
    pixels = image.convert("RGBA")
    white = Image.new("RGB", pixels.size, "white")
    white.paste(pixels, mask=pixels)
    return white


def _reported(work: Callable[[], Any]) -> Any:
    """What work() returns; whatever an image decoder raises on damaged input becomes a SampleError with the reason."""
    try:
        return work()
    except (SampleError, MemoryError):  # no memory says nothing about the sample
        raise
    except UnidentifiedImageError as error:  # its own message holds an address in memory, another each time
        raise SampleError(f"UnidentifiedImageError: no image of a known kind ({' '.join(_FORMATS)})") from error
    except Exception as error:  # decoders raise OSError, SyntaxError, ValueError, struct.error, zlib.error, EOFError …
        reason = str(error).rpartition(".cpp:")[2]  # torchvision's begins with the place in its source
        raise SampleError(f"{type(error).__name__}: {reason}".replace("\n", " ")[:300]) from error
