"""SDXL's text conditioning: captions to token chunks, token chunks to the U-Net's context and pooled vector.

Shape legend: B batch, K chunks of a caption, N = B*K, L = 77 tokens of a chunk, T = 2 + 75*K joined states,
C channels of the context, D width of one encoder, P width of the pooled vector.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library.errors import InputError
from library.models.weighted_captions import parse_weights, weigh

CHUNK_LENGTH = 77  # position embeddings of CLIP, Radford et al. 2021
CHUNK_TOKENS = CHUNK_LENGTH - 2  # without BOS and EOS
_LEGACY_EOS_ID = 2  # SDXL's published configs carry this id; it means "the highest id of the sequence", as in OpenCLIP


def chunk_count(max_token_length: int | None) -> int:
    """How many chunks of 75 caption tokens hold `max_token_length` tokens.

    None and 77 both mean one chunk with its BOS and EOS; 150 is 2, 225 is 3, 512 is 7.

    Raises:
        InputError: the length is not positive.
    """
    if max_token_length is None or max_token_length == CHUNK_LENGTH:
        return 1
    if max_token_length < 1:
        raise InputError(
            f"--max_token_length is {max_token_length}; it counts caption tokens: use 77, 150, 225 or 512, "
            "or leave it out."
        )
    return -(-max_token_length // CHUNK_TOKENS)


def tokenize_counted(
    tokenizer: Any, captions: Sequence[str], max_token_length: int | None = None
) -> tuple[Tensor, list[int]]:
    """Captions as token ids in chunks, and how many tokens of each caption did not fit.

    Every chunk is BOS, up to 75 caption tokens, EOS, and then the tokenizer's own pad token (EOS for SDXL's first
    tokenizer, "!" for its second); a chunk that the caption does not reach is BOS, EOS and padding.

    Args:
        tokenizer: a CLIP tokenizer of transformers.
        max_token_length: see `chunk_count`.

    Returns:
        ids_BKL (int64, on the CPU), and per caption the number of tokens cut off (0 where all fitted).
    """
    chunks = chunk_count(max_token_length)
    tokens_B = _token_ids(tokenizer, captions)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    ids_BKL = _in_chunks(tokens_B, chunks, bos, eos, torch.tensor(pad))
    return ids_BKL, [max(0, len(tokens) - chunks * CHUNK_TOKENS) for tokens in tokens_B]


def tokenize(tokenizer: Any, captions: Sequence[str], max_token_length: int | None = None) -> Tensor:
    """The token ids of `tokenize_counted`, ids_BKL (int64, on the CPU), for callers that need no count."""
    return tokenize_counted(tokenizer, captions, max_token_length)[0]


def tokenize_weighted(
    tokenizer: Any, captions: Sequence[str], max_token_length: int | None = None
) -> tuple[Tensor, Tensor]:
    """As `tokenize`, of captions with weights (`parse_weights`): ids_BKL, and the tokens' weights_BKL in float32.

    Each piece of its own weight is tokenised alone. BOS, EOS and padding have weight 1.
    """
    pieces_B = [parse_weights(caption) for caption in captions]
    tokens = iter(_token_ids(tokenizer, [text for pieces in pieces_B for text, _ in pieces]))
    ids_B: list[list[int]] = []
    weights_B: list[list[float]] = []
    for pieces in pieces_B:
        weighed = [(token, weight) for _, weight in pieces for token in next(tokens)]
        ids_B.append([token for token, _ in weighed])
        weights_B.append([weight for _, weight in weighed])
    chunks = chunk_count(max_token_length)
    bos, eos, pad = tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id
    return _in_chunks(ids_B, chunks, bos, eos, torch.tensor(pad)), _in_chunks(
        weights_B, chunks, 1, 1, torch.tensor(1.0)
    )


def encode_sdxl(
    text_encoder1: nn.Module,
    text_encoder2: Any,
    ids1_BKL: Tensor,
    ids2_BKL: Tensor,
    weights: tuple[Tensor, Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """SDXL's conditioning (Podell et al. 2023, section 2.1; formats.md "Captions").

    The context is the hidden state before the last layer, without the final norm, of both encoders, side by side on the
    channels. The pooled vector is the second encoder's projected state at EOS, after its last layer and final norm.
    Chunks are encoded alone; the context is the first one's BOS state, the inner states of all, the last one's EOS
    state; the pooled vector is the first chunk's. Differentiable. Layers that no output needs are not run: they are
    called one by one, so a wrapper that acts in `forward` (DDP, FSDP) has to go around a module that calls this
    function, or around the layers, and not around an encoder.

    Args:
        text_encoder1: transformers' CLIPTextModel.
        text_encoder2: transformers' CLIPTextModelWithProjection.
        ids1_BKL, ids2_BKL: from `tokenize` with the encoder's own tokenizer, on the encoder's device.
        weights: weights1_BKL and weights2_BKL from `tokenize_weighted`; they act on the context (`weigh`), each
            encoder's states by themselves, and not on the pooled vector.

    Returns:
        context_BTC and pooled_BP, in the encoders' dtype.
    """
    if ids1_BKL.shape != ids2_BKL.shape:
        raise ValueError(f"both encoders need the same chunks: {tuple(ids1_BKL.shape)} and {tuple(ids2_BKL.shape)}")
    batch, chunks, _ = ids1_BKL.shape
    model1, model2 = _text_model(text_encoder1), _text_model(text_encoder2)
    penultimate1_NLD = _run_layers(model1, _embed(model1, ids1_BKL), model1.encoder.layers[:-1])
    penultimate2_NLD = _run_layers(model2, _embed(model2, ids2_BKL), model2.encoder.layers[:-1])
    states = [_join_chunks(states.unflatten(0, (batch, chunks))) for states in (penultimate1_NLD, penultimate2_NLD)]
    if weights is not None:
        states = [
            weigh(states_BTD, _join_chunks(weights_BKL.unsqueeze(-1)).squeeze(-1))
            for states_BTD, weights_BKL in zip(states, weights, strict=True)
        ]
    context_BTC = torch.cat(states, dim=-1)
    first_BLD = penultimate2_NLD.unflatten(0, (batch, chunks))[:, 0]
    last_BLD = model2.final_layer_norm(_run_layers(model2, first_BLD, model2.encoder.layers[-1:]))
    eos_B = _eos_position(ids2_BKL[:, 0], model2.config.eos_token_id)
    pooled_BP = text_encoder2.text_projection(last_BLD[torch.arange(batch, device=last_BLD.device), eos_B])
    return context_BTC, pooled_BP


def set_trainable(text_encoder1: nn.Module, text_encoder2: nn.Module, train1: bool, train2: bool) -> None:
    """Set requires_grad so that exactly the parameters which train get gradients.

    The first encoder's last layer and final norm touch no output of `encode_sdxl` and stay frozen always; of the
    second, all train: its last layer through the pooled vector.
    """
    text_encoder1.requires_grad_(train1)
    model1 = _text_model(text_encoder1)
    model1.encoder.layers[-1].requires_grad_(False)
    model1.final_layer_norm.requires_grad_(False)
    text_encoder2.requires_grad_(train2)


def trainable_parameters(text_encoder: nn.Module) -> list[nn.Parameter]:
    """The parameters that `set_trainable` left with requires_grad, in the module's order."""
    return [parameter for parameter in text_encoder.parameters() if parameter.requires_grad]


