"""What the entries of a cache were made with: a digest that is part of their place, and of each entry as it is read.

Two runs over one data set with another resolution, flag or model have other settings, and so never read, or write over,
each other's entries.
"""

from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Protocol

import numpy as np

from library.data.cache.entries import digest_of
from library.data.index.mapped_file import Opened
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets
from library.data.sample.augmentation import ImageChanges
from library.data.sample.captions import CaptionChanges

_VERSION = 3  # raise it whenever the same image or caption, and settings, give other pixels or another text


class Settings(Protocol):
    """Digests of all that an encoding depends on beside the image's or caption's own content."""

    def __call__(self, row: int) -> str:
        """Of one row."""

    def of_source(self, number: int) -> str:
        """What the rows of a source share."""


class LatentSettings:
    """Bucket and what made it, how images are scaled and whether they are mirrored, and the VAE."""

    def __init__(self, index: Index, buckets: Buckets, images: Sequence[ImageChanges], encoder: str) -> None:
        """
        Args:
            images: of each subset.
            encoder: digest of the VAE and its precision.
        """
        self._index, self._buckets, self._images, self._encoder = index, buckets, images, encoder
        self._buckets_of: Opened[np.ndarray] = Opened(buckets.buckets_of)
        self._known: dict[tuple[int, int], str] = {}  # by subset and bucket

    def bucket(self, row: int) -> int:
        """A row's."""
        source, place = self._index.place(row)
        return int(self._buckets_of[source][place])

    def images(self, row: int) -> ImageChanges:
        """How the images of the row's subset are treated."""
        return self._images[self._index.source(row).subset]

    def __call__(self, row: int) -> str:
        """Of one row."""
        subset, bucket = self._index.source(row).subset, self.bucket(row)
        if (subset, bucket) not in self._known:
            shared = self._shared(subset, bucket)
            self._known[subset, bucket] = digest_of(shared, self._buckets.size(bucket))
        return self._known[subset, bucket]

    def of_source(self, number: int) -> str:
        """What the rows of a source share; "" where it has none."""
        first = int(self._index.starts_S[number])
        if first == int(self._index.starts_S[number + 1]):
            return ""
        return self._shared(self._index.sources[number].subset, self.bucket(first))

    def _shared(self, subset: int, bucket: int) -> str:
        images = self._images[subset]
        filter_ = images.resize_interpolation
        scaling = [None if filter_ is None else filter_.name, images.flip_aug]
        return digest_of(_VERSION, self._encoder, asdict(self._buckets.options_of(bucket)), scaling)


class CaptionSettings:
    """Where captions are read, what is done to them, and the text encoders."""

    def __init__(self, index: Index, captions: Sequence[CaptionChanges], encoder: str) -> None:
        """
        Args:
            captions: of each subset.
            encoder: digest of tokenizers, text encoders, their precision and the longest caption.
        """
        self._index = index
        self._known: dict[int, str] = {}  # by source
        # A caption that is dropped has an entry of its own, whatever the rate.
        self.captions = [
            replace(options, caption_dropout_rate=0.0, caption_dropout_every_n_epochs=0) for options in captions
        ]
        self._digests = [
            digest_of(
                _VERSION,
                encoder,
                asdict(options),
                subset.caption_extension,
                None if subset.metadata is None else str(subset.metadata.resolve()),
            )
            for options, subset in zip(self.captions, index.subsets, strict=True)
        ]

    def __call__(self, row: int) -> str:
        """Of one row."""
        return self._digest(self._index.place(row)[0])

    def of_source(self, number: int) -> str:
        """What the rows of a source share: all."""
        return self._digest(number)

    def _digest(self, number: int) -> str:
        if number not in self._known:
            source = self._index.sources[number]
            self._known[number] = digest_of(self._digests[source.subset], source.class_words)
        return self._known[number]
