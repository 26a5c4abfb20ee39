"""Attention backends against the formula, forward and backward, per dtype; refusals, fallbacks and the report."""

import logging
import math
from types import SimpleNamespace

import pytest
import torch

from library import device
from library.models import attention as module
from library.models.attention import attention

# Against fp64: what rounding of each dtype costs on these sizes, with a margin of a few times.
TOLERANCES = {torch.float64: 1e-12, torch.float32: 1e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}
SIZES = [(2, 6, 6, 2, 8), (1, 5, 3, 3, 16)]  # batch, query tokens, key tokens, heads, head size


@pytest.fixture(autouse=True)
def fresh_records():
    module.reset_report()
    yield
    module.reset_report()


def tensors(sizes, dtype):
    """Query, key, value, all with gradients, and the gradient that comes from above; strided as a projection's are."""
    batch, queries, keys, heads, head = sizes
    torch.manual_seed(0)
    shapes = [(batch, queries, heads, head), (batch, keys, heads, head), (batch, keys, heads, head)]
    leaves = [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]
    return leaves, torch.randn(shapes[0]).to(dtype)


def forward_and_backward(sizes, dtype, backend):
    leaves, above = tensors(sizes, dtype)
    out = attention(*leaves, backend)
    return [out, *torch.autograd.grad(out, leaves, above)]


def by_hand(sizes, dtype):
    """The formula and its derivatives in fp64, one head of one sample at a time."""
    leaves, above = tensors(sizes, dtype)
    q, k, v = (leaf.detach().double() for leaf in leaves)
    above = above.double()
    results = [torch.zeros_like(above), *(torch.zeros_like(leaf) for leaf in (q, k, v))]
    for place in [(sample, slice(None), head) for sample in range(sizes[0]) for head in range(sizes[3])]:
        scale = 1 / math.sqrt(sizes[4])
        weights = (q[place] @ k[place].T * scale).softmax(-1)
        from_above = above[place] @ v[place].T
        scores = weights * (from_above - (weights * from_above).sum(-1, keepdim=True)) * scale
        pieces = weights @ v[place], scores @ k[place], scores.T @ q[place], weights.T @ above[place]
        for result, piece in zip(results, pieces, strict=True):
            result[place] = piece
    return results


def assert_all_close(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        assert one.shape == other.shape
        assert (one.double() - other.double()).norm() <= tolerance * other.double().norm()


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize("backend", ["math", "sdpa"])
def test_outputs_and_gradients_are_the_formula(backend, dtype, sizes):
    found = forward_and_backward(sizes, dtype, backend)
    assert all(tensor.dtype == dtype for tensor in found)
    assert_all_close(found, by_hand(sizes, dtype), TOLERANCES[dtype])
    assert module.report()[0].startswith(f"attention: {backend}, ")


def fake_npu(monkeypatch):
    """A torch_npu whose fused kernel checks its arguments as Ascend documents them, and the CPU taken for an NPU."""
    calls = []

    def npu_fusion_attention(query, key, value, head_num, input_layout, pse=None, padding_mask=None, atten_mask=None,
                             scale=1.0, keep_prob=1.0, pre_tockens=2147483647, next_tockens=2147483647):  # fmt: skip
        assert input_layout == "BSND" and query.ndim == key.ndim == value.ndim == 4
        assert query.shape[2] == key.shape[2] == head_num and query.shape[3] == key.shape[3]
        assert query.dtype == key.dtype == value.dtype and query.dtype in (torch.float16, torch.bfloat16)
        assert keep_prob == 1.0 and pse is None and padding_mask is None and atten_mask is None
        calls.append(tuple(query.shape))
        q, k, v = (tensor.float() for tensor in (query, key, value))
        weights = (torch.einsum("bsnd,btnd->bnst", q, k) * scale).softmax(-1)
        out = torch.einsum("bnst,btnd->bsnd", weights, v).to(query.dtype)
        return out, weights.amax(-1), weights.sum(-1), torch.empty(0), 0, 0, 0

    monkeypatch.setattr(device, "torch_npu", lambda: SimpleNamespace(npu_fusion_attention=npu_fusion_attention))
    monkeypatch.setattr(device, "is_npu", lambda _: True)
    monkeypatch.setattr(device, "has_bf16", lambda _: True)
    return calls


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_npu_kernel_is_called_as_documented_and_gives_the_formula(monkeypatch, dtype, sizes):
    calls = fake_npu(monkeypatch)
    found = forward_and_backward(sizes, dtype, "npu")
    assert calls == [(sizes[0], sizes[1], sizes[3], sizes[4])]
    assert_all_close(found, by_hand(sizes, dtype), TOLERANCES[dtype])


def test_npu_in_fp32_says_so_once_and_takes_sdpa(monkeypatch, caplog):
    calls = fake_npu(monkeypatch)
    with caplog.at_level(logging.WARNING):
        for sizes in [*SIZES, *SIZES]:
            found = forward_and_backward(sizes, torch.float32, "npu")
            assert_all_close(found, by_hand(sizes, torch.float32), TOLERANCES[torch.float32])
    assert not calls
    assert [record.getMessage() for record in caplog.records] == [
        "attention backend npu is not used: it is used in fp16 and bf16 only, not in float32 (--mixed_precision); "
        "sdpa runs instead"
    ]


def test_npu_off_an_npu_is_one_warning_and_sdpa(caplog):
    with caplog.at_level(logging.WARNING):
        for dtype in (torch.float32, torch.bfloat16):
            forward_and_backward(SIZES[0], dtype, "npu")
    assert len(caplog.records) == 1
    assert "npu is not used: the tensors are on cpu, not on an Ascend NPU; sdpa runs" in caplog.text
    assert all("sdpa (asked: npu)" in line for line in module.report())


def test_npu_without_torch_npu_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(device, "is_npu", lambda _: True)
    monkeypatch.setattr(device, "has_bf16", lambda _: True)
    monkeypatch.setattr(device, "torch_npu", lambda: None)
    forward_and_backward(SIZES[0], torch.float16, "npu")
    assert "torch_npu is not installed; sdpa runs instead" in caplog.text


def test_xformers_where_it_is_not_installed_falls_back(monkeypatch, caplog):
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: None)
    found = forward_and_backward(SIZES[1], torch.float32, "xformers")
    assert_all_close(found, by_hand(SIZES[1], torch.float32), TOLERANCES[torch.float32])
    assert "xformers is not installed; sdpa runs instead" in caplog.text


