"""Checks of the fused operators' stand-ins, in a child process that test/test_npu_sim.py starts."""

import math

import pytest
import torch
import torch_npu
from torch.nn.functional import gelu, scaled_dot_product_attention

from library.models import attention as attentions
from library.models import keyed_dropout

B, S, K, N, D = 2, 6, 9, 3, 16
SCALE = 1 / math.sqrt(D)


def parts(dtype=torch.float32, device="npu"):
    """Query, key and value in BNSD."""
    torch.manual_seed(0)
    return [torch.randn(B, N, length, D).to(device, dtype) for length in (S, K, K)]


def laid_out(tensor, layout):
    return {
        "BNSD": lambda: tensor,
        "BSND": lambda: tensor.transpose(1, 2),
        "BSH": lambda: tensor.transpose(1, 2).flatten(2),
        "SBH": lambda: tensor.permute(2, 0, 1, 3).flatten(2),
        "TND": lambda: tensor.transpose(1, 2).flatten(0, 1),
    }[layout]()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("layout", ["BNSD", "BSND", "BSH", "SBH", "TND"])
def test_fused_attention_is_attention_in_every_layout(layout, dtype):
    q, k, v = parts(dtype)
    lengths = {"actual_seq_qlen": [S, 2 * S], "actual_seq_kvlen": [K, 2 * K]} if layout == "TND" else {}
    result = torch_npu.npu_fusion_attention(
        *(laid_out(part, layout) for part in (q, k, v)), N, layout, scale=SCALE, **lengths
    )
    want = scaled_dot_product_attention(*(part.float().cpu() for part in (q, k, v)))
    tolerance = {"rtol": 0, "atol": 1e-6 if dtype == torch.float32 else 1e-2}
    assert len(result) == 7
    assert result[0].dtype == dtype and result[0].device == q.device
    torch.testing.assert_close(result[0].float().cpu(), laid_out(want, layout), **tolerance)
    assert result[1].shape[-1] == result[2].shape[-1] == 8 and result[1].dtype == torch.float32


def test_fused_attention_does_not_mind_the_case_of_the_layout():
    q, k, v = parts(torch.float16)
    upper, lower = (torch_npu.npu_fusion_attention(q, k, v, N, name, scale=SCALE)[0] for name in ("BNSD", "bnsd"))
    torch.testing.assert_close(upper, lower, rtol=0, atol=0)


def test_fused_attention_has_gradients_masks_and_position_scores():
    q, k, v = (part.requires_grad_() for part in parts())
    mask = torch.ones(S, K, dtype=torch.bool, device="npu").triu(4)
    pse = torch.randn(1, N, S, K, device="npu")
    out = torch_npu.npu_fusion_attention(q, k, v, N, "BNSD", pse=pse, atten_mask=mask, scale=SCALE)[0]
    gradients = torch.autograd.grad(out.square().sum(), (q, k, v))
    on_cpu = [part.detach().cpu().requires_grad_() for part in (q, k, v)]
    scores = (on_cpu[0] @ on_cpu[1].transpose(-1, -2) + pse.cpu()) * SCALE
    want = scores.masked_fill(mask.cpu(), -math.inf).softmax(-1) @ on_cpu[2]
    torch.testing.assert_close(out.cpu(), want)
    for got, expected in zip(gradients, torch.autograd.grad(want.square().sum(), on_cpu), strict=True):
        torch.testing.assert_close(got.cpu(), expected, rtol=1e-4, atol=1e-5)
    triangle = torch.ones(2048, 2048, dtype=torch.bool, device="npu").triu(1)
    causal = torch_npu.npu_fusion_attention(q, k, v, N, "BNSD", atten_mask=triangle, scale=SCALE, sparse_mode=2)[0]
    torch.testing.assert_close(causal.cpu(), scaled_dot_product_attention(*on_cpu, is_causal=True))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"input_layout": "BDNS"}, "input_layout"),
        ({"head_num": N + 1}, "head"),
        ({"head_num": 0}, "head_num"),
        ({name: torch.zeros(B, N, 0, D, device="npu") for name in ("key", "value")}, "length"),
        ({name: torch.zeros(0, N, K, D, device="npu") for name in ("query", "key", "value")}, "batch"),
        ({"input_layout": "BSH"}, "dimensions"),
        ({"input_layout": "TND"}, "actual_seq_qlen"),
        ({"actual_seq_qlen": [S]}, "TND"),
        ({"keep_prob": 0.0}, "keep_prob"),
        ({"padding_mask": torch.ones(1)}, "padding_mask"),
        ({"atten_mask": torch.zeros(S, K, device="npu")}, "atten_mask"),
        ({"sparse_mode": 2, "atten_mask": torch.zeros(S, K, dtype=torch.bool, device="npu")}, "2048"),
        ({"atten_mask": torch.zeros(S, K, dtype=torch.bool)}, "npu"),
        ({"atten_mask": torch.zeros(S, K + 1, dtype=torch.bool, device="npu")}, "atten_mask"),
        ({"sparse_mode": 9}, "sparse_mode"),
        ({"softmax_layout": "TND"}, "softmax_layout"),
        ({"pse": torch.zeros(1, N, S, K, device="npu").half()}, "pse"),
        ({"key": torch.zeros(B, N, K, D)}, "npu"),
        ({"key": torch.zeros(B, N, K, D, device="npu").half()}, "dtype"),
        ({"key": torch.zeros(B, N, K, D + 1, device="npu")}, "head size"),
        ({"key": torch.zeros(B, 2, K, D, device="npu")}, "heads"),
    ],
    ids=str,
)
def test_fused_attention_refuses_what_the_real_one_does(change, message):
    q, k, v = parts()
    with pytest.raises(RuntimeError, match=message):
        torch_npu.npu_fusion_attention(
            **{"query": q, "key": k, "value": v, "head_num": N, "input_layout": "BNSD", "scale": SCALE, **change}
        )
    with pytest.raises(RuntimeError, match="float64"):
        torch_npu.npu_fusion_attention(*(part.cpu().double().to("npu") for part in (q, k, v)), N, "BNSD")


