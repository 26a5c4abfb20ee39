"""Scaling a picture with antialiasing and cutting a rectangle out of it, by whichever code is the fastest here.

H, W, C: rows, columns and colours. torch scales uint8 pixels with AVX2 some five times as fast as Pillow; without AVX2
(on ARM) Pillow is the faster one. Both weigh with whole numbers; their results differ by 1 of 255 at most, and by 3
where a picture shrinks to less than a third of its sides, since Pillow then averages some pixels before.
"""

import warnings
from enum import Enum

import numpy as np
import torch
from PIL import Image

_TORCH_IS_FAST = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")
# torch computes everything left of and above the rectangle, too. Beyond so many times its area Pillow takes over.
_MAX_WASTE = 2


class Filter(Enum):
    """The filters; the values are Pillow's. All but NEAREST weigh every pixel that they shrink."""

    LANCZOS = Image.Resampling.LANCZOS
    BICUBIC = Image.Resampling.BICUBIC
    BILINEAR = Image.Resampling.BILINEAR
    AREA = Image.Resampling.BOX
    NEAREST = Image.Resampling.NEAREST


# By the names of --resize_interpolation.
FILTERS = {
    "lanczos": Filter.LANCZOS,
    "nearest": Filter.NEAREST,
    "bilinear": Filter.BILINEAR,
    "linear": Filter.BILINEAR,
    "bicubic": Filter.BICUBIC,
    "cubic": Filter.BICUBIC,
    "area": Filter.AREA,
}
_TORCH_OPERATORS = {
    Filter.LANCZOS: torch.ops.aten._upsample_lanczos2d_aa,
    Filter.BICUBIC: torch.ops.aten._upsample_bicubic2d_aa,
    Filter.BILINEAR: torch.ops.aten._upsample_bilinear2d_aa,
}
_REDUCING_GAP = {Filter.LANCZOS: 3.0, Filter.BICUBIC: 3.0, Filter.BILINEAR: 3.0}  # Pillow may average before


def scaled_crop(
    pixels_HWC: np.ndarray,
    step_xy_px: tuple[float, float],
    crop_xy_px: tuple[int, int],
    crop_wh_px: tuple[int, int],
    by: Filter,
) -> np.ndarray:
    """Scale a picture and cut a rectangle out of the result.

    Args:
        pixels_HWC: uint8, 3 colours, or 4 with alpha; no channel depends on another.
        step_xy_px: how many source pixels one pixel of the scaled picture is wide and high.
        crop_xy_px: left and top of the rectangle in the scaled picture.
        crop_wh_px: its width and height.
        by: the filter.

    Returns:
        (height, width, channels) uint8; it may be a part of a larger array.
    """
    (left, top), (width, height) = crop_xy_px, crop_wh_px
    if step_xy_px == (1.0, 1.0):
        return pixels_HWC[top : top + height, left : left + width]
    wasteful = (left + width) * (top + height) > _MAX_WASTE * width * height
    rows, columns = pixels_HWC.shape[:2]
    # torch does not scale a side at all of which it is to give as many pixels as the source has, whatever the factor.
    left_alone = (left + width == columns and step_xy_px[0] != 1) or (top + height == rows and step_xy_px[1] != 1)
    by_torch = _TORCH_IS_FAST and by in _TORCH_OPERATORS and not wasteful and not left_alone
    scale = _by_torch if by_torch else _by_pillow
    return scale(pixels_HWC, step_xy_px, crop_xy_px, crop_wh_px, by)


def _by_torch(
    pixels_HWC: np.ndarray,
    step_xy_px: tuple[float, float],
    crop_xy_px: tuple[int, int],
    crop_wh_px: tuple[int, int],
    by: Filter,
) -> np.ndarray:
    (left, top), (width, height) = crop_xy_px, crop_wh_px
    # Turned so, the single picture's strides are those of channels last, which the fast kernel asks for.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Pillow's pixels are read-only; nothing is written to them
        x_1CHW = torch.from_numpy(pixels_HWC[None]).permute(0, 3, 1, 2)
    factors = 1 / step_xy_px[1], 1 / step_xy_px[0]
    scaled_1CHW = _TORCH_OPERATORS[by](x_1CHW, (top + height, left + width), False, *factors)
    return scaled_1CHW[0].permute(1, 2, 0).numpy()[top:, left:]


def _by_pillow(
    pixels_HWC: np.ndarray,
    step_xy_px: tuple[float, float],
    crop_xy_px: tuple[int, int],
    crop_wh_px: tuple[int, int],
    by: Filter,
) -> np.ndarray:
    rows, columns = pixels_HWC.shape[:2]
    (left, top), (width, height), (x_step, y_step) = crop_xy_px, crop_wh_px, step_xy_px
    right, bottom = min((left + width) * x_step, columns), min((top + height) * y_step, rows)
    box = (left * x_step, top * y_step, right, bottom)
    # A fourth channel named X: as alpha Pillow would weigh the colours with it.
    mode = "RGBX" if pixels_HWC.shape[2] == 4 else "RGB"
    image = Image.frombuffer(mode, (columns, rows), np.ascontiguousarray(pixels_HWC), "raw", mode, 0, 1)
    return np.asarray(image.resize(crop_wh_px, by.value, box=box, reducing_gap=_REDUCING_GAP.get(by)))