def trained_layers(text_encoder: nn.Module) -> list[nn.Module]:
    """The transformer layers that `set_trainable` left with something to train."""
    layers: nn.ModuleList = _text_model(text_encoder).encoder.layers
    return [layer for layer in layers if trainable_parameters(layer)]


def enable_gradient_checkpointing(text_encoder: Any) -> None:
    """Keep only the inputs of a text encoder's layers, and compute the rest again for backward."""
    if hasattr(text_encoder, "activation_checkpointing_enable"):
        text_encoder.activation_checkpointing_enable()
    else:  # transformers before 5.23, on Python 3.10
        text_encoder.gradient_checkpointing_enable()


def _token_ids(tokenizer: Any, texts: Sequence[str]) -> list[list[int]]:
    """Token ids of each text, of any number and without BOS and EOS."""
    if not texts:
        return []
    # verbose=False: a long caption is our business, not worth the tokenizer's warning.
    return tokenizer(list(texts), add_special_tokens=False, padding=False, truncation=False, verbose=False)["input_ids"]


def _in_chunks(values_B: Sequence[list], chunks: int, first: float, last: float, padding: Tensor) -> Tensor:
    """values_BKL: each row's values in chunks of 75, those of a chunk between `first` and `last`, then padding."""
    values_BKL = padding.repeat(len(values_B), chunks, CHUNK_LENGTH)
    for row, values in enumerate(values_B):
        for chunk in range(chunks):
            part = values[chunk * CHUNK_TOKENS : (chunk + 1) * CHUNK_TOKENS]
            values_BKL[row, chunk, : len(part) + 2] = torch.tensor([first, *part, last], dtype=padding.dtype)
    return values_BKL


def _text_model(text_encoder: nn.Module) -> Any:
    """The module with embeddings, layers and final norm: the encoder itself, or inside the one with projection."""
    return getattr(text_encoder, "text_model", text_encoder)


def _embed(model: Any, ids_BKL: Tensor) -> Tensor:
    """states_NLD before the first layer: token plus position embeddings."""
    return model.embeddings(input_ids=ids_BKL.flatten(0, 1))


def _run_layers(model: Any, states_NLD: Tensor, layers: nn.ModuleList) -> Tensor:
    """The states after the given layers, under CLIP's causal mask, in the model's own attention implementation."""
    from transformers.masking_utils import create_causal_mask

    mask = create_causal_mask(config=model.config, inputs_embeds=states_NLD, attention_mask=None, past_key_values=None)
    for layer in layers:
        states_NLD = layer(states_NLD, mask, is_causal=True)
    return states_NLD


def _join_chunks(states_BKLD: Tensor) -> Tensor:
    """states_BTD: the first BOS, every chunk's inner states, the last EOS place."""
    inner_BTD = states_BKLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BKLD[:, 0, :1], inner_BTD, states_BKLD[:, -1, -1:]], dim=1)


def _eos_position(ids_BL: Tensor, eos_token_id: int) -> Tensor:
    """Where each sequence's first EOS stands, as transformers finds it."""
    if eos_token_id == _LEGACY_EOS_ID:
        return ids_BL.int().argmax(dim=-1)
    return (ids_BL == eos_token_id).int().argmax(dim=-1)
