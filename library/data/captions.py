"""What becomes of a caption between its file and the tokenizer."""

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class CaptionOptions:
    """How captions are changed; the defaults leave them as they are.

    Attributes:
        shuffle_caption: shuffle the tags.
        keep_tokens: leave that many first tags in place.
        caption_separator: what stands between tags.
        caption_dropout_rate: share of samples that get an empty caption.
    """

    shuffle_caption: bool = False
    keep_tokens: int = 0
    caption_separator: str = ","
    caption_dropout_rate: float = 0.0


def process_caption(text: str, options: CaptionOptions, rng: np.random.Generator) -> str:
    """The caption as trained: dropout, then the tags after the kept ones shuffled and all joined with ", ".

    Without shuffling the text stays as it is. The rate draws its number in any case, so that changing it leaves the
    shuffles of the other samples alone.
    """
    if rng.random() < options.caption_dropout_rate:
        return ""
    if not options.shuffle_caption:
        return text.strip()
    tags = [tag.strip() for tag in text.split(options.caption_separator)]
    tags = [tag for tag in tags if tag]
    rest = tags[options.keep_tokens :]
    return ", ".join(tags[: options.keep_tokens] + [rest[place] for place in rng.permutation(len(rest))])
