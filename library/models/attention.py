"""Scaled dot-product attention over interchangeable backends, with a record of which one ran for which shapes.

Every backend computes softmax(Q Kᵀ / √D) V (Vaswani et al. 2017, equation 1), without mask or dropout.
Legend: B batch, T query tokens, S key and value tokens, N heads, D head size.
"""

import importlib
import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from library import device

logger = logging.getLogger(__name__)

# Limits of npu_fusion_attention, as Ascend documents them for torch_npu 2.14: none on what a length or a head size must
# be a multiple of. docs/measurements/npu_attention.md says why it is used at every length.
NPU_MAX_HEADS = 256
NPU_MAX_HEAD_SIZE = 768
NPU_MAX_TOKENS = 2**20
NPU_MAX_SDPA_HEAD_SIZE = 512  # up to which torch's SDPA goes to it
_HALF = (torch.float16, torch.bfloat16)
COMPILED = "sdpa"  # becomes part of what torch.compile makes, where the calls are not counted


@dataclass(frozen=True)
class Backend:
    """One way to compute attention.

    Attributes:
        run: q (B, T, N, D), k and v (B, S, N, D) -> (B, T, N, D).
        refusal: why it cannot take these tensors, in words that name no sizes; None if it can.
        fallback: the backend that takes over after a refusal.
    """

    run: Callable[[Tensor, Tensor, Tensor], Tensor]
    refusal: Callable[[Tensor, Tensor, Tensor], str | None]
    fallback: str = "sdpa"


