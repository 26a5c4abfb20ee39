"""Options of the caches: which encodings are computed once, before training, and where they are kept."""

from argparse import ArgumentParser
from dataclasses import dataclass

from library.options.parser import positive_int


@dataclass(frozen=True)
class CacheOptions:
    """What is kept of VAE and text encoders."""

    cache_latents: bool
    cache_latents_to_disk: bool
    vae_batch_size: int | None
    cache_text_encoder_outputs: bool
    cache_text_encoder_outputs_to_disk: bool
    text_encoder_batch_size: int | None
    skip_cache_check: bool

    @property
    def latents(self) -> bool:
        """Whether latents are kept anywhere."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text(self) -> bool:
        """Whether text-encoder outputs are kept anywhere."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk


def add_arguments(parser: ArgumentParser) -> None:
    """Add this group's flags to a parser."""
    group = parser.add_argument_group("caches of encodings")
    group.add_argument(
        "--cache_latents", action="store_true", help="encode all images before training and keep them in memory"
    )
    group.add_argument(
        "--cache_latents_to_disk",
        action="store_true",
        help="keep them on disk: beside images as .npz that sd-scripts reads, of shards in .encoding_cache beside them",
    )
    group.add_argument(
        "--vae_batch_size",
        type=positive_int,
        help="images that go through the VAE at once, with and without a cache (default: --train_batch_size)",
    )
    group.add_argument(
        "--cache_text_encoder_outputs",
        action="store_true",
        help="encode all captions before training and keep the results in memory; the text encoders leave the device",
    )
    group.add_argument(
        "--cache_text_encoder_outputs_to_disk",
        action="store_true",
        help="keep them on disk: beside images as .npz that sd-scripts reads, of shards in .encoding_cache beside them",
    )
    group.add_argument(
        "--text_encoder_batch_size",
        type=positive_int,
        help="captions that are encoded at once for the cache (default: --train_batch_size)",
    )
    group.add_argument(
        "--skip_cache_check",
        action="store_true",
        help="use what a cache on disk has without reading images again, and .npz of sd-scripts as they are",
    )
