"""Options of captions: where they are read, and how tags are shuffled, kept and left out."""

from dataclasses import dataclass
from typing import ClassVar

from library.options.flag import SUBSET, OptionGroup, flag

_OF_TAGS = ("shuffle_caption", "token_warmup_step", "caption_tag_dropout_rate")  # what changes the tags of a caption


def extension(text: str) -> str:
    """A file extension, with its dot added where it is missing."""
    text = text.strip()
    if not text.strip(".") or set(text) & set("/\\*?, "):
        raise ValueError("must be one file extension, such as .txt")
    return text if text.startswith(".") else f".{text}"


def separator(text: str) -> str:
    """A text that is not empty."""
    if not text:
        raise ValueError("must not be empty: it is what separates a caption's tags")
    return text


@dataclass(frozen=True, kw_only=True)
class CaptionOptions(OptionGroup):
    """How the captions of some samples are read and prepared, anew at each step."""

    title: ClassVar[str] = "captions"
    page: ClassVar[str] = "captions_and_crops.md"

    class_tokens: str = flag(  # "": as `N_class words` say
        "", "caption of images without one", at=SUBSET, on_command_line=False
    )
    caption_extension: str = flag(
        ".caption", "extension of caption files", read=extension, at=SUBSET, aliases=("caption_extention",)
    )
    caption_separator: str = flag(
        ",",
        "what separates a caption's tags",
        read=separator,
        at=SUBSET,
        idle_without=(*_OF_TAGS, "keep_tokens_separator", "secondary_separator"),
    )
    secondary_separator: str = flag("", "separates tags that stay together when the others are shuffled", at=SUBSET)
    caption_prefix: str = flag("", "put before every caption, with a space between", at=SUBSET)
    caption_suffix: str = flag("", "put behind every caption, with a space between", at=SUBSET)
    enable_wildcard: bool = flag(
        False, "take one of {a|b|c} in a caption, and one line of a caption file, anew at each step", at=SUBSET
    )
    shuffle_caption: bool = flag(False, "shuffle the tags of a caption, anew at each step", at=SUBSET)
    keep_tokens: int = flag(0, "leave that many first tags in place", least=0, at=SUBSET, idle_without=_OF_TAGS)
    keep_tokens_separator: str = flag(
        "",
        "where a caption has it, leave the tags before it in place, and those behind it where it comes again",
        at=SUBSET,
    )
    token_warmup_min: int = flag(
        1, "tags shown at the first step of --token_warmup_step", least=0, at=SUBSET, idle_without="token_warmup_step"
    )
    token_warmup_step: float = flag(
        0.0,
        "show more tags step by step, and all from this one on; below 1: a share of the run",
        least=0,
        at=SUBSET,
    )
    caption_dropout_rate: float = flag(
        0.0, "share of samples trained with an empty caption", least=0, most=1, at=SUBSET
    )
    caption_dropout_every_n_epochs: int = flag(
        0, "train each n-th epoch with empty captions; 0: none", least=0, at=SUBSET
    )
    caption_tag_dropout_rate: float = flag(
        0.0, "share of tags left out, other than kept ones", least=0, most=1, at=SUBSET
    )
