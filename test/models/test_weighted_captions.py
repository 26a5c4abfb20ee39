"""Weights in captions: how they are read, and that they act as the formula says, here written out by hand."""

import copy
import time

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from library.families import SDXL
from library.models.denoiser import Denoiser
from library.models.text import Tokens
from library.models.text_encoders import encode, tokenize, tokenize_all, tokenize_weighted
from library.models.weighted_captions import parse_weights, weigh


@pytest.mark.parametrize(
    ("caption", "pieces"),
    [
        ("a red, cat: 3\\", [("a red, cat: 3\\", 1)]),
        ("a (red) cat", [("a ", 1), ("red", 1.1), (" cat", 1)]),
        ("a (red:1.3) [cat]", [("a ", 1), ("red", 1.3), (" ", 1), ("cat", 1 / 1.1)]),
        ("((red) cat:2)", [("red", 2.2), (" cat", 2)]),
        ("((a:1.5):2)", [("a", 3)]),
        ("[(a:1.1)]", [("a", 1)]),
        (r"\(a\) (b\)\\)", [("(a) ", 1), ("b)\\", 1.1)]),
        ("(a", [("a", 1.1)]),
        ("a) b] c:2)", [("a) b] c:2)", 1)]),
        ("(a [b) c]", [("a ", 1.1), ("b c]", 1)]),
        ("(a: .5 ) (b:+2) (c:-1)", [("a", 0.5), (" ", 1), ("b", 2), (" ", 1), ("c", -1)]),
        ("(a:b) (c:1.2.3)", [("a:b", 1.1), (" ", 1), ("c:1.2.3", 1.1)]),
        ("(time 10:30)", [("time 10", 30)]),
        ("()", [("", 1)]),
        ("(((((a:1e9)))))", [("a:1e9", 1.1**5)]),
        ("((a:99999):99999)", [("a", 100)]),
    ],
)
def test_captions_are_read_as_the_web_uis_do(caption, pieces):
    found = parse_weights(caption)
    assert [text for text, _ in found] == [text for text, _ in pieces]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in pieces])


@given(st.text("ab, ()[]:\\.123", max_size=40))
def test_no_text_gets_lost_and_every_weight_is_finite(caption):
    pieces = parse_weights(caption)
    assert all(abs(weight) <= 100 for _, weight in pieces)
    letters = [letter for letter in caption if letter in "ab, "]
    found = [letter for text, _ in pieces for letter in text if letter in "ab, "]
    assert [letter for letter in found if letter != " "] == [letter for letter in letters if letter != " "]
    if not set(caption) & set("()[]"):
        assert pieces == [(caption, 1)]


USES = SDXL.uses(None)


def _tokens(both):
    """Ids and weights of each tokenizer, as `tokenize_weighted` gives them."""
    return Tokens(tuple(ids for ids, _ in both), tuple(weights for _, weights in both))


def test_no_caption_keeps_a_worker_busy_for_long():
    began = time.process_time()
    for text in (
        "(" * 1_000_000,
        "([" * 300_000 + ")]" * 200_000,
        ":" * 999_999 + ")(",
        "(:" + "1" * 999_999,
        "a(" * 500_000,
    ):
        parse_weights(text)
    assert time.process_time() - began < 15


def test_states_are_weighed_and_their_mean_restored():
    """s·w·mean(s)/mean(s·w) of each caption alone, in double precision by NumPy."""
    states = torch.randn(3, 7, 5, generator=torch.Generator().manual_seed(1)) + 0.5
    weights = torch.tensor([[1, 1.3, 1.3, 1, 0.5, 1, 1], [1.0] * 7, [1, 1, 1, -1, 0, 1, 1]])
    s, w = states.double().numpy(), weights.double().numpy()[:, :, None]
    expected = s * w * s.mean(axis=(1, 2), keepdims=True) / (s * w).mean(axis=(1, 2), keepdims=True)
    found = weigh(states, weights)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-5)
    assert torch.equal(found[1], states[1])


@pytest.mark.parametrize("length", [77, 225])
def test_both_encoders_are_weighed_chunk_by_chunk_and_the_pooled_vector_is_not(length, tokenizers, text_encoders):
    """A caption of two chunks, with a weight on both sides of the border, and one without weights."""
    plain = "a cat " * 35 + "red dog " * 6 + "of a photo"
    weighted = "a cat " * 35 + "(" + "red dog " * 6 + ":1.4)of a [photo]"
    with torch.no_grad():
        ids = [tokenize(tokenizer, [plain, "a dog"], length) for tokenizer in tokenizers]
        context, pooled = encode(text_encoders, Tokens(tuple(ids)), USES)
        both = [tokenize_weighted(tokenizer, [weighted, "a dog"], length) for tokenizer in tokenizers]
        found, found_pooled = encode(text_encoders, _tokens(both), USES)
    assert all(torch.equal(one, other) for one, (other, _) in zip(ids, both, strict=True))
    token_weights = ([1.0] * 70 + [1.4] * 12 + [1.0] * 2 + [1 / 1.1])[: context.shape[1] - 2]
    w = np.array([1.0, *token_weights, *[1.0] * (context.shape[1] - 1 - len(token_weights))])[:, None]
    for channels in (slice(0, 64), slice(64, None)):
        s = context[0, :, channels].double().numpy()
        np.testing.assert_allclose(
            found[0, :, channels].numpy(), s * w * s.mean() / (s * w).mean(), rtol=2e-4, atol=1e-5
        )
    assert torch.equal(found[1], context[1])
    assert torch.equal(found_pooled, pooled)


def test_without_brackets_prediction_and_gradients_are_those_without_the_flag_bit_for_bit(sdxl):
    captions = ["a photo of a cat, red", ""]
    inputs = torch.randn(2, 4, 8, 8), torch.tensor([10, 700])
    sizes = torch.tensor([[64.0, 64, 0, 0, 64, 64]] * 2)
    found = []
    for weighted in (False, True):
        module = Denoiser(copy.deepcopy(sdxl), (True, True), gradient_checkpointing=weighted)
        ids = tokenize_all(sdxl.tokenizers, captions, 150).ids
        weights = tokenize_all(sdxl.tokenizers, captions, 150, weighted=True).weights if weighted else ()
        prediction = module(*inputs, Tokens(ids, weights), sizes)
        prediction.square().mean().backward()
        gradients = [parameter.grad for parameter in module.parameters() if parameter.grad is not None]
        found.append([prediction.detach(), *gradients])
    assert len(found[0]) == len(found[1]) > 100
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))


def test_weights_reach_the_gradients_of_both_encoders(tokenizers, text_encoders):
    gradients = []
    for caption in ("a (red:1.5) cat", "a red cat"):
        encoders = [copy.deepcopy(encoder) for encoder in text_encoders]
        both = [tokenize_weighted(tokenizer, [caption]) for tokenizer in tokenizers]
        context, _ = encode(encoders, _tokens(both), USES)
        context.sin().sum().backward()
        gradients.append([encoder.get_input_embeddings().weight.grad for encoder in encoders])
    assert all(not torch.allclose(one, other) for one, other in zip(*gradients, strict=True))
