"""Text conditioning: captions to token chunks, token chunks to the U-Net's context and pooled vector.

Shape legend: B batch, K chunks of a caption, N = B*K, L = 77 tokens of a chunk, T = 2 + 75*K joined states,
C channels of the context, D width of one encoder, P width of the pooled vector.
"""

import functools
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from library import device
from library.errors import InputError
from library.models.family import EncoderUse
from library.models.gelu import Gelu
from library.models.text import TextStates, Tokens
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


def tokenize_all(
    tokenizers: Sequence[Any], captions: Sequence[str], max_token_length: int | None = None, weighted: bool = False
) -> Tokens:
    """Captions by each text encoder's own tokenizer; `weighted`: their brackets are weights."""
    if not weighted:
        return Tokens(tuple(tokenize(tokenizer, captions, max_token_length) for tokenizer in tokenizers))
    both = [tokenize_weighted(tokenizer, captions, max_token_length) for tokenizer in tokenizers]
    return Tokens(tuple(ids_BKL for ids_BKL, _ in both), tuple(weights_BKL for _, weights_BKL in both))


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


def encode(text_encoders: Iterable[Any], tokens: Tokens, uses: Sequence[EncoderUse]) -> TextStates:
    """Text states of captions, as a family uses its text encoders (formats.md, "Captions").

    The context is each encoder's hidden state after the layers that its use names, side by side on the channels. The
    pooled vector is one encoder's projected state at EOS, after its last layer and final norm. Chunks are encoded
    alone; the context is the first chunk's BOS state, the inner states of all, the last chunk's EOS state; the pooled
    vector is the first chunk's. Weights act on the context (`weigh`), each encoder's states by themselves, and not on
    the pooled vector. Differentiable. Layers that no output needs are not run: they are called one by one, so a wrapper
    that acts in `forward` (DDP, FSDP) has to go around a module that calls this function, or around the layers, and not
    around an encoder.

    Args:
        text_encoders: transformers' CLIPTextModel or CLIPTextModelWithProjection.
        tokens: from the encoders' own tokenizers, on the encoders' device.

    Returns:
        States in the encoders' dtype.
    """
    shapes = {tuple(ids_BKL.shape) for ids_BKL in tokens.ids}
    if len(shapes) > 1:
        raise ValueError(f"all text encoders need the same chunks: {sorted(shapes)}")
    batch, chunks, _ = tokens.ids[0].shape
    contexts: list[Tensor] = []
    pooled_BP: Tensor | None = None
    for place, (encoder, ids_BKL, use) in enumerate(zip(text_encoders, tokens.ids, uses, strict=True)):
        model = _text_model(encoder)
        kept = len(model.encoder.layers) - use.skipped_layers
        states_NLD = _run_layers(model, _embed(model, ids_BKL), model.encoder.layers[:kept])
        states_BKLD = states_NLD.unflatten(0, (batch, chunks))
        normed_BKLD = model.final_layer_norm(states_BKLD) if use.final_norm else states_BKLD
        context_BTD = _join_chunks(normed_BKLD)
        if tokens.weights:
            weights_BT = _join_chunks(tokens.weights[place].unsqueeze(-1)).squeeze(-1)
            context_BTD = weigh(context_BTD, weights_BT)
        contexts.append(context_BTD)
        if use.pooled:
            last_BLD = _run_layers(model, states_BKLD[:, 0], model.encoder.layers[kept:])
            normed_BLD = model.final_layer_norm(last_BLD)
            eos_id = model.config.eos_token_id if use.eos_id is None else use.eos_id
            eos_B = _eos_position(ids_BKL[:, 0], eos_id)
            pooled_BP = encoder.text_projection(normed_BLD[torch.arange(batch, device=normed_BLD.device), eos_B])
    return TextStates(torch.cat(contexts, dim=-1), pooled_BP)


def use_erf_gelu(text_encoder: Any) -> None:
    """Have the layers' GELU computed in its erf form on every device; another activation stays (`models/gelu.py`)."""
    from transformers.activations import GELUActivation

    for layer in _text_model(text_encoder).encoder.layers:
        if isinstance(layer.mlp.activation_fn, GELUActivation):
            layer.mlp.activation_fn = Gelu()


def set_trainable(text_encoder: Any, use: EncoderUse, trains: bool) -> None:
    """Set requires_grad so that exactly the parameters which train get gradients; what no output uses is frozen."""
    text_encoder.requires_grad_(trains)
    for part in _unused_parts(text_encoder, use):
        part.requires_grad_(False)


def used_tensors(text_encoder: Any, use: EncoderUse) -> dict[str, Tensor]:
    """By name the tensors of a text encoder that an output of `encode` depends on."""
    unused = {
        id(tensor) for part in _unused_parts(text_encoder, use) for tensor in part.state_dict(keep_vars=True).values()
    }
    return {name: one for name, one in text_encoder.state_dict(keep_vars=True).items() if id(one) not in unused}


def _unused_parts(text_encoder: Any, use: EncoderUse) -> list[nn.Module]:
    """What touches no output of `encode`.

    These are the last layers that the text states leave out, unless the pooled vector goes through them, and with them
    the final norm and the projection.
    """
    if use.pooled:
        return []
    model = _text_model(text_encoder)
    parts: list[nn.Module] = list(model.encoder.layers[len(model.encoder.layers) - use.skipped_layers :])
    if not use.final_norm:
        parts.append(model.final_layer_norm)
    if hasattr(text_encoder, "text_projection"):
        parts.append(text_encoder.text_projection)
    return parts


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
    if mask is None and device.is_npu(states_NLD.device):
        mask = _lower_triangle(states_NLD.shape[1], states_NLD.device)
    for layer in layers:
        states_NLD = layer(states_NLD, mask, is_causal=mask is None or not device.is_npu(states_NLD.device))
    return states_NLD


@functools.lru_cache(maxsize=8)
def _lower_triangle(length: int, where: torch.device) -> Tensor:
    """(1, 1, L, L) bool: which places each place sees, made once for all layers and steps.

    Without a mask torch_npu's attention makes a triangle of 2048 x 2048 in each call: two operators and 4 MiB.
    """
    with torch.inference_mode(False):
        return torch.ones(1, 1, length, length, dtype=torch.bool, device=where).tril()


def _join_chunks(states_BKLD: Tensor) -> Tensor:
    """states_BTD: the first BOS, every chunk's inner states, the last EOS place."""
    inner_BTD = states_BKLD[:, :, 1:-1].flatten(1, 2)
    return torch.cat([states_BKLD[:, 0, :1], inner_BTD, states_BKLD[:, -1, -1:]], dim=1)


def _eos_position(ids_BL: Tensor, eos_token_id: int) -> Tensor:
    """Where each sequence's first EOS stands, as transformers finds it."""
    if eos_token_id == _LEGACY_EOS_ID:
        return ids_BL.int().argmax(dim=-1)
    return (ids_BL == eos_token_id).int().argmax(dim=-1)
