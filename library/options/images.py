"""Options of images: how they are scaled, cropped, changed at random and masked."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import SUBSET, OptionGroup, flag

INTERPOLATIONS = ("lanczos", "nearest", "bilinear", "linear", "bicubic", "cubic", "area")


def face_range(text: str) -> tuple[float, float]:
    """'LEAST,MOST', two numbers above 0."""
    try:
        least, most = map(float, text.split(","))
    except ValueError:
        raise ValueError("must be two numbers 'LEAST,MOST', such as 2.0,4.0 (in a file also [least, most])") from None
    if not 0 < least <= most < float("inf"):
        raise ValueError("must be two numbers above 0, the smaller one first")
    return least, most


@dataclass(frozen=True, kw_only=True)
class ImageOptions(OptionGroup):
    """How the images of some samples are scaled, cropped and changed at random."""

    title: ClassVar[str] = "images"
    page: ClassVar[str] = "captions_and_crops.md"

    flip_aug: bool = flag(False, "Mirror half of the samples, drawn anew at each step", at=SUBSET)
    color_aug: bool = flag(False, "Change hue or gamma of a third of the samples a little", at=SUBSET)
    random_crop: bool = flag(False, "Crop images at random instead of at the centre", at=SUBSET)
    face_crop_aug_range: tuple[float, float] | None = flag(  # crop's shorter side over the face's longer one
        None,
        "Crop around the face that a name STEM_X_Y_W_H tells of, with a shorter side of so many times the face",
        read=face_range,
        is_text=False,
        metavar="LEAST,MOST",
        at=SUBSET,
    )
    alpha_mask: bool = flag(
        False, "Weigh the loss with the images' alpha channel, 0 where they are transparent", at=SUBSET
    )
    resize_interpolation: str | None = flag(
        None,
        "Scale images with this filter (default: the fastest that keeps the quality)",
        choices=INTERPOLATIONS,
        at=SUBSET,
    )
