"""SDXL's text conditioning against diffusers' pipeline and against states joined by hand."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from library.errors import InputError
from library.families import SDXL
from library.models.text import Tokens
from library.models.text_encoders import (
    chunk_count,
    enable_gradient_checkpointing,
    encode,
    set_trainable,
    tokenize,
    tokenize_counted,
    trainable_parameters,
)

CAPTIONS = ["a photo of a cat", "", "a red dog, a blue cat " * 5]


USES = SDXL.uses(None)


def _pipeline(tokenizers, text_encoders, vae):
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    unet = UNet2DConditionModel(
        block_out_channels=(32,), down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), layers_per_block=1,
        cross_attention_dim=192,
    )  # fmt: skip
    return StableDiffusionXLPipeline(
        vae, *text_encoders, *tokenizers, unet, EulerDiscreteScheduler(), add_watermarker=False
    )


def test_one_chunk_is_what_diffusers_pipeline_conditions_on(tokenizers, text_encoders, vae):
    pipeline = _pipeline(tokenizers, text_encoders, vae)
    with torch.no_grad():
        expected, _, expected_pooled, _ = pipeline.encode_prompt(CAPTIONS, do_classifier_free_guidance=False)
        ids1, ids2 = (tokenize(tokenizer, CAPTIONS) for tokenizer in tokenizers)
        context, pooled = encode(text_encoders, Tokens((ids1, ids2)), USES)
    assert context.shape == (3, 77, 64 + 128)
    torch.testing.assert_close(context, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(pooled, expected_pooled, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(pooled[0], pooled[1], atol=1e-2)


def test_ids_are_the_tokenizers_own_padded_ones(tokenizers):
    for tokenizer in tokenizers:
        expected = tokenizer(CAPTIONS, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
        assert torch.equal(tokenize(tokenizer, CAPTIONS)[:, 0], expected["input_ids"])
    # The first pads with EOS, the second with "!" (id 0).
    assert [int(tokenize(tokenizer, [""])[0, 0, -1]) for tokenizer in tokenizers] == [tokenizers[0].eos_token_id, 0]


@pytest.mark.parametrize(("length", "chunks"), [(None, 1), (77, 1), (75, 1), (76, 2), (150, 2), (225, 3), (512, 7)])
def test_chunks_of_a_token_length(length, chunks, tokenizers):
    assert chunk_count(length) == chunks
    assert tokenize(tokenizers[0], ["a cat"], length).shape == (1, chunks, 77)


def test_a_length_below_one_is_refused():
    with pytest.raises(InputError, match="--max_token_length"):
        chunk_count(0)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 240), st.sampled_from([None, 150, 225, 512]))
def test_every_token_stands_once_or_is_counted_as_cut(tokenizers, tokens, length):
    text = " ".join(["cat", "dog", "red"][place % 3] for place in range(tokens))
    tokenizer = tokenizers[1]
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert len(whole) == tokens
    ids, dropped = tokenize_counted(tokenizer, [text], length)
    kept = []
    for chunk in ids[0].tolist():
        end = chunk.index(tokenizer.eos_token_id)
        assert chunk[0] == tokenizer.bos_token_id
        assert set(chunk[end + 1 :]) <= {tokenizer.pad_token_id}
        kept += chunk[1:end]
    assert kept == whole[: len(kept)]
    assert dropped == [tokens - len(kept)]
    assert len(kept) == min(tokens, 75 * chunk_count(length))


@pytest.mark.parametrize(("length", "states"), [(77, 77), (150, 152), (225, 227), (512, 527)])
def test_long_captions_are_chunks_encoded_alone_and_joined(length, states, tokenizers, text_encoders):
    captions = ["a cat " * 100, "a red dog"]
    tokens = [
        [tokenizer(caption, add_special_tokens=False)["input_ids"] for caption in captions] for tokenizer in tokenizers
    ]
    ids1, ids2 = (tokenize(tokenizer, captions, length) for tokenizer in tokenizers)
    with torch.no_grad():
        context, pooled = encode(text_encoders, Tokens((ids1, ids2)), USES)
        assert context.shape == (2, states, 192)
        for row in range(2):
            by_hand = []
            for encoder, tokenizer, tokens_of in zip(text_encoders, tokenizers, tokens, strict=True):
                outputs = []
                for start in range(0, states - 2, 75):
                    chunk = [tokenizer.bos_token_id, *tokens_of[row][start : start + 75], tokenizer.eos_token_id]
                    chunk += [tokenizer.pad_token_id] * (77 - len(chunk))
                    outputs.append(encoder(torch.tensor([chunk]), output_hidden_states=True))
                hidden = [output.hidden_states[-2][0] for output in outputs]
                by_hand.append(torch.cat([hidden[0][:1], *[part[1:76] for part in hidden], hidden[-1][76:]]))
            torch.testing.assert_close(context[row], torch.cat(by_hand, dim=-1), rtol=1e-5, atol=1e-5)
            torch.testing.assert_close(pooled[row], outputs[0].text_embeds[0], rtol=1e-5, atol=1e-5)


def test_exactly_the_trainable_parameters_get_gradients(tokenizers, text_encoders):
    import copy

    first, second = copy.deepcopy(text_encoders[0]), copy.deepcopy(text_encoders[1])
    ids1, ids2 = (tokenize(tokenizer, CAPTIONS) for tokenizer in tokenizers)
    set_trainable(first, USES[0], True)
    set_trainable(second, USES[1], True)
    context, pooled = encode((first, second), Tokens((ids1, ids2)), USES)
    (context.square().sum() + pooled.square().sum()).backward()
    for encoder in (first, second):
        with_gradient = [parameter for parameter in encoder.parameters() if parameter.grad is not None]
        assert {id(p) for p in with_gradient} == {id(p) for p in trainable_parameters(encoder)}
    frozen = [name for name, parameter in first.named_parameters() if not parameter.requires_grad]
    assert all("layers.2." in name or "final_layer_norm" in name for name in frozen)
    assert len(frozen) == 16 + 2
    assert len(trainable_parameters(second)) == len(list(second.parameters()))
    set_trainable(first, USES[0], False)
    set_trainable(second, USES[1], True)
    assert trainable_parameters(first) == []


def test_gradient_checkpointing_gives_the_same_gradients(tokenizers, text_encoders):
    import copy

    ids1, ids2 = (tokenize(tokenizer, CAPTIONS, 150) for tokenizer in tokenizers)
    gradients = []
    for checkpointing in (False, True):
        first, second = (copy.deepcopy(encoder).train() for encoder in text_encoders)
        if checkpointing:
            enable_gradient_checkpointing(first)
            enable_gradient_checkpointing(second)
        context, pooled = encode((first, second), Tokens((ids1, ids2)), USES)
        (context.sin().sum() + pooled.sin().sum()).backward()
        gradients.append([p.grad for e in (first, second) for p in e.parameters() if p.grad is not None])
    assert len(gradients[0]) == len(gradients[1])
    for plain, checkpointed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, checkpointed)


def test_differing_chunks_are_a_mistake_of_the_caller(tokenizers, text_encoders):
    with pytest.raises(ValueError, match="same chunks"):
        encode(text_encoders, Tokens((tokenize(tokenizers[0], ["a"], 150), tokenize(tokenizers[1], ["a"], 77))), USES)
