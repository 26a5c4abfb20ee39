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
        "", "Train images without a caption with this one", at=SUBSET, on_command_line=False
    )
    caption_extension: str = flag(
        ".caption",
        "Read captions from the files with this extension beside the images",
        read=extension,
        at=SUBSET,
        aliases=("caption_extention",),
    )
    caption_separator: str = flag(
        ",",
        "Take what stands between these separators as the tags of a caption",
        read=separator,
        at=SUBSET,
        idle_without=(*_OF_TAGS, "keep_tokens_separator", "secondary_separator"),
    )
    secondary_separator: str = flag(
        "", "Keep tags together that stand on both sides of this separator when the others are shuffled", at=SUBSET
    )
    caption_prefix: str = flag("", "Put this text before every caption, with a space between", at=SUBSET)
    caption_suffix: str = flag("", "Put this text behind every caption, with a space between", at=SUBSET)
    enable_wildcard: bool = flag(
        False, "Take one of {a|b|c} in a caption, and one line of a caption file, anew at each step", at=SUBSET
    )
    shuffle_caption: bool = flag(False, "Shuffle the tags of a caption, anew at each step", at=SUBSET)
    keep_tokens: int = flag(
        0, "Leave so many first tags of a caption in place", least=0, at=SUBSET, idle_without=_OF_TAGS
    )
    keep_tokens_separator: str = flag(
        "",
        "Leave the tags before this separator in place where a caption has it, and those behind it where it"
        " comes again",
        at=SUBSET,
    )
    token_warmup_min: int = flag(
        1,
        "Show so many tags at the first step of --token_warmup_step",
        least=0,
        at=SUBSET,
        idle_without="token_warmup_step",
    )
    token_warmup_step: float = flag(
        0.0,
        "Show more tags of a caption step by step, and all from this step on; below 1 it is a share of the run",
        least=0,
        at=SUBSET,
    )
    caption_dropout_rate: float = flag(
        0.0, "Train this share of the samples with an empty caption", least=0, most=1, at=SUBSET
    )
    caption_dropout_every_n_epochs: int = flag(
        0, "Train each n-th epoch with empty captions; 0: none", least=0, at=SUBSET
    )
    caption_tag_dropout_rate: float = flag(
        0.0, "Leave out this share of the tags that are not kept", least=0, most=1, at=SUBSET
    )