# Query tokens, key tokens, head size. Self-attention of any length; the text's 77, 152 and 227 tokens; head sizes of
# SDXL (64), of SD 1.x (40), and the largest.
LENGTHS = [(63, 63, 64), (1, 1, 64), (24, 77, 64), (9, 152, 64), (5, 227, 64), (33, 33, 40), (7, 77, 8), (3, 5, 768)]
TOLERANCES = {torch.float16: 2e-3, torch.bfloat16: 1.6e-2}  # relative: a few roundings of 2^-11 and 2^-8


@pytest.mark.parametrize("dtype", TOLERANCES)
@pytest.mark.parametrize(("queries", "keys", "head_size"), LENGTHS)
def test_the_npu_backend_of_the_trainers_attention_agrees_with_math(dtype, queries, keys, head_size):
    """What --enable_npu_flash_attention runs, output and gradients, and that it is what runs."""
    shapes = [(B, length, N, head_size) for length in (queries, keys, keys)]
    results = {}
    for backend in ("npu", "math"):
        torch.manual_seed(0)
        inputs = [torch.randn(shape).to("npu", dtype).requires_grad_() for shape in shapes]
        above = torch.randn(shapes[0]).to("npu", dtype)
        attentions.reset_report()
        out = attentions.attention(*inputs, backend)
        assert attentions.report()[0].startswith(f"attention: {backend},")
        assert out.dtype == dtype and out.shape == shapes[0]
        results[backend] = [out, *torch.autograd.grad(out, inputs, above)]
    for got, want in zip(results["npu"], results["math"], strict=True):
        # The absolute part is for one key token, whose weight is 1 whatever the scores: their gradients are rounding.
        error, size = (got.float() - want.float()).norm().item(), want.float().norm().item()
        assert error <= TOLERANCES[dtype] * (size + want.numel() ** 0.5 * TOLERANCES[dtype])


@pytest.mark.parametrize("name", ["Ascend910A", "Ascend910ProB", "Ascend910B"])
def test_the_first_ascend_910_has_no_fused_attention_and_sdpa_runs(monkeypatch, caplog, name):
    q = torch.randn(1, 4, 2, 64, device="npu").half()
    monkeypatch.setenv("NPU_SIM_NAME", name)
    with pytest.raises(RuntimeError, match="not supported on this product"):
        torch_npu.npu_fusion_attention(q, q, q, 2, "BSND")
    attentions.reset_report()
    for _ in range(2):
        attentions.attention(q, q, q, "npu")
    assert [record.getMessage() for record in caplog.records] == [
        f"attention backend npu is not used: {name} has no fused attention for training, Ascend 910B1 and later have; "
        "sdpa runs instead"
    ]
    attentions.reset_report()
    for name in ("Ascend910B3", "Ascend910_9391"):
        monkeypatch.setenv("NPU_SIM_NAME", name)
        attentions.attention(q, q, q, "npu")
        assert attentions.report()[0].startswith("attention: npu,")
        attentions.reset_report()


@pytest.mark.parametrize(
    ("shape", "runs"), [((1, 4, 2, 769), "sdpa"), ((1, 2, 257, 8), "math"), ((1, 0, 2, 8), "math")], ids=str
)
def test_what_the_operator_refuses_the_backend_does_not_give_it(caplog, shape, runs):
    """Nor does torch's SDPA, which goes to the operator with heads of up to 512."""
    q = torch.randn(shape, device="npu").half()
    with pytest.raises(RuntimeError, match=r"head|length"):
        torch_npu.npu_fusion_attention(q, q, q, shape[2], "BSND")
    attentions.reset_report()
    attentions.attention(q, q, q, "npu")
    assert attentions.report()[0].startswith(f"attention: {runs} (asked: npu)")
    assert len(caplog.records) == (1 if runs == "sdpa" else 2)


def test_the_npu_backend_falls_back_in_fp32_and_says_so(caplog):
    attentions.reset_report()
    q = torch.randn(1, 4, 2, 64, device="npu")
    attentions.attention(q, q, q, "npu")
    assert "npu" in caplog.text and "float32" in caplog.text
    assert attentions.report()[0].startswith("attention: sdpa (asked: npu)")


def test_other_fused_operators():
    x = torch.randn(3, 8)
    left, right = x.chunk(2, -1)
    out, active = torch_npu.npu_geglu(x.npu(), dim=-1, approximate=1)
    torch.testing.assert_close(out.cpu(), left * gelu(right, approximate="tanh"))
    torch.testing.assert_close(active.cpu(), gelu(right, approximate="tanh"))
    torch.testing.assert_close(torch_npu.npu_swiglu(x.npu()).cpu(), torch.nn.functional.silu(left) * right)
    normed = torch_npu.npu_rms_norm(x.npu(), torch.ones(8, device="npu"), epsilon=1e-6)[0]
    torch.testing.assert_close(normed.cpu(), torch.nn.functional.rms_norm(x, (8,), eps=1e-6))
    with pytest.raises(RuntimeError, match="npu"):
        torch_npu.npu_geglu(x)


def test_dropout_masks_are_the_cpus():
    with keyed_dropout.draws(3, 7, [0, 5]):
        one, other = (keyed_dropout.keep_mask("x", 0.3, 4, (5, 7), torch.device(name)) for name in ("cpu", "npu:0"))
    assert other.device.type == "npu" and torch.equal(one, other.cpu())
