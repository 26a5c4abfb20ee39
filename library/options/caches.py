"""Options of the caches: which encodings are computed once, before training, and where they are kept."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.address import Address
from library.options.data import SubsetOptions
from library.options.flag import OptionGroup, flag

if TYPE_CHECKING:
    from library.options.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class CacheOptions(OptionGroup):
    """What is kept of VAE and text encoders."""

    title: ClassVar[str] = "caches of encodings"
    page: ClassVar[str] = "caches.md"

    cache_latents: bool = flag(False, "Encode all images before training, and keep their latents in memory")
    cache_latents_to_disk: bool = flag(
        False,
        "Encode all images before training, and keep their latents on disk: beside images as .npz that "
        "sd-scripts reads, of shards in .encoding_cache beside them",
    )
    vae_batch_size: int | None = flag(
        None,
        "Send so many images through the VAE at once, with and without a cache (default: --train_batch_size)",
        least=1,
    )
    cache_text_encoder_outputs: bool = flag(
        False,
        "Encode all captions before training, and keep the results in memory; the text encoders leave the device",
    )
    cache_text_encoder_outputs_to_disk: bool = flag(
        False,
        "Encode all captions before training, and keep the results on disk: beside images as .npz that "
        "sd-scripts reads, of shards in .encoding_cache beside them",
    )
    text_encoder_batch_size: int | None = flag(
        None,
        "Encode so many captions at once for the cache (default: --train_batch_size)",
        least=1,
        needs=("cache_text_encoder_outputs", "cache_text_encoder_outputs_to_disk"),
    )
    skip_cache_check: bool = flag(
        False,
        "Use what a cache on disk has without reading images again, and .npz of sd-scripts as they are",
        needs=("cache_latents_to_disk", "cache_text_encoder_outputs_to_disk"),
    )

    @property
    def latents(self) -> bool:
        """Whether latents are kept anywhere."""
        return self.cache_latents or self.cache_latents_to_disk

    @property
    def text(self) -> bool:
        """Whether text-encoder outputs are kept anywhere."""
        return self.cache_text_encoder_outputs or self.cache_text_encoder_outputs_to_disk

    @property
    def latents_flag(self) -> str:
        """The flag that asks for latents."""
        return "--cache_latents" + ("_to_disk" if self.cache_latents_to_disk else "")

    @property
    def text_flag(self) -> str:
        """The flag that asks for text-encoder outputs."""
        return "--cache_text_encoder_outputs" + ("_to_disk" if self.cache_text_encoder_outputs_to_disk else "")

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where data is a stream, or something random stands against a cache."""
        for subset in options.data.subsets:
            if (self.latents or self.text) and isinstance(subset.train_data_dir, Address):
                yield (
                    f"{self.latents_flag if self.latents else self.text_flag} needs an index, and --train_data_dir "
                    f"{subset.train_data_dir} is a stream. Leave it out, or download the shards"
                )
            if self.latents:
                yield from self._check_pixels(subset)
            if self.text:
                yield from self._check_captions(subset)

    def _check_pixels(self, subset: SubsetOptions) -> Iterator[str]:
        against = {
            "--random_crop": subset.random_crop,
            "--color_aug": subset.color_aug,
            "--face_crop_aug_range": subset.face_crop_aug_range is not None,
            "--alpha_mask": subset.alpha_mask,
        }
        for flag_, forbids in against.items():
            if forbids:
                yield (
                    f"{self.latents_flag} encodes each image once, as it is, and {flag_} needs its pixels; leave out "
                    "one"
                )

    def _check_captions(self, subset: SubsetOptions) -> Iterator[str]:
        against = {
            "--shuffle_caption": subset.shuffle_caption,
            "--enable_wildcard": subset.enable_wildcard,
            "--caption_tag_dropout_rate": subset.caption_tag_dropout_rate > 0,
            "--token_warmup_step": subset.token_warmup_step > 0,
        }
        for flag_, forbids in against.items():
            if forbids:
                yield (
                    f"{self.text_flag} encodes each caption once, and {flag_} makes it another at each step; leave out "
                    "one (the dropout of whole captions goes together with the cache)"
                )
