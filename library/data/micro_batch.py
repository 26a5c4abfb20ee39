"""Micro-batches: what goes through the model together, and which part of each global batch a process computes.

B: samples of a micro-batch. H, W: rows and columns of the bucket in px. K: chunks of a tokenised caption.

A step has `ranks × accumulation` micro-batches of the batch size b. Number m of rank r is the step's number m·n + r (n:
ranks), and has the places from (m·n + r)·b on in the global batch. What stands at a place is a function of (seed, step,
place) and of b and the micro-batches a step alone: ranks, accumulation and workers only say who computes it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from library.data.sample.extra_images import MASK
from library.data.sample.prepare import Sample
from library.models.text import TextStates, Tokens

Tokenize = Callable[[Sequence[str]], Tokens]


@dataclass
class MicroBatch:
    """Samples of one bucket that go through the model together.

    Attributes:
        images_BHWC: uint8 RGB; none of cached latents.
        captions: as trained.
        size_ids_B6: float32 original height and width, crop top and left, target height and width, in px.
        names: where the samples come from.
        step: of the optimizer, from 0.
        micro: number of this micro-batch in its step.
        places_B: int64 places in the global batch.
        tokens: of the captions; None without a tokenizer or with cached text.
        quarantined: (name, reason) of samples that could not be used, replacements that could not either among them.
        replaced: places where another sample than the planned one stands; of a stream, samples lost on the way.
        loss_weights_B: float32, what the samples' losses are multiplied by; without it 1.
        mirrored: of each sample, whether left and right are exchanged.
        extras: uint8 images that lie over the pixels, by name: (B, H, W, 3), of masks (B, H, W); whatever extra images
            the samples were prepared with.
        moments: of cached latents: mean and standard deviation, each (B, channels, rows, columns).
        text: what the text encoders made of the captions, where that is cached.
        reader: of a stream: the number of the reader that it comes from, and where that is after it.
        epoch: of a stream: the pass that it is of, from 0.
    """

    images_BHWC: Tensor | None
    captions: list[str]
    size_ids_B6: Tensor
    names: list[str]
    step: int
    micro: int
    places_B: Tensor
    tokens: Tokens | None = None
    quarantined: list[tuple[str, str]] = field(default_factory=list)
    replaced: int = 0
    loss_weights_B: Tensor = field(default_factory=lambda: torch.ones(()))
    mirrored: list[bool] = field(default_factory=list)
    extras: dict[str, Tensor] = field(default_factory=dict)
    moments: tuple[Tensor, ...] | None = None
    text: TextStates | None = None
    reader: tuple[int, Any] | None = None
    epoch: int = 0

    def __len__(self) -> int:
        return len(self.names)

    @property
    def masks_BHW(self) -> Tensor | None:
        """uint8 weights of the loss; None: all of it counts."""
        return self.extras.get(MASK)


@dataclass(frozen=True)
class Share:
    """Which part of each global batch a process computes."""

    batch_size: int
    rank: int = 0
    world_size: int = 1
    accumulation: int = 1

    @property
    def global_batch(self) -> int:
        """Samples of one step over all processes."""
        return self.batch_size * self.micro_batches

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one step over all processes."""
        return self.world_size * self.accumulation

    def of_one_process(self) -> "Share":
        """The same global batches, all of them for one process."""
        return Share(self.batch_size, accumulation=self.micro_batches)

    def number(self, micro: int) -> int:
        """The number, among all of a step, of this process's micro-batch number `micro`."""
        return micro * self.world_size + self.rank

    def places(self, micro: int) -> np.ndarray:
        """(batch size,) int64: places in the global batch of this process's micro-batch number `micro`."""
        start = self.number(micro) * self.batch_size
        return np.arange(start, start + self.batch_size)


def _pixels(samples: Sequence[Sample]) -> Tensor | None:
    """(B, rows, columns, 3) uint8; None of latents."""
    images = [sample.pixels_HWC for sample in samples if sample.pixels_HWC is not None]
    return _stacked(images) if images else None


def _extras(samples: Sequence[Sample]) -> dict[str, Tensor]:
    """The samples' extra images, batch first, in that order in memory; all samples have the same names."""
    return {name: _stacked([sample.extras[name] for sample in samples]) for name in samples[0].extras}


def _stacked(images: Sequence[np.ndarray]) -> Tensor:
    """(B, …) uint8 in that order in memory whatever that of the decoders' arrays."""
    return torch.from_numpy(np.stack(images, out=np.empty((len(images), *images[0].shape), np.uint8)))


def micro_batch(
    samples: Sequence[Sample],
    step: int,
    micro: int,
    places_B: np.ndarray,
    tokenize: Tokenize | None,
    quarantined: list[tuple[str, str]],
    replaced: int,
) -> MicroBatch:
    """Samples of one bucket put together, wherever they come from; the arguments are as MicroBatch has them."""
    captions = [sample.caption for sample in samples]
    return MicroBatch(
        _pixels(samples),
        captions,
        torch.tensor([sample.size_ids for sample in samples], dtype=torch.float32),
        [sample.name for sample in samples],
        step,
        micro,
        torch.from_numpy(places_B),
        None if tokenize is None else tokenize(captions),
        quarantined,
        replaced,
        torch.tensor([sample.loss_weight for sample in samples], dtype=torch.float32),
        [sample.mirrored for sample in samples],
        _extras(samples),
    )
