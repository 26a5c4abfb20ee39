"""Make a small CLIP tokenizer: its byte pair encoding merges each given word into a single token.

The vocabulary has CLIP's layout: 256 byte symbols, the same 256 at the end of a word, the merged tokens, and last
<|startoftext|> and <|endoftext|> (the highest id, by which SDXL's configs find the end). It contains all bytes, so any
text can be tokenized.
"""

import json
from collections import Counter
from collections.abc import Iterable
from itertools import pairwise
from pathlib import Path

START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_END = "</w>"


def byte_symbols() -> list[str]:
    """A printable character for each byte, in CLIP's (and GPT-2's) order, so that '!' is number 0."""
    printable = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return [chr(byte) for byte in printable] + [chr(256 + index) for index in range(len(others))]


def learn_merges(words: Iterable[str]) -> list[tuple[str, str]]:
    """Learn merges (Sennrich et al., 1508.07909) until every word is one token; words are lower-case ASCII."""
    split = {word: [*word[:-1], word[-1] + _WORD_END] for word in sorted(set(words))}
    merges: list[tuple[str, str]] = []
    while pairs := Counter(pair for parts in split.values() for pair in pairwise(parts)):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        split = {word: _merged(parts, best) for word, parts in split.items()}
    return merges


def _merged(parts: list[str], pair: tuple[str, str]) -> list[str]:
    result: list[str] = []
    for part in parts:
        if result and (result[-1], part) == pair:
            result[-1] += part
        else:
            result.append(part)
    return result


def write_tokenizer(folder: Path, words: Iterable[str], pad_token: str) -> int:
    """Write vocab.json, merges.txt and the two configs of a CLIPTokenizer; returns the size of the vocabulary."""
    merges = learn_merges(words)
    symbols = byte_symbols()
    tokens = [*symbols, *(symbol + _WORD_END for symbol in symbols)]
    tokens += [token for token in dict.fromkeys(left + right for left, right in merges) if token not in tokens]
    tokens += [START, END]
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": pad_token}
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "add_prefix_space": False,
        "do_lower_case": True,
        "errors": "replace",
        **special,
    }
    folder.mkdir(parents=True, exist_ok=True)
    contents = {
        "vocab.json": json.dumps({token: number for number, token in enumerate(tokens)}, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *(" ".join(pair) for pair in merges)]) + "\n",
        "special_tokens_map.json": json.dumps(special, indent=2),
        "tokenizer_config.json": json.dumps(config, indent=2),
    }
    for name, content in contents.items():
        (folder / name).write_text(content, encoding="utf-8")
    return len(tokens)
