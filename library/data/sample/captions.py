"""What becomes of a caption between its file and the tokenizer."""

import re
from dataclasses import dataclass

import numpy as np

from library.data.caption_text import caption_lines

# Stand for braces written twice while wildcards are filled in: characters that Unicode keeps out of all texts.
_OPENING, _CLOSING = "\ufdd0", "\ufdd1"
_WILDCARD = re.compile(r"\{([^{}]+)\}")
_BRACE = re.compile("[{}]")
_DEEPEST_WILDCARD = 8  # each level is a pass over the text, which may be a megabyte


@dataclass(frozen=True)
class CaptionChanges:
    """How captions are changed; the defaults leave them as they are.

    Attributes:
        caption_prefix, caption_suffix: put before and behind every caption, with a space between.
        shuffle_caption: shuffle the tags.
        keep_tokens: leave that many first tags in place.
        keep_tokens_separator: where a caption has it, the tags before it are kept, and `keep_tokens` does not count;
            where it comes again, those behind that are kept, too.
        caption_separator: what stands between tags.
        secondary_separator: stands between tags that stay together, as if they were one.
        enable_wildcard: one line of several is taken, and one of `{a|b|c}`; `{{` and `}}` are braces.
        caption_dropout_rate: share of samples that get an empty caption.
        caption_dropout_every_n_epochs: all captions of the epochs n, 2n, … (the first is 1) are empty; 0: of none.
        caption_tag_dropout_rate: share of the tags that are left out, kept ones never.
        token_warmup_min: so many tags are shown at the first step …
        token_warmup_steps: … and all of them from this step on; 0: from the first.
    """

    caption_prefix: str = ""
    caption_suffix: str = ""
    shuffle_caption: bool = False
    keep_tokens: int = 0
    keep_tokens_separator: str = ""
    caption_separator: str = ","
    secondary_separator: str = ""
    enable_wildcard: bool = False
    caption_dropout_rate: float = 0.0
    caption_dropout_every_n_epochs: int = 0
    caption_tag_dropout_rate: float = 0.0
    token_warmup_min: int = 1
    token_warmup_steps: float = 0.0


def process_caption(text: str, options: CaptionChanges, rng: np.random.Generator, step: int, epoch: int) -> str:
    """The caption as trained.

    In this order: dropout; one line; prefix and suffix; wildcards; then, if anything is done to tags, warm-up, shuffle
    and dropout of those that are not kept, and all joined with ", "; at last what binds tags becomes what separates
    them. Where nothing is done to tags the text stays as it is. The reference joins prefix and suffix to the first and
    last line before it takes one of several, and leaves keep_tokens_separator in captions that it does not shuffle.

    The dropout rate draws its number in any case, so that changing it leaves the shuffles of other samples alone.

    Args:
        text: lines; without wildcards the first that is not empty counts.
        rng: keyed by the sample's place in the run.
        step, epoch: from 0.
    """
    dropped = rng.random() < options.caption_dropout_rate
    every = options.caption_dropout_every_n_epochs
    if dropped or (every and (epoch + 1) % every == 0):
        return ""
    lines = caption_lines(text).split("\n")
    line = lines[int(rng.integers(len(lines)))] if options.enable_wildcard and len(lines) > 1 else lines[0]
    line = " ".join(filter(None, (options.caption_prefix, line, options.caption_suffix)))
    if options.enable_wildcard:
        line = fill_wildcards(line, rng)
    if (
        options.shuffle_caption
        or options.token_warmup_steps
        or options.caption_tag_dropout_rate
        or (options.keep_tokens_separator and options.keep_tokens_separator in line)
    ):
        line = _with_tags_changed(line, options, rng, step)
    if options.secondary_separator:
        line = line.replace(options.secondary_separator, options.caption_separator)
    return line.strip()


def fill_wildcards(text: str, rng: np.random.Generator) -> str:
    """The text with one of a, b and c for each `{a|b|c}`, all alike probable; inner ones first, up to 8 deep.

    `{{` and `}}` around something become single braces; one that opens or closes nothing stays.
    """

    def choose(match: re.Match[str]) -> str:
        choices = match[1].split("|")
        return choices[int(rng.integers(len(choices)))]

    text = _with_literal_braces(text)
    for _ in range(_DEEPEST_WILDCARD):
        text, found = _WILDCARD.subn(choose, text)
        if not found:
            break
    return text.replace(_OPENING, "{").replace(_CLOSING, "}")


def _with_literal_braces(text: str) -> str:
    """The text with _OPENING and _CLOSING for braces written twice.

    Written twice are two braces in a row whose partners are in a row, too: in `{{a}}`, not in `{a|{b|c}}`, where the
    two at the end close two wildcards. So are two in a row that open or close nothing.
    """
    if "{{" not in text and "}}" not in text:
        return text
    partner: dict[int, int] = {}
    open_at: list[int] = []
    for brace in _BRACE.finditer(text):
        place = brace.start()
        if text[place] == "{":
            open_at.append(place)
        elif open_at:
            partner[place] = open_at.pop()
            partner[partner[place]] = place
    written: dict[int, str] = {}  # what stands for a brace; "" for the second of two
    for brace in _BRACE.finditer(text):
        first, second = brace.start(), brace.start() + 1
        if {first, second} & written.keys() or text[first] != text[second : second + 1]:
            continue
        if first in partner and second in partner and abs(partner[first] - partner[second]) == 1:
            pairs = [(first, second), (partner[second], partner[first])]
        elif first not in partner and second not in partner:
            pairs = [(first, second)]
        else:
            continue
        for one, other in pairs:
            written |= {one: _OPENING if text[one] == "{" else _CLOSING, other: ""}
    return "".join(written.get(place, character) for place, character in enumerate(text)) if written else text


def tags_shown(tags: int, options: CaptionChanges, step: int) -> int:
    """How many of a caption's tags token warm-up shows, from the first on.

    Before step `token_warmup_steps`, w: m + floor(step · (tags - m) / w), m being `token_warmup_min`; then all.
    """
    least, steps = options.token_warmup_min, options.token_warmup_steps
    if step >= steps or tags <= least:
        return tags
    return least + int(step * (tags - least) / steps)


def _with_tags_changed(text: str, options: CaptionChanges, rng: np.random.Generator, step: int) -> str:
    """Warm-up, which counts kept tags and never hides them; shuffle and dropout of the others."""
    first, loose, last = _parts(text, options)
    shown = tags_shown(len(first) + len(loose), options, step)
    loose = loose[: max(0, shown - len(first))]
    if options.shuffle_caption:
        loose = [loose[place] for place in rng.permutation(len(loose))]
    if options.caption_tag_dropout_rate:
        stays = rng.random(len(loose)) >= options.caption_tag_dropout_rate
        loose = [tag for tag, stay in zip(loose, stays, strict=True) if stay]
    return ", ".join(first + loose + last)


def _parts(text: str, options: CaptionChanges) -> tuple[list[str], list[str], list[str]]:
    """The tags that are kept at the beginning, those that are not kept, those that are kept at the end."""
    separator = options.keep_tokens_separator
    if separator and separator in text:
        first, loose, *last = (_tags(part, options) for part in text.split(separator))
        return first, loose, [tag for part in last for tag in part]
    tags = _tags(text, options)
    return tags[: options.keep_tokens], tags[options.keep_tokens :], []


def _tags(text: str, options: CaptionChanges) -> list[str]:
    return [tag.strip() for tag in text.split(options.caption_separator) if tag.strip()]
