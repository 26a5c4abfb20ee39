"""Options of the text encoders: their tokenizers, and whether and how fast they train."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

from library.options.flag import OptionGroup, PathTo, flag

if TYPE_CHECKING:
    from library.options.training import TrainingOptions


@dataclass(frozen=True, kw_only=True)
class TextEncoderOptions(OptionGroup):
    """Base of each family's text-encoder options; by itself no text encoder trains."""

    title: ClassVar[str] = "text encoders"

    @property
    def tokenizers(self) -> tuple[str | None, ...]:
        """A name or folder of each encoder's tokenizer; None for the model's own."""
        return ()

    def rates(self, learning_rate: float) -> tuple[float, ...]:
        """Each encoder's learning rate; 0 for one that does not train.

        Args:
            learning_rate: of the U-Net.
        """
        return ()


@dataclass(frozen=True, kw_only=True)
class SDXLTextEncoderOptions(TextEncoderOptions):
    """Both text encoders of SDXL: CLIP-L and OpenCLIP bigG."""

    tokenizer1_path: str | None = flag(
        None,
        "Use this tokenizer for CLIP-L: a hub name or a folder (default: the model's own)",
        same_on_ranks=False,
        path_to=PathTo.TOKENIZER,
    )
    tokenizer2_path: str | None = flag(
        None,
        "Use this tokenizer for OpenCLIP bigG: a hub name or a folder (default: the model's own)",
        same_on_ranks=False,
        path_to=PathTo.TOKENIZER,
    )
    train_text_encoder: bool = flag(False, "Train both text encoders, too")
    learning_rate_te1: float | None = flag(
        None, "Train CLIP-L at this learning rate (default: --learning_rate; 0: it is not trained)", least=0
    )
    learning_rate_te2: float | None = flag(
        None, "Train OpenCLIP bigG at this learning rate (default: --learning_rate; 0: it is not trained)", least=0
    )

    @property
    def tokenizers(self) -> tuple[str | None, ...]:
        """CLIP-L's and OpenCLIP bigG's."""
        return self.tokenizer1_path, self.tokenizer2_path

    def rates(self, learning_rate: float) -> tuple[float, ...]:
        """CLIP-L's and OpenCLIP bigG's learning rate."""
        if not self.train_text_encoder:
            return 0.0, 0.0
        own = self.learning_rate_te1, self.learning_rate_te2
        return tuple(learning_rate if rate is None else rate for rate in own)

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where an encoder trains and is cached, or has a rate and does not train."""
        for flag_, rate in (
            ("--learning_rate_te1", self.learning_rate_te1),
            ("--learning_rate_te2", self.learning_rate_te2),
        ):
            if rate and not self.train_text_encoder:
                yield (f"{flag_}={rate:g} trains nothing without --train_text_encoder; add that, or leave it out")
        yield from _trains_and_is_cached(self.train_text_encoder, options)


@dataclass(frozen=True, kw_only=True)
class SDTextEncoderOptions(TextEncoderOptions):
    """The text encoder of SD 1.x or SD 2.x."""

    tokenizer_path: str | None = flag(
        None,
        "Use this tokenizer for the text encoder: a hub name or a folder (default: the model's own)",
        same_on_ranks=False,
        path_to=PathTo.TOKENIZER,
    )
    train_text_encoder: bool = flag(False, "Train the text encoder, too")
    learning_rate_te: float | None = flag(
        None, "Train the text encoder at this learning rate (default: --learning_rate; 0: it is not trained)", least=0
    )

    @property
    def tokenizers(self) -> tuple[str | None, ...]:
        """The one encoder's."""
        return (self.tokenizer_path,)

    def rates(self, learning_rate: float) -> tuple[float, ...]:
        """The one encoder's learning rate."""
        if not self.train_text_encoder:
            return (0.0,)
        return (learning_rate if self.learning_rate_te is None else self.learning_rate_te,)

    def check(self, options: "TrainingOptions") -> Iterator[str]:
        """Say where the encoder trains and is cached, or has a rate and does not train."""
        if self.learning_rate_te and not self.train_text_encoder:
            yield (
                f"--learning_rate_te={self.learning_rate_te:g} trains nothing without --train_text_encoder; add that, "
                "or leave it out"
            )
        yield from _trains_and_is_cached(self.train_text_encoder, options)


def _trains_and_is_cached(trains: bool, options: "TrainingOptions") -> Iterator[str]:
    """Say where a text encoder trains whose outputs are kept."""
    if options.caches.text and trains:
        yield (
            f"{options.caches.text_flag} keeps what text encoders give that --train_text_encoder changes; leave out one"
        )
