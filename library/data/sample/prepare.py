"""One sample as it is trained: an image's bytes and a caption's text become pixels of a bucket and a caption.

Whatever is random about it is a function of (seed, step, place in the global batch), wherever the bytes come from.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import numpy as np
from torch import Tensor

from library.data.fit import Fit, SizeIds
from library.data.sample.augmentation import (
    CHANGE_NUMBERS,
    CROP_NUMBERS,
    ImageChanges,
    face_in,
    is_mirrored,
    placed,
    recoloured,
)
from library.data.sample.captions import CaptionChanges, process_caption
from library.data.sample.decode import decode
from library.data.sample.extra_images import MASK, decode_extras
from library.keyed_random import Stream, generator


@dataclass(frozen=True)
class Treatment:
    """How the samples of one subset are prepared, and how much they count.

    Attributes:
        loss_weight: of each sample; that of regularisation images is --prior_loss_weight.
        masked: whether each sample gets a mask; where an image has none, all of it counts.
    """

    captions: CaptionChanges = field(default_factory=CaptionChanges)
    loss_weight: float = 1.0
    images: ImageChanges = field(default_factory=ImageChanges)
    masked: bool = False


@dataclass(frozen=True)
class Place:
    """Where in a run a sample is trained: the key of its random numbers, and the epoch."""

    seed: int
    step: int
    place: int
    epoch: int


@dataclass(frozen=True)
class Sample:
    """A sample of a batch.

    Attributes:
        pixels_HWC: uint8 RGB; none of cached latents.
        size_ids: original height and width, crop top and left, target height and width, in px.
        caption: as trained.
        name: where it comes from.
        loss_weight: what its loss is multiplied by.
        mirrored: left and right are exchanged, in the size ids, too.
        extras: uint8 images that lie over the pixels, by name: (H, W, 3), of a mask (H, W).
        moments: of cached latents: mean and standard deviation.
        text: of cached text: what the text encoders gave.
    """

    pixels_HWC: np.ndarray | None
    size_ids: SizeIds
    caption: str
    name: str
    loss_weight: float
    mirrored: bool = False
    extras: Mapping[str, np.ndarray] = field(default_factory=dict)
    moments: tuple[Tensor, ...] | None = None
    text: tuple[Tensor, ...] | None = None


def prepare_sample(
    name: str,
    image: bytes,
    text: str,
    treatment: Treatment,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    at: Place,
    extras: Mapping[str, bytes] | None = None,
) -> Sample:
    """Decode and crop an image, change its colours and its caption, as the treatment has it.

    Args:
        name: of the sample; a face's place may be in it.
        image: the encoded file.
        text: the caption as the data set gives it, with all its lines.
        fit: from the upright image's (width, height) to how it meets the bucket, cropped at the centre.
        extras: encoded extra images by name; their colours stay.

    Raises:
        SampleError: it cannot be decoded, or an extra image cannot.
    """
    options = treatment.images
    crop_5 = generator(at.seed, Stream.CROP, at.step, at.place).random(CROP_NUMBERS)
    change_4 = _change_numbers(at)
    mirrored, face = is_mirrored(options, change_4), face_in(name)
    found: list[Fit] = []

    def fit_of_place(width: int, height: int) -> Fit:
        centred = fit(width, height)
        found.append(placed(centred, (width, height), bucket_wh_px, options, face, crop_5, mirrored))
        return found[-1]

    pixels_HWC, size_ids = decode(
        image, bucket_wh_px, fit_of_place, options.resize_interpolation, with_alpha=options.alpha_mask
    )
    image_wh_px = (size_ids[1], size_ids[0])
    decoded = decode_extras(extras or {}, bucket_wh_px, found[-1], image_wh_px, options.resize_interpolation)
    if options.alpha_mask:
        decoded[MASK] = pixels_HWC[..., 3]
    pixels_HWC = recoloured(pixels_HWC[..., :3], options, change_4)
    caption = _caption(text, treatment, at)
    all_extras = _with_mask(decoded, treatment, bucket_wh_px)
    return Sample(pixels_HWC, size_ids, caption, name, treatment.loss_weight, mirrored, all_extras)


def prepare_cached(
    name: str,
    encoded: Callable[[bool], tuple[SizeIds, tuple[Tensor, ...]]],
    text: str,
    treatment: Treatment,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    at: Place,
    extras: Mapping[str, bytes] | None = None,
) -> Sample:
    """The sample that `prepare_sample` makes, with cached latents in place of pixels; extra images are decoded.

    Args:
        encoded: size ids and moments of the image as it is or, with flip_aug, of it mirrored.

    Raises:
        SampleError: an extra image cannot be decoded.
    """
    mirrored = is_mirrored(treatment.images, _change_numbers(at))
    size_ids, moments = encoded(mirrored)
    caption = _caption(text, treatment, at)
    decoded: dict[str, np.ndarray] = {}
    if extras:
        image_wh_px = (size_ids[1], size_ids[0])
        as_encoded = replace(fit(*image_wh_px), mirrored=mirrored)
        decoded = decode_extras(extras, bucket_wh_px, as_encoded, image_wh_px, treatment.images.resize_interpolation)
    all_extras = _with_mask(decoded, treatment, bucket_wh_px)
    return Sample(None, size_ids, caption, name, treatment.loss_weight, mirrored, all_extras, moments=moments)


def _with_mask(
    extras: dict[str, np.ndarray], treatment: Treatment, bucket_wh_px: tuple[int, int]
) -> dict[str, np.ndarray]:
    """The extra images, and where the run has masks and the sample none, one of which all counts."""
    if treatment.masked and MASK not in extras:
        extras[MASK] = np.full(bucket_wh_px[::-1], 255, np.uint8)
    return extras


def _change_numbers(at: Place) -> np.ndarray:
    return generator(at.seed, Stream.AUGMENTATION, at.step, at.place).random(CHANGE_NUMBERS)


def _caption(text: str, treatment: Treatment, at: Place) -> str:
    rng = generator(at.seed, Stream.CAPTION, at.step, at.place)
    return process_caption(text, treatment.captions, rng, at.step, at.epoch)
