"""What happens to an image besides scaling it: where it is cropped, whether it is mirrored, how its colours change.

All of it is worked out from numbers in 0 .. 1 that the caller drew for the sample's place in the run. Each purpose has
its numbers whether they are used or not, so that switching one option leaves what the others do alone.
"""

from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from library.data.fit import Fit
from library.data.index.rows import FACE_NUMBERS
from library.data.sample.scaling import Filter

CROP_NUMBERS, CHANGE_NUMBERS = 5, 4  # how many numbers a sample's crop, and its other changes, take
# The colour change that sd-scripts has: a third of the samples, of which one half has another hue, the other a gamma.
_COLOUR_SHARE = 0.33
_HUE_DEGREES = 16.0
_GAMMA = (0.95, 1.05)
_FACE_SHIFT = 0.05  # of the face's longer side, where its size is drawn from a range


@dataclass(frozen=True)
class ImageChanges:
    """What is done to the images of a subset; the defaults crop them at the centre and leave them as they are.

    Attributes:
        flip_aug: mirror half of the samples.
        color_aug: change the colours of a third of the samples.
        random_crop: crop at random.
        face_crop_aug_range: crop around the face that an image's name tells of, with a shorter side of so many times
            the face's longer one, from least to most.
        alpha_mask: hand on the alpha channel as the loss's weights, with the colours under it as they are stored.
        resize_interpolation: the filter of scaling; None: the one that costs least for its quality.
    """

    flip_aug: bool = False
    color_aug: bool = False
    random_crop: bool = False
    face_crop_aug_range: tuple[float, float] | None = None
    alpha_mask: bool = False
    resize_interpolation: Filter | None = None


@dataclass(frozen=True)
class Face:
    """Centre and size of a face in px of the upright image."""

    centre_xy_px: tuple[int, int]
    size_wh_px: tuple[int, int]


def face_in(name: str) -> Face | None:
    """The face that a file's name or sample's key tells of, as `STEM_X_Y_W_H`: centre, width and height in px."""
    found = FACE_NUMBERS.search(name)
    if found is None:
        return None
    x, y, width, height = map(int, found.groups())
    return Face((x, y), (width, height)) if width and height else None


def is_mirrored(options: ImageChanges, change_4: np.ndarray) -> bool:
    """Whether a sample is mirrored."""
    return options.flip_aug and bool(change_4[0] < 0.5)


def placed(
    fit: Fit,
    size_wh_px: tuple[int, int],
    bucket_wh_px: tuple[int, int],
    options: ImageChanges,
    face: Face | None,
    crop_5: np.ndarray,
    mirrored: bool,
) -> Fit:
    """How a sample's image meets its bucket.

    Args:
        fit: how it would meet it without options, cropped at the centre.
        size_wh_px: of the upright image.
        face: in it, if its name tells of one.
        crop_5: random numbers in 0 .. 1.
    """
    if options.face_crop_aug_range is not None and face is not None:
        fit = _around_face(face, size_wh_px, bucket_wh_px, options, crop_5)
    elif options.random_crop:
        room_xy = np.subtract(fit.scaled_wh_px, bucket_wh_px)
        left, top = (crop_5[:2] * (room_xy + 1)).astype(int).tolist()
        fit = Fit(fit.scaled_wh_px, (left, top))
    return replace(fit, mirrored=mirrored)


def _around_face(
    face: Face,
    size_wh_px: tuple[int, int],
    bucket_wh_px: tuple[int, int],
    options: ImageChanges,
    crop_5: np.ndarray,
) -> Fit:
    """Scaled so that the bucket is as many times the face as the range says, as far as the image reaches.

    It covers the bucket at least, and is not enlarged for the face's sake. The face is in the middle of the crop; with
    random_crop it may be anywhere, near the middle most often.
    """
    least_times, most_times = options.face_crop_aug_range or (1.0, 1.0)
    face_px, short_px = max(face.size_wh_px), min(bucket_wh_px)
    covering = float(np.max(np.divide(bucket_wh_px, size_wh_px)))
    largest = max(covering, 1.0)
    low = min(max(short_px / (face_px * most_times), covering), largest)
    high = min(max(short_px / (face_px * least_times), low), largest)
    scale = low + (high - low) * float(crop_5[4])
    scaled, corner = [], []
    for axis, bucket_px in enumerate(bucket_wh_px):
        length = max(int(size_wh_px[axis] * scale + 0.5), bucket_px)
        centre = min(face.centre_xy_px[axis] * scale, length)
        shift = 0.0
        if options.random_crop:
            shift = (crop_5[axis] + crop_5[2 + axis] - 1) * max(length - centre, centre)
        elif least_times < most_times:
            shift = (2 * crop_5[axis] - 1) * _FACE_SHIFT * face_px * scale
        start = int(np.floor(centre + shift - bucket_px / 2 + 0.5))
        scaled.append(length)
        corner.append(min(max(start, 0), length - bucket_px))
    return Fit((scaled[0], scaled[1]), (corner[0], corner[1]))


def recoloured(pixels_HWC: np.ndarray, options: ImageChanges, change_4: np.ndarray) -> np.ndarray:
    """The pixels with another hue or gamma, or as they are. uint8 RGB."""
    _, whether, which, amount = change_4.tolist()
    if not options.color_aug or whether >= _COLOUR_SHARE:
        return pixels_HWC
    if which < 0.5:
        return shift_hue(pixels_HWC, _HUE_DEGREES * (2 * amount - 1))
    return apply_gamma(pixels_HWC, _GAMMA[0] + (_GAMMA[1] - _GAMMA[0]) * amount)


def shift_hue(pixels_HWC: np.ndarray, degrees: float) -> np.ndarray:
    """Each colour turned round the hue circle, its saturation and value kept."""
    steps = round(degrees * 256 / 360)  # Pillow has 256 hues
    if steps == 0:
        return pixels_HWC
    table = [(hue + steps) % 256 for hue in range(256)] + 2 * list(range(256))
    turned = Image.fromarray(pixels_HWC).convert("HSV").point(table)
    return np.asarray(turned.convert("RGB"))


def apply_gamma(pixels_HWC: np.ndarray, gamma: float) -> np.ndarray:
    """Each number x in 0 .. 255 as 255 · (x / 255) ** gamma: black and white stay."""
    table = np.round(255 * (np.arange(256) / 255) ** gamma).astype(np.uint8)
    return table[pixels_HWC]
