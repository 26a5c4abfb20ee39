"""Tokens of captions as the report and --debug_dataset count them."""

import pytest

from library.models.text_encoders import tokenize_counted
from library.models.token_counts import TokenCounter


@pytest.mark.parametrize(("length", "most"), [(None, 75), (77, 75), (150, 150), (512, 525)])
def test_what_is_cut_is_what_the_tokenizer_cuts(tokenizers, length, most):
    counter = TokenCounter(tokenizers, length)
    captions = ["", "a red cat", "cat " * 76, "photo of a dog, " * 200]
    assert counter.most == most
    dropped = tokenize_counted(tokenizers[0], captions, length)[1]
    assert [max(count - most, 0) for count in counter(captions)] == dropped
    assert counter(captions)[:3] == [0, 3, 76]
    assert counter([]) == []


def test_brackets_of_weights_are_no_tokens(tokenizers):
    counter = TokenCounter(tokenizers, None, weighted=True)
    assert counter(["a (red:1.3) [cat]"]) == counter(["a red cat"]) == [3]
    assert TokenCounter(tokenizers, None)(["a (red:1.3) [cat]"])[0] > 3


@pytest.mark.parametrize(("length", "chunks"), [(None, (1, 1, 2, 3)), (77, (1, 1, 2, 3)), (150, (2, 2, 2, 3))])
def test_prompts_have_as_many_chunks_as_they_need_and_captions_at_least(tokenizers, length, chunks):
    counter = TokenCounter(tokenizers, length)
    for tokens, expected in zip((0, 75, 76, 151), chunks, strict=True):
        whole = counter.tokenize_whole(["cat " * tokens, "dog"])
        assert [tuple(ids.shape) for ids in whole.ids] == [(2, expected, 77)] * 2
        cat = tokenizers[0]("cat")["input_ids"][1]
        assert int((whole.ids[0] == cat).sum()) == tokens
