"""What a cache's entries are told by: every setting that changes what the encoders give changes their digest."""

import copy
import json
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from transformers import CLIPTokenizer

from library.models.denoiser import Denoiser
from library.models.text_encoders import tokenize_all
from library.training.encoders import Encoders


@pytest.fixture
def make(sdxl):
    def make(model=None, clip_skip=None, length=77, weighted=False, precision=None):
        model = model or sdxl
        module = Denoiser(copy.deepcopy(model), clip_skip=clip_skip)
        tokenize = partial(tokenize_all, model.tokenizers, max_token_length=length, weighted=weighted)
        autocast = nullcontext if precision is None else partial(torch.autocast, "cpu", precision)
        return Encoders(model.vae, module, model.tokenizers, tokenize, autocast, torch.device("cpu"), 1, 1)

    return make


def with_other_merges(tokenizer: CLIPTokenizer) -> CLIPTokenizer:
    """The same words with the same numbers, of which the letters are joined in another order."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    merges = [tuple(pair) if isinstance(pair, list) else tuple(pair.split()) for pair in content["merges"]]
    return CLIPTokenizer(
        vocab=content["vocab"], merges=merges[::-1], pad_token=tokenizer.pad_token, model_max_length=77
    )


def test_the_digest_of_captions_changes_with_all_that_changes_their_encoding(make, sdxl):
    trained, bf16, merges = copy.deepcopy(sdxl), copy.deepcopy(sdxl), copy.deepcopy(sdxl)
    with torch.no_grad():
        next(trained.text_encoders[1].parameters()).view(-1)[0] += 1e-3
    bf16.text_encoders[0].to(torch.bfloat16)
    merges.tokenizers = (with_other_merges(sdxl.tokenizers[0]), sdxl.tokenizers[1])
    digests = [
        make(**of).caption_digest()
        for of in (
            {},
            {"clip_skip": 1},
            {"length": 150},
            {"weighted": True},
            {"precision": torch.bfloat16},
            {"precision": torch.float16},
            {"model": trained},
            {"model": bf16},
            {"model": merges},
        )
    ]
    assert len(set(digests)) == len(digests)


def test_the_digest_stays_whatever_has_been_tokenized(make, sdxl):
    before = make().caption_digest()
    sdxl.tokenizers[0](["a red cat", "a"], padding=True, truncation=True, max_length=5)
    assert make().caption_digest() == before


def test_the_digest_of_images_changes_with_the_vae_and_its_precision(make, sdxl):
    other, half = copy.deepcopy(sdxl), copy.deepcopy(sdxl)
    with torch.no_grad():
        next(other.vae.encoder.parameters()).view(-1)[0] += 1e-3
    half.vae.to(torch.bfloat16)
    assert len({make(model).image_digest() for model in (None, other, half)}) == 3
    decoder = copy.deepcopy(sdxl)
    with torch.no_grad():
        next(decoder.vae.decoder.parameters()).add_(1)  # no part of encoding
    assert make(decoder).image_digest() == make().image_digest()
