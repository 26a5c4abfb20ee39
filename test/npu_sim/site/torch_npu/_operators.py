"""Ascend's fused operators by their reference formulas, with the checks that torch_npu 2.14 documents for them.

Legend: B batch, S query tokens, K key and value tokens, N heads, D head size, H = N D, T tokens of all sequences.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

LAYOUTS = ("BSH", "SBH", "BSND", "BNSD", "TND")
MAX_TOKENS_AHEAD = 2147483647
MAX_HEAD_SIZE = 768
MAX_HEADS = 256
MAX_TOKENS = 2**20
MAX_BATCH = 2**21
DTYPES = (torch.float16, torch.bfloat16, torch.float32)


def npu_fusion_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    input_layout: str,
    pse: Tensor | None = None,
    padding_mask: Tensor | None = None,
    atten_mask: Tensor | None = None,
    scale: float = 1.0,
    keep_prob: float = 1.0,
    pre_tockens: int = MAX_TOKENS_AHEAD,
    next_tockens: int = MAX_TOKENS_AHEAD,
    inner_precise: int = 0,
    prefix: list[int] | None = None,
    actual_seq_qlen: list[int] | None = None,
    actual_seq_kvlen: list[int] | None = None,
    sparse_mode: int = 0,
    gen_mask_parallel: bool = True,
    sync: bool = False,
    softmax_layout: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """dropout(softmax(mask(scale (Q K^T + pse)))) V, computed in fp32; True in the mask leaves a place out.

    Returns:
        The output in the query's layout; the rows' maxima and sums, (B, N, S, 8) in fp32; an empty tensor; the
        dropout's seed, offset and count.

    Raises:
        RuntimeError, TypeError: what the real operator refuses. NotImplementedError: what this one lacks.
    """
    _check_tensors("npu_fusion_attention", query, key, value)
    if torch.ops.npu_sim.first_generation():
        raise RuntimeError("npu_fusion_attention: aclnnFlashAttentionScore is not supported on this product")
    if head_num <= 0:
        raise RuntimeError(f"npu_fusion_attention: head_num must > 0, but got {head_num}")
    input_layout = input_layout.upper()  # the real one does not mind the case
    if pse is not None and pse.dtype != query.dtype:
        raise RuntimeError(f"npu_fusion_attention: pse is {pse.dtype}, query {query.dtype}")
    if input_layout not in LAYOUTS:
        raise RuntimeError(f"npu_fusion_attention: input_layout {input_layout!r} is not one of {', '.join(LAYOUTS)}")
    if padding_mask is not None:
        raise RuntimeError("npu_fusion_attention: padding_mask is not supported")
    if not 0 < keep_prob <= 1:
        raise RuntimeError(f"npu_fusion_attention: keep_prob must be in (0, 1], not {keep_prob}")
    if softmax_layout not in ("", "TND") or (softmax_layout and input_layout != "TND"):
        raise RuntimeError(f"npu_fusion_attention: softmax_layout {softmax_layout!r} with input_layout {input_layout}")
    if not 0 <= sparse_mode <= 8:
        raise RuntimeError(f"npu_fusion_attention: sparse_mode is 0 to 8, not {sparse_mode}")
    if prefix is not None or sparse_mode > 3:
        raise NotImplementedError("the simulated npu_fusion_attention has sparse_mode 0 to 3 only, and no prefix")
    if input_layout == "TND":
        return _ragged(
            query, key, value, head_num, actual_seq_qlen, actual_seq_kvlen, pse, atten_mask, scale, keep_prob,
            sparse_mode, softmax_layout,
        )  # fmt: skip
    if actual_seq_qlen is not None or actual_seq_kvlen is not None:
        raise RuntimeError("npu_fusion_attention: actual_seq_qlen and actual_seq_kvlen are for input_layout TND")
    if query.dim() != len(input_layout):
        raise RuntimeError(
            f"npu_fusion_attention: input_layout {input_layout} with a query of {query.dim()} dimensions"
        )
    q_BNSD = _to_bnsd(query, input_layout, head_num)
    if q_BNSD.shape[1] != head_num:
        raise RuntimeError(f"npu_fusion_attention: head_num is {head_num}, the query has {q_BNSD.shape[1]} heads")
    key_heads = key.shape[-1] // q_BNSD.shape[-1] if len(input_layout) == 3 else None
    k_BNKD, v_BNKD = (_to_bnsd(part, input_layout, key_heads) for part in (key, value))
    if not 1 <= q_BNSD.shape[0] <= MAX_BATCH:
        raise RuntimeError(f"npu_fusion_attention: a batch of {q_BNSD.shape[0]}, 1 to {MAX_BATCH} are supported")
    if not all(1 <= part.shape[2] <= MAX_TOKENS for part in (q_BNSD, k_BNKD)):
        raise RuntimeError(
            f"npu_fusion_attention: sequence lengths {q_BNSD.shape[2]} and {k_BNKD.shape[2]}, "
            f"1 to {MAX_TOKENS} are supported"
        )
    out_BNSD, max_BNS, sum_BNS = _attention(
        q_BNSD, k_BNKD, v_BNKD, pse, atten_mask, scale, keep_prob, pre_tockens, next_tockens, sparse_mode
    )
    out = _from_bnsd(out_BNSD, input_layout).contiguous()
    return out, _eight(max_BNS), _eight(sum_BNS), query.new_empty(0), 0, 0, 0 if keep_prob == 1 else max_BNS.numel()


_MOST_FUSED_HEAD_SIZE, _MOST_FUSED_HEADS = 512, 2048
_aten = torch.library.Library("aten", "IMPL")


def _scaled_dot_product_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    *,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """torch's SDPA along op-plugin's route: fused attention wherever it may be, whatever the user has asked for.

    Each causal call makes a triangle of 2048 x 2048, 4 MiB in two launches; a mask is turned round in one.
    """
    causal = {"sparse_mode": 2, "next_tockens": 0} if is_causal else {}
    hidden = None
    if _takes_fused(query, key, value, attn_mask):
        if is_causal:
            hidden = torch.ones(2048, 2048, dtype=torch.bool, device=query.device).triu(1)
        elif attn_mask is not None:
            hidden = attn_mask.logical_not()
            if hidden.dim() != 2 and hidden.shape[:2] != (1, 1):
                hidden = hidden.expand(*query.shape[:3], key.shape[2])
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        fused = npu_fusion_attention(
            query, key, value, query.shape[1], "BNSD", atten_mask=hidden, scale=scale, keep_prob=1 - dropout_p, **causal
        )
        return fused[0]
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=query.dtype).masked_fill_(attn_mask.logical_not(), -math.inf)
    return torch.ops.aten._scaled_dot_product_attention_math(
        query, key, value, attn_mask, dropout_p, is_causal, None, scale=scale, enable_gqa=enable_gqa
    )[0]


def _takes_fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> bool:
    heads = query.shape[1] if query.dim() == 4 else 0
    return (
        not torch.ops.npu_sim.first_generation()
        and query.dtype in DTYPES
        and (query.dtype != torch.float32 or all(part.shape[-1] % 4 == 0 for part in (query, key, value)))
        and (mask is None or mask.dtype == torch.bool)
        and query.dim() == key.dim() == value.dim() == 4
        and 0 < heads <= _MOST_FUSED_HEADS
        and query.shape[-1] <= _MOST_FUSED_HEAD_SIZE
        and 0 < key.shape[1] <= heads
        and heads % key.shape[1] == 0
    )


for _key in ("PrivateUse1", "AutogradPrivateUse1"):
    _aten.impl("scaled_dot_product_attention", _scaled_dot_product_attention, _key)


def _check_npu(name: str, *tensors: Tensor) -> None:
    for tensor in tensors:
        if tensor.device.type != "npu":
            raise RuntimeError(f"{name}: Expected all tensors to be on an npu, but found one on {tensor.device}")


def _check_tensors(name: str, query: Tensor, key: Tensor, value: Tensor) -> None:
    _check_npu(name, query, key, value)
    if query.dtype not in DTYPES:
        raise RuntimeError(f"{name}: {query.dtype} is not supported; fp16, bf16 and fp32 are")
    if not query.dtype == key.dtype == value.dtype:
        raise RuntimeError(f"{name}: query, key and value differ in dtype: {query.dtype}, {key.dtype}, {value.dtype}")
    if not query.dim() == key.dim() == value.dim():
        raise RuntimeError(f"{name}: query, key and value differ in their number of dimensions")


def _to_bnsd(tensor: Tensor, layout: str, heads: int | None) -> Tensor:
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    if not heads or tensor.shape[-1] % heads:
        raise RuntimeError(f"npu_fusion_attention: {heads} heads do not divide a width of {tensor.shape[-1]}")
    split = tensor.unflatten(-1, (heads, -1))  # BSND or SBND
    return split.transpose(1, 2) if layout == "BSH" else split.permute(1, 2, 0, 3)


def _from_bnsd(tensor: Tensor, layout: str) -> Tensor:
    if layout == "BNSD":
        return tensor
    if layout == "BSND":
        return tensor.transpose(1, 2)
    return (tensor.transpose(1, 2) if layout == "BSH" else tensor.permute(2, 0, 1, 3)).flatten(-2)


def _attention(
    q_BNSD: Tensor,
    k_BNKD: Tensor,
    v_BNKD: Tensor,
    pse: Tensor | None,
    atten_mask: Tensor | None,
    scale: float,
    keep_prob: float,
    before: int,
    after: int,
    sparse_mode: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Output (B, N, S, D), maxima and sums (B, N, S) of the exponentials."""
    batch, heads, queries, head_size = q_BNSD.shape
    key_heads, keys = k_BNKD.shape[1:3]
    if head_size > MAX_HEAD_SIZE or k_BNKD.shape[-1] != head_size or v_BNKD.shape[-1] > head_size:
        sizes = head_size, k_BNKD.shape[-1], v_BNKD.shape[-1]
        raise RuntimeError(
            f"npu_fusion_attention: head sizes {sizes} of query, key and value (at most {MAX_HEAD_SIZE})"
        )
    if not 1 <= heads <= MAX_HEADS or heads % key_heads or v_BNKD.shape[1] != key_heads:
        raise RuntimeError(
            f"npu_fusion_attention: {heads} query heads for {key_heads} key and {v_BNKD.shape[1]} value heads"
        )
    if k_BNKD.shape[0] != batch or v_BNKD.shape[0] != batch or v_BNKD.shape[2] != keys:
        raise RuntimeError("npu_fusion_attention: query, key and value differ in batch or in length")
    with torch.autocast("npu", enabled=False):
        k_BNKD, v_BNKD = (part.repeat_interleave(heads // key_heads, 1) for part in (k_BNKD, v_BNKD))
        scores_BNSK = q_BNSD.float() @ k_BNKD.float().transpose(-1, -2)
        if pse is not None:
            scores_BNSK = scores_BNSK + pse.float()
        scores_BNSK = scores_BNSK * scale
        hidden = _hidden(atten_mask, (batch, heads, queries, keys), before, after, sparse_mode, q_BNSD.device)
        if hidden is not None:
            scores_BNSK = scores_BNSK.masked_fill(hidden, -math.inf)
        max_BNS = scores_BNSK.detach().amax(-1)
        weights_BNSK = (scores_BNSK - max_BNS.nan_to_num(neginf=0.0)[..., None]).exp()
        sum_BNS = weights_BNSK.sum(-1)
        weights_BNSK = F.dropout(weights_BNSK / sum_BNS.clamp_min(1e-38)[..., None], 1 - keep_prob)
        return (weights_BNSK @ v_BNKD.float()).to(q_BNSD.dtype), max_BNS, sum_BNS.detach()


def _hidden(
    mask: Tensor | None,
    shape: tuple[int, int, int, int],
    before: int,
    after: int,
    sparse_mode: int,
    device: torch.device,
) -> Tensor | None:
    """Where no attention goes, broadcastable to (B, N, S, K); None for nowhere."""
    batch, heads, queries, keys = shape
    if mask is not None and mask.dtype not in (torch.bool, torch.uint8):
        raise RuntimeError(f"npu_fusion_attention: atten_mask must be bool or uint8, not {mask.dtype}")
    if mask is None:  # then nothing is hidden, in any mode
        return None
    _check_npu("npu_fusion_attention", mask)
    if sparse_mode in (2, 3):  # the mask is a triangle of fixed size, whatever the lengths
        if mask.shape[-2:] != (2048, 2048):
            raise RuntimeError(f"npu_fusion_attention: sparse_mode {sparse_mode} needs an atten_mask of 2048 x 2048")
        diagonal = 1 if sparse_mode == 2 else keys - queries + 1
        return torch.ones(queries, keys, dtype=torch.bool, device=device).triu(diagonal)
    allowed = [(batch, heads, queries, keys), (batch, 1, queries, keys), (1, 1, queries, keys), (queries, keys)]
    if tuple(mask.shape) not in allowed:
        raise RuntimeError(f"npu_fusion_attention: atten_mask {tuple(mask.shape)} is not one of {allowed}")
    if sparse_mode == 0 and (before < queries or after < keys):
        raise NotImplementedError("the simulated npu_fusion_attention has no bands (pre_tockens, next_tockens)")
    return mask.bool()


def _ragged(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    head_num: int,
    ends_q: list[int] | None,
    ends_kv: list[int] | None,
    pse: Tensor | None,
    mask: Tensor | None,
    scale: float,
    keep_prob: float,
    sparse_mode: int,
    softmax_layout: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, int, int, int]:
    """Layout TND: sequences one after the other, their ends given."""
    if ends_q is None or ends_kv is None:
        raise RuntimeError("npu_fusion_attention: input_layout TND needs actual_seq_qlen and actual_seq_kvlen")
    if query.dim() != 3 or query.shape[1] != head_num:
        raise RuntimeError(f"npu_fusion_attention: layout TND, head_num {head_num}, query {tuple(query.shape)}")
    if len(ends_q) != len(ends_kv) or ends_q[-1] != query.shape[0] or ends_kv[-1] != key.shape[0]:
        raise RuntimeError("npu_fusion_attention: actual_seq_qlen and actual_seq_kvlen do not end with the tokens")
    if pse is not None:
        raise NotImplementedError("the simulated npu_fusion_attention has no pse with TND")
    outs, maxima, sums = [], [], []
    for start_q, end_q, start_kv, end_kv in zip([0, *ends_q], ends_q, [0, *ends_kv], ends_kv, strict=False):
        parts = (query[start_q:end_q], key[start_kv:end_kv], value[start_kv:end_kv])
        out_BNSD, max_BNS, sum_BNS = _attention(
            *(part.transpose(0, 1)[None] for part in parts), None, mask, scale, keep_prob,
            MAX_TOKENS_AHEAD, MAX_TOKENS_AHEAD, sparse_mode,
        )  # fmt: skip
        outs.append(out_BNSD[0].transpose(0, 1))
        maxima.append(max_BNS[0].T)
        sums.append(sum_BNS[0].T)
    statistics = [torch.cat(parts) for parts in (maxima, sums)]  # (T, N)
    if not softmax_layout:
        statistics = [part.T for part in statistics]
    return torch.cat(outs), *map(_eight, statistics), query.new_empty(0), 0, 0, 0


def _eight(tensor: Tensor) -> Tensor:
    """The statistics come eight times over, as the hardware keeps them."""
    return tensor[..., None].expand(*tensor.shape, 8).contiguous()
