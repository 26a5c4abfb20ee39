"""One sample as it is trained: an image's bytes and a caption's text become pixels of a bucket and a caption.

Whatever is random about it is a function of (seed, step, place in the global batch), wherever the bytes come from.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from library.data.captions import CaptionOptions, process_caption
from library.data.decode import Fit, decode
from library.keyed_random import Stream, generator


@dataclass(frozen=True)
class Treatment:
    """How the samples of one subset are prepared, and how much they count.

    Attributes:
        loss_weight: of each sample; that of regularisation images is --prior_loss_weight.
    """

    captions: CaptionOptions = field(default_factory=CaptionOptions)
    loss_weight: float = 1.0


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
        pixels_HWC: uint8 RGB.
        size_ids: original height and width, crop top and left, target height and width, in px.
        caption: as trained.
        name: where it comes from.
        loss_weight: what its loss is multiplied by.
    """

    pixels_HWC: np.ndarray
    size_ids: tuple[int, int, int, int, int, int]
    caption: str
    name: str
    loss_weight: float


def prepare_sample(
    name: str,
    image: bytes,
    text: str,
    treatment: Treatment,
    bucket_wh_px: tuple[int, int],
    fit: Callable[[int, int], Fit],
    at: Place,
) -> Sample:
    """Decode and crop an image, and change its caption, as the treatment has it.

    Args:
        image: the encoded file.
        text: the caption as the data set gives it, with all its lines.
        fit: from the upright image's (width, height) to how it meets the bucket.

    Raises:
        SampleError: it cannot be decoded.
    """
    pixels_HWC, size_ids = decode(image, bucket_wh_px, fit)
    rng = generator(at.seed, Stream.CAPTION, at.step, at.place)
    caption = process_caption(text, treatment.captions, rng, at.step, at.epoch)
    return Sample(pixels_HWC, size_ids, caption, name, treatment.loss_weight)
