"""What a colour profile (ICC.1:2022) does to an image: its colours become those of sRGB, by Little CMS through Pillow.

A picture without a profile is taken as sRGB (CMYK by its plain formula), as viewers do, and so is one whose profile
cannot be used: a damaged one, or one of other colours than the picture's.
"""

import io
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from PIL import Image, ImageCms

_SPACES = {1: "GRAY", 3: "RGB", 4: "CMYK"}  # of a profile, by the picture's channels
_MODES = {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}  # Pillow's
_SAME = 2  # of 255: a profile that changes no colour by more is sRGB in one of its many spellings
_GRID = 16  # colours an axis that are tried
_PROFILES_KEPT = 64  # a process keeps so many, since most pictures share a few; each costs a few ms to make
_MOST_LETTERS = 60


@dataclass(frozen=True)
class Conversion:
    """What becomes of an image with a profile.

    Attributes:
        name: the profile's own.
        transform: to sRGB; None where none is needed, or none can be made.
        mode: Pillow's mode that it takes.
        usable: whether the profile could be read, and is one of such a picture's colours.
    """

    name: str = ""
    transform: ImageCms.ImageCmsTransform | None = None
    mode: str = "RGB"
    usable: bool = True


@lru_cache(_PROFILES_KEPT)
def conversion(icc: bytes, channels: int) -> Conversion:
    """What a profile does to a picture of 1, 3 or 4 channels, alpha not counted."""
    if not icc:
        return Conversion()
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(icc))
        name = " ".join(str(profile.profile.profile_description or "").split())
        name = "".join(letter for letter in name if letter.isprintable())[:_MOST_LETTERS] or "a profile without a name"
        space = profile.profile.xcolor_space.strip()
        # Grey pictures with a profile for colours are usual: they are colours without colour.
        if space != _SPACES[channels] and (space, channels) != ("RGB", 1):
            return Conversion(name, usable=False)
        mode = _MODES[space]
        transform = ImageCms.buildTransform(profile, ImageCms.createProfile("sRGB"), mode, "RGB")
        return Conversion(name, None if _changes_nothing(transform, mode) else transform, mode)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError, KeyError):
        return Conversion(usable=False)


def channels_of(image: Image.Image) -> int:
    """1, 3 or 4; alpha is not counted."""
    return 1 if image.mode[0] in "L1I" and image.mode != "LAB" else 4 if image.mode == "CMYK" else 3


@lru_cache(1)
def _from_lab() -> ImageCms.ImageCmsTransform:
    return ImageCms.buildTransform(ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB"), "LAB", "RGB")


def in_srgb(image: Image.Image, icc: bytes) -> Image.Image:
    """An image of 8 bits in sRGB; alpha stays as it is. What needs no conversion comes back as it is."""
    if image.mode == "LAB":
        return ImageCms.applyTransform(image, _from_lab()) or image
    found = conversion(icc, channels_of(image))
    if found.transform is None:
        return image
    alpha = image.convert("RGBA").getchannel("A") if image.has_transparency_data else None
    if image.mode != found.mode:
        image = image.convert(found.mode)
    converted = ImageCms.applyTransform(image, found.transform)
    assert converted is not None  # it is not asked to work in place
    if alpha is not None:
        converted.putalpha(alpha)
    return converted


def _changes_nothing(transform: ImageCms.ImageCmsTransform, mode: str) -> bool:
    """Whether colours stay what they are."""
    if mode == "CMYK":
        return False
    steps = np.linspace(0, 255, _GRID if mode == "RGB" else 256).round().astype(np.uint8)
    colours = np.stack(np.meshgrid(steps, steps, steps), -1).reshape(1, -1, 3) if mode == "RGB" else steps[None]
    changed = np.asarray(ImageCms.applyTransform(Image.fromarray(colours), transform), int)
    return bool(np.abs(changed - (colours if mode == "RGB" else colours[..., None])).max() <= _SAME)
