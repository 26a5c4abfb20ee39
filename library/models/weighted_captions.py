"""Weights in captions, `(word:1.3)`, and what they do to the text encoders' states.

Shape legend: B batch, T joined states of a caption, D width of one encoder.
"""

import re
from itertools import groupby

import torch
from torch import Tensor

_FACTORS = {"(": 1.1, "[": 1 / 1.1}  # as in AUTOMATIC1111's web UI
_OPENING = {")": "(", "]": "["}
_LARGEST = 100.0  # of a weight, however brackets nest: half precision could not hold the states beyond
_TOKEN = re.compile(r"\\[()\[\]\\]|:\s*[+-]?(?:\d+(?:\.\d*)?|\.\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)


def parse_weights(caption: str) -> list[tuple[str, float]]:
    r"""The caption's text in pieces with their weights; brackets are taken out.

    `(word:1.3)` multiplies the weight of what is inside by 1.3, `(word)` by 1.1 and `[word]` by 1/1.1; they nest. A
    bracket that is not closed reaches to the end of the caption, or of the one around it; one that was not opened is
    text, and so are `\(`, `\)`, `\[`, `\]`. A caption without brackets is one piece as it stands.
    """
    if not re.search(r"[()\[\]]", caption):
        return [(caption, 1.0)]
    tokens = _TOKEN.findall(caption)
    factors, ended = _brackets(tokens)
    weights = [1.0]  # of each bracket that is open
    texts: list[tuple[float, str]] = []
    for place, token in enumerate(tokens):
        if place in factors:
            weights.append(_bounded(weights[-1] * _bounded(factors[place])))
        elif place in ended:
            del weights[-ended[place] :]
        else:
            escaped = token[0] == "\\" and len(token) == 2
            texts.append((weights[-1], token[1:] if escaped else token))
    grouped = groupby(texts, key=lambda entry: entry[0])
    return [("".join(text for _, text in group), weight) for weight, group in grouped] or [("", 1.0)]


def weigh(states_BTD: Tensor, weights_BT: Tensor) -> Tensor:
    """One encoder's states times the weights of their tokens, with each caption's mean restored.

    s' = w·s · mean(s) / mean(w·s), the means over all T·D numbers of a caption, in fp32: the formula of AUTOMATIC1111's
    web UI, whose users' captions these are. A caption whose weights are all 1 keeps its states, and their gradients,
    bit for bit.
    """
    weighted_BTD = states_BTD * weights_BT.to(states_BTD.dtype).unsqueeze(-1)
    before_B = states_BTD.float().mean(dim=(1, 2))
    after_B = weighted_BTD.float().mean(dim=(1, 2))
    is_plain_B = (weights_BT == 1).all(dim=1) | (after_B == 0)
    restored_B = before_B / torch.where(is_plain_B, torch.ones_like(after_B), after_B)
    weighted_BTD = weighted_BTD * restored_B.to(states_BTD.dtype)[:, None, None]
    return torch.where(is_plain_B[:, None, None], states_BTD, weighted_BTD)


def _brackets(tokens: list[str]) -> tuple[dict[int, float], dict[int, int]]:
    """The factors of opening brackets by their places, and how many end at a closing one."""
    factors: dict[int, float] = {}
    ended: dict[int, int] = {}
    waiting: list[int] = []
    waiting_of = {"(": 0, "[": 0}
    for place, token in enumerate(tokens):
        if token in _FACTORS:
            factors[place] = _FACTORS[token]
            waiting.append(place)
            waiting_of[token] += 1
        elif token[0] != "\\" and token[-1] in _OPENING and waiting_of[_OPENING[token[-1]]]:
            opening = None
            ended[place] = 0
            while opening is None or tokens[opening] != _OPENING[token[-1]]:
                opening = waiting.pop()
                waiting_of[tokens[opening]] -= 1
                ended[place] += 1
            if token[0] == ":":
                factors[opening] = float(token[1:-1])
    return factors, ended


def _bounded(weight: float) -> float:
    return max(-_LARGEST, min(_LARGEST, weight))
