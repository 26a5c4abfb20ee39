"""An extra image of a sample (a conditioning image, a mask) to the pixels that lie over those of its image.

H, W: rows and columns of the bucket in px.
"""

from collections.abc import Mapping

import numpy as np

from library.data.bad_samples import SampleError
from library.data.fit import Fit
from library.data.sample.decode import decode
from library.data.sample.scaling import Filter

CONDITION, MASK = "cond", "mask"
_GREY = {MASK}  # come as (H, W); all others as (H, W, 3)
_ASPECT_TOLERANCE = 0.03


def decode_extras(
    encoded: Mapping[str, bytes],
    bucket_wh_px: tuple[int, int],
    fit: Fit,
    image_wh_px: tuple[int, int],
    by: Filter | None = None,
) -> dict[str, np.ndarray]:
    """Decode extra images, and scale, crop and mirror them as their image is. They may be of another resolution.

    Args:
        encoded: files by name.
        fit: how the image met its bucket.
        image_wh_px: the upright image's size.
        by: the filter of scaling, as of images.

    Returns:
        By name (H, W, 3) uint8 RGB, of a mask (H, W) uint8, its red channel as it is stored; alpha is left out.

    Raises:
        SampleError: one cannot be decoded, or has another aspect ratio than the image.
    """
    found = {}
    image_w, image_h = image_wh_px

    def same_fit(width: int, height: int) -> Fit:
        if not 1 - _ASPECT_TOLERANCE < width * image_h / (height * image_w) < 1 + _ASPECT_TOLERANCE:
            raise SampleError(f"{width}×{height} px, another aspect ratio than its image's {image_w}×{image_h}")
        return fit

    for name, data in encoded.items():
        try:
            pixels_HWC, _ = decode(data, bucket_wh_px, same_fit, by, with_alpha=True, as_stored=name in _GREY)
        except SampleError as error:
            raise SampleError(f"extra image '{name}': {error}") from error
        found[name] = pixels_HWC[..., 0] if name in _GREY else pixels_HWC[..., :3]
    return found