def test_xformers_takes_tokens_before_heads(monkeypatch):
    """memory_efficient_attention takes batch, tokens, heads, head size and scales by 1/√D by itself."""

    def by_batch_tokens_heads(query, key, value):
        weights = (torch.einsum("bmhk,bnhk->bhmn", query, key) * query.shape[-1] ** -0.5).softmax(-1)
        return torch.einsum("bhmn,bnhk->bmhk", weights, value)

    ops = SimpleNamespace(memory_efficient_attention=by_batch_tokens_heads)
    monkeypatch.setattr(module.importlib.util, "find_spec", lambda name: ops)
    monkeypatch.setattr(module.importlib, "import_module", lambda name: {"xformers.ops": ops}[name])
    monkeypatch.setattr(device, "is_cpu", lambda _: False)
    found = forward_and_backward(SIZES[1], torch.float32, "xformers")
    assert_all_close(found, by_hand(SIZES[1], torch.float32), TOLERANCES[torch.float32])
    assert module.report()[0].startswith("attention: xformers,")


def test_report_counts_calls_by_shape():
    for sizes in (SIZES[0], SIZES[1], SIZES[0]):
        forward_and_backward(sizes, torch.float32, "sdpa")
    line = "attention: sdpa, float32 on cpu, 3 calls by query x key tokens (heads x head size): 6x6 (2x8): 2"
    assert module.report() == [f"{line}, 5x3 (3x16): 1"]
    assert module.report(most_shapes=1) == [f"{line}, and 1 more shapes"]


def test_an_unknown_backend_is_an_error():
    leaves, _ = tensors(SIZES[0], torch.float32)
    with pytest.raises(ValueError, match="no attention backend 'flash9'; there are math, sdpa, npu, xformers"):
        attention(*leaves, "flash9")


@pytest.mark.parametrize(
    ("heads", "head_size", "taken"), [(256, 8, True), (257, 8, False), (1, 768, True), (1, 769, False)]
)
def test_npu_takes_as_many_heads_and_as_long_ones_as_its_documentation_says(monkeypatch, heads, head_size, taken):
    fake_npu(monkeypatch)
    q = torch.zeros(1, 2, heads, head_size, dtype=torch.float16)
    refusal = module.BACKENDS["npu"].refusal(q, q, q)
    assert (refusal is None) == taken
    assert taken or "at most 256 heads of at most 768" in refusal
