"""How many tokens captions have, whether a run trains all of them, and prompts in as many chunks as they need."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from library.models.text import Tokens
from library.models.text_encoders import CHUNK_TOKENS, chunk_count, tokenize_all
from library.models.weighted_captions import parse_weights


@dataclass(frozen=True)
class TokenCounter:
    """Counts with the tokenizers of a run."""

    tokenizers: tuple[Any, ...]
    max_token_length: int | None
    weighted: bool = False  # captions have weights, whose brackets are no tokens

    @property
    def most(self) -> int:
        """Tokens of a caption that train; those beyond are cut off."""
        return chunk_count(self.max_token_length) * CHUNK_TOKENS

    def __call__(self, captions: Sequence[str]) -> list[int]:
        """Tokens of each caption, without BOS and EOS; of several tokenizers the one with the most counts."""
        return [max(counts) for counts in zip(*(self._counts(each, captions) for each in self.tokenizers), strict=True)]

    def tokenize_whole(self, prompts: Sequence[str]) -> Tokens:
        """Prompts with nothing cut off: in as many chunks as the longest of them needs, and no fewer than captions."""
        longest = max([self.most, *self(prompts)])
        chunks = -(-longest // CHUNK_TOKENS)
        return tokenize_all(self.tokenizers, prompts, chunks * CHUNK_TOKENS, self.weighted)

    def _counts(self, tokenizer: Any, captions: Sequence[str]) -> list[int]:
        pieces = [[text for text, _ in parse_weights(caption)] if self.weighted else [caption] for caption in captions]
        texts = [text for inner in pieces for text in inner]
        if not texts:
            return []
        encoded = tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"]
        lengths = iter(len(ids) for ids in encoded)
        return [sum(next(lengths) for _ in inner) for inner in pieces]
