"""Which bucket (width and height of a batch) each image goes to, and how it is scaled and cropped for it.

Rules: shared/reference/formats.md, "Buckets", which are those that SDXL was trained with (Podell et al. 2023,
appendix I) and that sd-scripts users know. Sizes are (width, height) in px throughout.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from library.data.fit import Fit
from library.errors import InputError
from library.options.buckets import BucketOptions

_NAMED = 5


@dataclass(frozen=True)
class Assigned:
    """The buckets that some images are in.

    Attributes:
        sizes_K2: (buckets, 2) int64 width and height, sorted; each holds at least one image.
        bucket_of_row: (images,) int32.
        error_K: (buckets,) sum of |bucket's width / height - image's width / height|.
    """

    sizes_K2: np.ndarray
    bucket_of_row: np.ndarray
    error_K: np.ndarray


def check_options(options: BucketOptions) -> None:
    """Raise InputError for options that contradict each other, naming the flags and the way out."""
    if problems := list(options.contradictions()):
        raise InputError(*problems)


def bucket_list(options: BucketOptions) -> np.ndarray:
    """(buckets, 2) int64 widths and heights, sorted, without repeats; the one W×H without enable_bucket.

    Not for bucket_no_upscale, whose buckets follow from the images.

    Raises:
        InputError: as check_options.
    """
    check_options(options)
    width, height = options.resolution
    if not options.enable_bucket:
        return np.array([[width, height]], np.int64)
    step, high = options.bucket_reso_steps, options.max_bucket_reso
    area_cells = (width // step) * (height // step)
    square = math.isqrt(area_cells) * step
    found = {(square, square)}
    for side in range(options.min_bucket_reso, high + 1, step):
        other = min(high, area_cells // (side // step) * step)
        if other:  # 0: the side alone is over the area
            found |= {(side, other), (other, side)}
    return np.array(sorted(found), np.int64)


def assign_buckets(sizes_N2: np.ndarray, options: BucketOptions, name: Callable[[int], str] = str) -> Assigned:
    """The bucket of every image.

    Args:
        sizes_N2: (images, 2) int64 widths and heights.
        name: what an error calls an image, given its row.

    Raises:
        InputError: as check_options; or with bucket_no_upscale an image has a side under bucket_reso_steps.
    """
    check_options(options)
    follow_images = options.enable_bucket and options.bucket_no_upscale
    known_K2 = np.empty((0, 2), np.int64) if follow_images else bucket_list(options)
    if follow_images:
        buckets_N2 = _floored(_shrunk(sizes_N2, options), options.bucket_reso_steps)
        if not buckets_N2.all():
            raise InputError(_too_small(np.flatnonzero((buckets_N2 == 0).any(axis=1)), sizes_N2, options, name))
    else:
        buckets_N2 = known_K2[_nearest(sizes_N2, known_K2)]
    codes_K, bucket_of_row = np.unique(size_codes(buckets_N2), return_inverse=True)
    sizes_K2 = np.stack([codes_K >> 32, codes_K & 0xFFFFFFFF], axis=1)
    errors_N = np.abs(buckets_N2[:, 0] / buckets_N2[:, 1] - sizes_N2[:, 0] / sizes_N2[:, 1])
    return Assigned(sizes_K2, bucket_of_row.astype(np.int32), np.bincount(bucket_of_row, errors_N, len(sizes_K2)))


def bucket_of(size_px: tuple[int, int], known_K2: np.ndarray) -> tuple[int, int]:
    """The bucket of one image, of those that `bucket_list` gives."""
    bucket = known_K2[_nearest(np.array([size_px], np.int64), known_K2)[0]]
    return int(bucket[0]), int(bucket[1])


def fit(size_px: tuple[int, int], bucket_px: tuple[int, int], options: BucketOptions) -> Fit:
    """How an image of any size meets one bucket: scaled to cover it and cropped at the centre."""
    size_12, bucket_12 = np.array([size_px], np.int64), np.array([bucket_px], np.int64)
    scaled_12 = scaled_sizes(size_12, bucket_12, options)
    crop_12 = center_crops(scaled_12, bucket_12)
    return Fit((int(scaled_12[0, 0]), int(scaled_12[0, 1])), (int(crop_12[0, 0]), int(crop_12[0, 1])))


def scaled_sizes(sizes_N2: np.ndarray, buckets_N2: np.ndarray, options: BucketOptions) -> np.ndarray:
    """(images, 2) int64 sizes that images are scaled to for their buckets, each at least the bucket's.

    Covering means that one side becomes the bucket's and the other keeps the aspect ratio, rounded half up (in whole
    numbers, so without the errors of floating point).
    """
    width, height = sizes_N2[:, 0], sizes_N2[:, 1]
    bucket_w, bucket_h = buckets_N2[:, 0], buckets_N2[:, 1]
    wider = width * bucket_h >= bucket_w * height  # than the bucket: the heights meet, and the width is cropped
    covering_N2 = np.stack(
        [
            np.where(wider, (2 * width * bucket_h + height) // (2 * height), bucket_w),
            np.where(wider, bucket_h, (2 * height * bucket_w + width) // (2 * width)),
        ],
        axis=1,
    )
    if not (options.enable_bucket and options.bucket_no_upscale):
        return covering_N2
    shrunk_N2 = _shrunk(np.asarray(sizes_N2, np.int64), options)
    own = (_floored(shrunk_N2, options.bucket_reso_steps) == buckets_N2).all(axis=1)
    return np.where(own[:, None], shrunk_N2, covering_N2)


def center_crops(scaled_N2: np.ndarray, buckets_N2: np.ndarray) -> np.ndarray:
    """(images, 2) int64: left and top of the bucket's rectangle in the middle of the scaled image."""
    return (scaled_N2 - buckets_N2) // 2