def _takes_all(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> str | None:
    return None


def _math(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """The formula as it stands, in fp32 or wider: what the others are checked against."""
    dtype = torch.promote_types(q_BTND.dtype, torch.float32)
    with device.without_autocast(q_BTND.device.type):
        scale = 1 / math.sqrt(q_BTND.shape[-1])
        scores_BNTS = torch.einsum("btnd,bsnd->bnts", q_BTND.to(dtype), k_BSND.to(dtype)) * scale
        out_BTND = torch.einsum("bnts,bsnd->btnd", scores_BNTS.softmax(-1), v_BSND.to(dtype))
    return out_BTND.to(q_BTND.dtype)


def _sdpa(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """torch's own: it picks among its flash, memory-efficient and plain kernels. The transposes copy nothing."""
    out_BNTD = F.scaled_dot_product_attention(q_BTND.transpose(1, 2), k_BSND.transpose(1, 2), v_BSND.transpose(1, 2))
    return out_BNTD.transpose(1, 2)


def _sdpa_refusal(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> str | None:
    """On Ascend torch's SDPA goes to the fused kernel with heads of up to 512, also where that takes no such shape."""
    if not device.is_npu(q_BTND.device) or device.is_before_910b1(q_BTND.device):
        return None
    return _npu_shape_refusal(q_BTND, k_BSND) if q_BTND.shape[-1] <= NPU_MAX_SDPA_HEAD_SIZE else None


def _npu(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    """Ascend's fused kernel; of its seven results the output is the first."""
    torch_npu = device.torch_npu()
    if torch_npu is None:
        raise RuntimeError("the npu attention backend was called without torch_npu")
    heads, head_size = q_BTND.shape[2:]
    return torch_npu.npu_fusion_attention(
        q_BTND, k_BSND, v_BSND, head_num=heads, input_layout="BSND", scale=1 / math.sqrt(head_size)
    )[0]


def _npu_refusal(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> str | None:
    if not device.is_npu(q_BTND.device):
        return f"the tensors are on {q_BTND.device.type}, not on an Ascend NPU"
    if device.torch_npu() is None:
        return "torch_npu is not installed"
    if q_BTND.dtype not in _HALF:
        return f"it is used in fp16 and bf16 only, not in {_name(q_BTND.dtype)} (--mixed_precision)"
    if device.is_before_910b1(q_BTND.device):
        return f"{device.device_name(q_BTND.device)} has no fused attention for training, Ascend 910B1 and later have"
    return _npu_shape_refusal(q_BTND, k_BSND)


def _npu_shape_refusal(q_BTND: Tensor, k_BSND: Tensor) -> str | None:
    """Why Ascend's fused kernel takes no such shape; None if it does."""
    heads, head_size = q_BTND.shape[2:]
    if not (0 < head_size <= NPU_MAX_HEAD_SIZE and 0 < heads <= NPU_MAX_HEADS):
        return f"it takes at most {NPU_MAX_HEADS} heads of at most {NPU_MAX_HEAD_SIZE}"
    if not all(0 < length <= NPU_MAX_TOKENS for length in (q_BTND.shape[1], k_BSND.shape[1])):
        return f"it takes from 1 to {NPU_MAX_TOKENS} tokens"
    return None


def _xformers(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> Tensor:
    return importlib.import_module("xformers.ops").memory_efficient_attention(q_BTND, k_BSND, v_BSND)


def _xformers_refusal(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor) -> str | None:
    if importlib.util.find_spec("xformers") is None:
        return "xformers is not installed"
    if device.is_cpu(q_BTND.device):
        return "xformers' kernels need an accelerator"
    return None


BACKENDS: dict[str, Backend] = {
    "math": Backend(_math, _takes_all),
    "sdpa": Backend(_sdpa, _sdpa_refusal, fallback="math"),
    "npu": Backend(_npu, _npu_refusal),
    "xformers": Backend(_xformers, _xformers_refusal),
}


@dataclass(frozen=True)
class _Case:
    """What a choice of backend depends on."""

    asked: str
    q_shape: torch.Size
    k_shape: torch.Size
    dtype: torch.dtype
    device_type: str


@dataclass
class _Record:
    ran: str
    calls: int = 0


_records: dict[_Case, _Record] = {}
_said: set[tuple[str, str]] = set()


def attention(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, backend: str = "sdpa") -> Tensor:
    """Attention on the backend, or on its fallback where it cannot take these tensors (one line in the log says so).

    Args:
        q_BTND, k_BSND, v_BSND: of one dtype, on one device; any strides.
        backend: a name in BACKENDS.

    Returns:
        (B, T, N, D), of the same dtype.

    Raises:
        ValueError: there is no such backend.
    """
    if backend == COMPILED and torch.compiler.is_compiling():
        return _sdpa(q_BTND, k_BSND, v_BSND)
    return _recorded(q_BTND, k_BSND, v_BSND, backend)


def _run_and_record(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, backend: str) -> Tensor:
    case = _Case(backend, q_BTND.shape, k_BSND.shape, q_BTND.dtype, q_BTND.device.type)
    record = _records.get(case)
    if record is None:
        record = _records[case] = _Record(_choose(q_BTND, k_BSND, v_BSND, backend))
    record.calls += 1
    return BACKENDS[record.ran].run(q_BTND, k_BSND, v_BSND)


_recorded: Callable[[Tensor, Tensor, Tensor, str], Tensor] = _run_and_record


def keep_out_of_graphs() -> None:
    """Before anything is compiled: every backend but `COMPILED` chooses, records and runs between compiled graphs."""
    global _recorded
    _recorded = torch.compiler.disable(_run_and_record)


def runs_on(backend: str, device_: torch.device, dtype: torch.dtype) -> str:
    """The backend that runs in place of that one on a device, in a dtype; where shapes decide, for small ones.

    One line in the log says why it is another one.
    """
    one = torch.empty(1, 1, 1, 1, device=device_, dtype=dtype)
    return _choose(one, one, one, backend)


def check_name(backend: str) -> None:
    """Raises ValueError if there is no backend of that name."""
    if backend not in BACKENDS:
        raise ValueError(f"no attention backend {backend!r}; there are {', '.join(BACKENDS)}")


def report(most_shapes: int = 24) -> list[str]:
    """For the run's log: a line a backend that ran, with the shapes it ran for, the most frequent first.

    A run with many buckets has hundreds of shapes; what is beyond `most_shapes` is counted. Recomputation under
    gradient checkpointing counts as a call.
    """
    calls: dict[str, Counter[str]] = {}
    for case, record in _records.items():
        asked = "" if record.ran == case.asked else f" (asked: {case.asked})"
        (_, queries, heads, head_size), keys = case.q_shape, case.k_shape[1]
        shapes = calls.setdefault(f"{record.ran}{asked}, {_name(case.dtype)} on {case.device_type}", Counter())
        shapes[f"{queries}x{keys} ({heads}x{head_size})"] += record.calls
    lines = []
    for backend, shapes in calls.items():
        listed = ", ".join(f"{shape}: {count}" for shape, count in shapes.most_common(most_shapes))
        rest = f", and {len(shapes) - most_shapes} more shapes" if len(shapes) > most_shapes else ""
        what = "calls by query x key tokens (heads x head size)"
        lines.append(f"attention: {backend}, {shapes.total()} {what}: {listed}{rest}")
    return lines


def reset_report() -> None:
    """Forget all calls, choices and log lines so far."""
    _records.clear()
    _said.clear()


def _choose(q_BTND: Tensor, k_BSND: Tensor, v_BSND: Tensor, backend: str) -> str:
    """The backend, or the first in its chain of fallbacks that takes these tensors."""
    check_name(backend)
    while (reason := BACKENDS[backend].refusal(q_BTND, k_BSND, v_BSND)) is not None:
        fallback = BACKENDS[backend].fallback
        if (backend, reason) not in _said:
            _said.add((backend, reason))
            logger.warning("attention backend %s is not used: %s; %s runs instead", backend, reason, fallback)
        backend = fallback
    return backend


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
