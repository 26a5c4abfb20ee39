"""U-Net and text encoder of SD 1.x and SD 2.x as one module, against diffusers and transformers, gradients, too."""

import copy
from dataclasses import replace

import pytest
import torch

from library.errors import InputError
from library.models.denoiser import Denoiser
from library.models.files import key_maps
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.text import Tokens
from library.models.text_encoders import encode, tokenize_all

CAPTIONS = ["a photo of a cat", "a red dog, a blue cat"]
SIZES = torch.zeros(2, 6)


def _copy(model):
    """The model with networks of its own: training changes gradients and modes."""
    return replace(model, unet=copy.deepcopy(model.unet), text_encoders=copy.deepcopy(model.text_encoders))


def _inputs():
    generator = torch.Generator().manual_seed(11)
    return (
        torch.randn(2, 4, 8, 16, generator=generator),
        torch.tensor([5, 800]),
        torch.randn(2, 4, 8, 16, generator=generator),
    )


def _theirs(model):
    """diffusers' U-Net with the same weights, and transformers' text encoder."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel.from_config(unet_config_to_diffusers(model.unet.config))
    names = key_maps.unet_to_diffusers(model.unet.config)
    unet.load_state_dict(key_maps.rename(model.unet.state_dict(), names))
    return unet, copy.deepcopy(model.text_encoders[0]), names


def _context(encoder, ids_BKL, clip_skip):
    """By transformers' own forward: the n-th hidden states from the end through the final norm, chunks joined."""
    hidden = [
        encoder.final_layer_norm(encoder(ids_BL, output_hidden_states=True).hidden_states[-clip_skip])
        for ids_BL in ids_BKL.unbind(1)
    ]
    return torch.cat([hidden[0][:, :1], *[part[:, 1:76] for part in hidden], hidden[-1][:, 76:]], dim=1)


@pytest.mark.parametrize("name", ["sd1", "sd2_v"])
@pytest.mark.parametrize(("clip_skip", "length"), [(None, None), (1, 150), (2, None), (3, None)])
def test_output_and_gradients_are_those_of_diffusers_and_transformers(name, clip_skip, length, request):
    model = _copy(request.getfixturevalue(name))
    unet, encoder, names = _theirs(model)
    noisy, times, target = _inputs()
    tokens = tokenize_all(model.tokenizers, CAPTIONS, length)

    expected = unet(noisy, times, _context(encoder, tokens.ids[0], clip_skip or 1)).sample
    torch.nn.functional.mse_loss(expected, target).backward()
    module = Denoiser(model, [True], clip_skip=clip_skip)
    found = module(noisy, times, tokens, SIZES)
    torch.nn.functional.mse_loss(found, target).backward()

    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    gradients = dict(unet.named_parameters())
    for ours, parameter in module.unet.named_parameters():
        _assert_close(parameter.grad, gradients[names[ours]].grad, ours)
    theirs = dict(encoder.named_parameters())
    trained = {id(one) for one in module.trained_encoders[0]}
    for ours, parameter in module.text_encoders[0].named_parameters():
        assert (parameter.grad is None) == (theirs[ours].grad is None) == (id(parameter) not in trained), ours
        if parameter.grad is not None:
            _assert_close(parameter.grad, theirs[ours].grad, ours)


def _assert_close(found, expected, name):
    assert (found - expected).abs().max() <= 1e-4 * max(float(expected.abs().max()), 1e-4), name


def test_layers_that_clip_skip_leaves_out_do_not_change_the_states(sd1):
    model = _copy(sd1)
    tokens = tokenize_all(model.tokenizers, CAPTIONS)
    before = [encode(model.text_encoders, tokens, model.uses(n)).context_BTC for n in (1, 2, 3)]
    torch.nn.init.zeros_(model.text_encoders[0].encoder.layers[-1].mlp.fc2.weight)
    after = [encode(model.text_encoders, tokens, model.uses(n)).context_BTC for n in (1, 2, 3)]
    assert [torch.equal(*pair) for pair in zip(before, after, strict=True)] == [False, True, True]


@pytest.mark.parametrize("clip_skip", [0, -1, 4])
def test_a_layer_that_is_not_there_is_refused(sd1, clip_skip):
    with pytest.raises(InputError, match=rf"--clip_skip={clip_skip} .* has 3: give 1 to 3"):
        Denoiser(_copy(sd1), clip_skip=clip_skip)


def test_a_token_that_was_added_is_not_the_end_of_the_caption(sdxl):
    """The pooled vector stands at the tokenizer's EOS; "the highest id" would be the token of a textual inversion."""
    model = _copy(sdxl)
    encoder, eos = model.text_encoders[1], model.tokenizers[1].eos_token_id
    for one in model.text_encoders:
        one.resize_token_embeddings(one.config.vocab_size + 1)
    ids = [ids_BKL.clone() for ids_BKL in tokenize_all(model.tokenizers, CAPTIONS).ids]
    for ids_BKL in ids:
        ids_BKL[:, 0, 1] = encoder.config.vocab_size - 1
    pooled = encode(model.text_encoders, Tokens(tuple(ids)), model.uses(None)).pooled_BP
    by_hand = copy.deepcopy(encoder)
    states = by_hand.text_model(input_ids=ids[1][:, 0]).last_hidden_state
    ends = [row.index(eos) for row in ids[1][:, 0].tolist()]
    expected = by_hand.text_projection(states[torch.arange(2), torch.tensor(ends)])
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    assert ends[0] > 1 and ends[1] > 1
