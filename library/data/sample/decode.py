"""From an encoded image to the uint8 pixels of its bucket, with SDXL's size conditions.

JPEGs are decoded at 1/2, 1/4 or 1/8 where the result is still well over the wanted size (libjpeg's scaled inverse DCT,
Pillow's "draft"); others that need no more than decoding go through torchvision, which spares Pillow's fourth byte a
pixel. EXIF orientation is applied first: sizes and crops here are those of the upright picture. Colours become sRGB's
before they are scaled. Of an animated file the first frame is taken. docs/measurements/data.md has the figures behind
each choice.
"""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from PIL import Image

from library.data.bad_samples import SampleError
from library.data.fit import Fit, SizeIds
from library.data.image_formats.colour_profile import conversion, in_srgb
from library.data.image_formats.jpeg_data import decoded, ends_grey, is_doubtful
from library.data.image_header import Picture, open_picture, reported
from library.data.sample.scaling import Filter, scaled_crop

# A JPEG is decoded smaller only if this many times the wanted size is left for the Lanczos filter: nearer to 1 the
# result is farther from a Lanczos of the full picture than averaging all pixels (OpenCV's INTER_AREA) is.
DRAFT_MARGIN = 1.25
_UPRIGHT = {  # what undoes an EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


def decode(
    data: bytes,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    by: Filter | None = None,
    with_alpha: bool = False,
    as_stored: bool = False,
) -> tuple[np.ndarray, SizeIds]:
    """Decode, scale and crop one image.

    Args:
        data: the encoded file.
        bucket_wh_px: size of the result.
        fit: from the upright image's (width, height) to how it meets the bucket.
        by: the filter of scaling, applied to the whole picture; None: what docs/measurements/data.md found best.
        with_alpha: do not put the colours over white, and give alpha, too.
        as_stored: leave a colour profile out of account: the numbers are no colours.

    Returns:
        Pixels (height, width, 3) uint8 RGB, or (height, width, 4) with alpha, and the size conditions (original h, w,
        crop top, left, target h, w), all as in the mirrored image if it is mirrored.

    Raises:
        SampleError: it cannot be decoded.
    """
    return reported(lambda: _decode(data, bucket_wh_px, fit, by, with_alpha, as_stored))


def _decode(
    data: bytes,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    by: Filter | None,
    with_alpha: bool,
    as_stored: bool,
) -> tuple[np.ndarray, SizeIds]:
    picture = open_picture(data)
    if as_stored:
        picture = replace(picture, icc=b"")
    image, (width, height) = picture.image, picture.upright_wh_px
    found = fit(width, height)
    (scaled_w, scaled_h), (left, top) = found.scaled_wh_px, found.crop_xy_px
    bucket_w, bucket_h = bucket_wh_px
    wanted = (int(scaled_w * DRAFT_MARGIN), int(scaled_h * DRAFT_MARGIN))
    # None where the format cannot.
    drafted = None if by is not None else image.draft(None, wanted[::-1] if picture.is_turned else wanted)
    # The decoded size is rounded up: the picture itself ends a fraction of a pixel before the edge.
    shrink = 1.0 if drafted is None else max(width, height) / max(drafted[1])
    plain_HWC = _plain_jpeg(picture) if shrink == 1 and not with_alpha else None
    pixels_HWC = _pixels(picture, with_alpha) if plain_HWC is None else plain_HWC
    step_xy_px = width / shrink / scaled_w, height / shrink / scaled_h
    best = Filter.BICUBIC if shrink == 1 else Filter.LANCZOS
    scaled_HWC = scaled_crop(pixels_HWC, step_xy_px, (left, top), bucket_wh_px, by or best)
    if found.mirrored:
        scaled_HWC = scaled_HWC[:, ::-1]
    return scaled_HWC, (height, width, top, found.seen_left_px(bucket_w), bucket_h, bucket_w)


def _plain_jpeg(picture: Picture) -> np.ndarray | None:
    """(height, width, 3) uint8 of a JPEG that is upright RGB once it is decoded; None of others, and of damaged ones.

    torchvision's tensor is a turned view of just that.
    """
    jpeg = picture.jpeg
    if jpeg is None or not jpeg.ended or picture.image.mode != "RGB" or picture.orientation != 1:
        return None
    if conversion(picture.icc, 3).transform is not None:
        return None
    from torchvision.io import ImageReadMode, decode_jpeg  # takes a second, which what only reads headers need not wait

    encoded = torch.frombuffer(bytearray(jpeg.data), dtype=torch.uint8)  # a copy, since torch warns of read-only bytes
    pixels_CHW, damage = decoded(lambda: decode_jpeg(encoded, ImageReadMode.RGB))
    pixels_HWC = pixels_CHW.permute(1, 2, 0).numpy()
    if damage and not is_doubtful(damage[0], jpeg):
        raise SampleError(f"damaged inside: {damage[0]}")
    # Pillow's decoder knows whether a sequential one is whole.
    return None if jpeg.data_end and (damage or ends_grey(pixels_HWC)) else pixels_HWC


def _pixels(picture: Picture, with_alpha: bool) -> np.ndarray:
    """(height, width, 3) uint8 RGB of any image, upright; (height, width, 4) with alpha."""
    image = picture.image
    image.load()
    if picture.watched is not None:
        picture.watched.check()
    if picture.orientation != 1:
        image = image.transpose(_UPRIGHT[picture.orientation])
    image = in_srgb(_eight_bit(image), picture.icc)
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