def _nearest(sizes_n2: np.ndarray, known_K2: np.ndarray) -> np.ndarray:
    """The bucket of each image's own size if there is one, else that of the nearest width / height."""
    ratios_K = known_K2[:, 0] / known_K2[:, 1]
    ratios_R, first_R = np.unique(ratios_K, return_index=True)  # sorted; of equal ratios the first bucket
    ratios_n = sizes_n2[:, 0] / sizes_n2[:, 1]
    above = np.clip(np.searchsorted(ratios_R, ratios_n), 1, max(len(ratios_R) - 1, 1))
    above = np.minimum(above, len(ratios_R) - 1)
    below = np.maximum(above - 1, 0)
    take_below = ratios_n - ratios_R[below] <= ratios_R[above] - ratios_n
    nearest_n = first_R[np.where(take_below, below, above)]
    codes_K = size_codes(known_K2)  # sorted, as known_K2 is
    place_n = np.minimum(np.searchsorted(codes_K, size_codes(sizes_n2)), len(codes_K) - 1)
    return np.where(codes_K[place_n] == size_codes(sizes_n2), place_n, nearest_n)


def _shrunk(sizes_n2: np.ndarray, options: BucketOptions) -> np.ndarray:
    """With bucket_no_upscale: the size that an image is scaled down to, its own where the area allows.

    Over the area W·H: scaled to that area, then one side brought down to a multiple of the step, the side for which the
    bucket distorts the ratio less. ("Rounded" is rounded to a pixel, then down to the step: up would enlarge.)
    """
    step, area = options.bucket_reso_steps, options.resolution[0] * options.resolution[1]
    ratio = sizes_n2[:, 0] / sizes_n2[:, 1]
    width = np.sqrt(area * ratio)
    by_width_w, by_height_h = _to_step(width, step), _to_step(area / width, step)
    by_width_h, by_height_w = _to_step(by_width_w / ratio, step), _to_step(by_height_h * ratio, step)
    with np.errstate(divide="ignore", invalid="ignore"):  # a side of 0 steps is judged by the caller
        width_error = np.abs(by_width_w / by_width_h - ratio)
        height_error = np.abs(by_height_w / by_height_h - ratio)
    use_width = width_error < height_error
    shrunk_n2 = np.where(
        use_width[:, None],
        np.stack([by_width_w, _half_up(by_width_w / ratio)], axis=1),
        np.stack([_half_up(by_height_h * ratio), by_height_h], axis=1),
    )
    over = sizes_n2[:, 0] * sizes_n2[:, 1] > area
    return np.where(over[:, None], shrunk_n2, sizes_n2)


def _half_up(values: np.ndarray) -> np.ndarray:
    return np.floor(values + 0.5).astype(np.int64)


def _to_step(values: np.ndarray, step: int) -> np.ndarray:
    return _half_up(values) // step * step


def _floored(sizes_n2: np.ndarray, step: int) -> np.ndarray:
    return sizes_n2 // step * step


def size_codes(sizes_n2: np.ndarray) -> np.ndarray:
    """One number for a size, in the order of (width, height)."""
    return (sizes_n2[:, 0] << 32) | sizes_n2[:, 1]


def _too_small(rows: np.ndarray, sizes_N2: np.ndarray, options: BucketOptions, name: Callable[[int], str]) -> str:
    names = "; ".join(f"{name(int(row))} ({sizes_N2[row, 0]}×{sizes_N2[row, 1]})" for row in rows[:_NAMED])
    more = f"; and {len(rows) - _NAMED} others or more" if len(rows) > _NAMED else ""
    return (
        f"With --bucket_no_upscale an image's scaled sides must reach --bucket_reso_steps {options.bucket_reso_steps}; "
        f"too small or too long: {names}{more}. Remove them, lower the step, or leave --bucket_no_upscale out."
    )
