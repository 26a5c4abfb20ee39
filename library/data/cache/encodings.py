"""What a cache's entries are made of: images through the VAE, captions through the text encoders."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.data.cache.entries import Entry, Made, digest_bytes
from library.data.cache.fill import Loaded
from library.data.cache.settings import CaptionSettings, LatentSettings
from library.data.fit import Fit
from library.data.index.table import Index
from library.data.order.bucket_rows import Buckets
from library.data.order.row_fit import row_fit
from library.data.sample.augmentation import ImageChanges
from library.data.sample.captions import process_caption
from library.data.sample.decode import decode
from library.data.sample.prepare import Treatment
from library.data.sample.reader import Reader
from library.keyed_random import Stream, generator

EncodeImages = Callable[[Tensor], tuple[Tensor, ...]]
EncodeCaptions = Callable[[Sequence[str]], tuple[Tensor, ...]]


class LatentMaking:
    """Latents: the mean and standard deviation of the VAE's posterior for each image as its bucket has it."""

    def __init__(
        self,
        index: Index,
        buckets: Buckets,
        images: Sequence[ImageChanges],
        encoder: str,
        encode: EncodeImages,
        batch_size: int,
    ) -> None:
        """
        Args:
            images: of each subset; nothing in them but mirroring may be random.
            encoder: digest of the VAE and its precision.
            encode: from images (B, rows, columns, 3) in uint8 to mean and standard deviation.
        """
        self.batch_size = batch_size
        self.settings = LatentSettings(index, buckets, images, encoder)
        self._index, self._buckets, self._encode = index, buckets, encode
        self._reader = Reader(index)

    def group(self, row: int) -> tuple[int, bool]:
        """The bucket, and whether the mirrored image is encoded, too."""
        return self.settings.bucket(row), self.settings.images(row).flip_aug

    def content(self, row: int) -> str:
        """Of the image's file."""
        return digest_bytes(self._reader.image(row))

    def load(self, row: int) -> Loaded:
        """The image decoded and cropped; with flip_aug also mirrored."""
        image, bucket, options = self._reader.image(row), self.settings.bucket(row), self.settings.images(row)
        fits: list[Fit] = []

        def fit(width: int, height: int) -> Fit:
            fits.append(row_fit(self._index, self._buckets, row, bucket, width, height))
            return fits[-1]

        bucket_wh_px = self._buckets.size(bucket)
        pixels_HWC, size_ids = decode(image, bucket_wh_px, fit, options.resize_interpolation)
        if not options.flip_aug:
            return Loaded(digest_bytes(image), size_ids, np.stack([pixels_HWC]))
        height, width, top, _, target_h, target_w = size_ids
        left = replace(fits[-1], mirrored=True).seen_left_px(bucket_wh_px[0])
        both = (*size_ids, height, width, top, left, target_h, target_w)
        return Loaded(digest_bytes(image), both, np.stack([pixels_HWC, pixels_HWC[:, ::-1]]))

    def encode(self, items: Sequence[Any]) -> tuple[Tensor, ...]:
        """Mean and standard deviation, and where there are mirrored images those of them."""
        images_VBHWC = torch.from_numpy(np.ascontiguousarray(np.stack(items, axis=1)))
        return tuple(moment_BCHW for images_BHWC in images_VBHWC for moment_BCHW in self._encode(images_BHWC))


class CaptionMaking:
    """Text-encoder outputs: text states and pooled text for each caption as it is trained when it is not dropped."""

    def __init__(
        self, index: Index, treatments: Sequence[Treatment], encoder: str, encode: EncodeCaptions, batch_size: int
    ) -> None:
        """
        Args:
            treatments: of each subset; nothing in them but the dropout of whole captions may be random.
            encoder: digest of tokenizers, text encoders, their precision and the longest caption.
            encode: from captions to text states and pooled text.
        """
        self.batch_size = batch_size
        self.settings = CaptionSettings(index, [treatment.captions for treatment in treatments], encoder)
        self._index, self._encode = index, encode
        self._reader = Reader(index)

    def group(self, row: int) -> int:
        """Every caption has the same number of chunks."""
        return 0

    def content(self, row: int) -> str:
        """Of the caption."""
        return digest_bytes(self._caption(row).encode())

    def load(self, row: int) -> Loaded:
        """The caption."""
        caption = self._caption(row)
        return Loaded(digest_bytes(caption.encode()), (), caption)

    def encode(self, items: Sequence[Any]) -> tuple[Tensor, ...]:
        """Text states and pooled text."""
        return self._encode(items)

    def empty(self) -> Entry:
        """The entry of a caption that is dropped."""
        return Entry(Made(digest_bytes(b""), ""), (), tuple(tensor[0] for tensor in self._encode([""])))

    def _caption(self, row: int) -> str:
        options = self.settings.captions[self._index.source(row).subset]
        return process_caption(self._reader.caption(row), options, generator(0, Stream.CAPTION), step=0, epoch=0)
