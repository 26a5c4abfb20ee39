"""What the project does on each generation of Ascend, in a child process that test/test_npu_sim.py starts."""

import json
import logging
import os
from datetime import timedelta

import pytest
import torch
import torch_npu
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel

from library import device as devices
from library.errors import InputError
from library.models import attention_trial, gelu
from library.models.family import EncoderUse
from library.models.text import Tokens
from library.models.text_encoders import encode, use_erf_gelu
from library.models.vae import choose_attention
from library.training.engine.optimizers import ParameterGroup, make_optimizer
from library.training.engine.precision import make_accelerator
from library.training.step_profile import StepProfiler

NPU = torch.device("npu", 0)
FIRST, SECOND, THIRD = "Ascend910A", "Ascend910B3", "Ascend910_9391"


@pytest.fixture
def name(request, monkeypatch):
    monkeypatch.setenv("NPU_SIM_NAME", request.param)
    return request.param


on = pytest.mark.parametrize


@on(("name", "first"), [(FIRST, True), ("Ascend910B", True), (SECOND, False), (THIRD, False)], indirect=["name"])
def test_generations_are_told_apart(name, first):
    """ "Ascend910B" alone is CANN's name of a chip of the first generation."""
    assert devices.is_before_910b1(NPU) is first
    assert devices.shows_overflow(NPU) is devices.has_bf16(NPU) is devices.has_fused_attention(NPU) is (not first)
    assert devices.fused_optimizers(NPU) == (() if first else (torch.optim.AdamW,))


@on("name", [FIRST], indirect=True)
def test_the_first_generation_is_warned_of_refuses_bf16_and_compiles_no_shapes(name, caplog):
    with pytest.raises(InputError, match="--mixed_precision=bf16: Ascend910A does not compute in bf16"):
        make_accelerator("bf16")
    assert not caplog.records
    assert type(make_accelerator("fp16").scaler) is torch.npu.amp.GradScaler
    assert [record.levelno for record in caplog.records] == [logging.WARNING]
    assert "older than the Ascend 910B1" in caplog.text
    assert torch.npu.is_jit_compile_false()


@on("name", [FIRST], indirect=True)
def test_the_simulated_first_generation_is_what_is_documented_of_it(name):
    half = torch.full((2,), 60000.0, device=NPU).half()
    assert (half * 2).tolist() == [65504, 65504]  # saturated
    with pytest.raises(RuntimeError, match="bfloat16"):
        torch.ones(2, device=NPU, dtype=torch.bfloat16) * 2
    x = torch.full((1, 1), 1 + 2.0**-12, device=NPU)
    assert (x @ torch.ones(1, 1, device=NPU)).item() == 1  # rounded to fp16 before it is multiplied


@on(("kind", "fused"), [("Adam", None), ("AdamW", True)])
def test_only_adamw_is_fused(kind, fused):
    """torch_npu's fused Adam would take every weight to the CPU and back, which the simulation refuses."""
    weight = nn.Parameter(torch.ones(3, device=NPU))
    optimizer = make_optimizer(kind, [ParameterGroup("unet", [weight], 0.1)], [])
    assert optimizer.defaults["fused"] is fused
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    torch.testing.assert_close(
        weight.detach().cpu(), torch.full((3,), 0.9 if kind == "Adam" else 0.899), rtol=1e-5, atol=0
    )
    with pytest.raises(NotImplementedError, match="aten::_fused_adam_ has no kernel"):
        torch.optim.Adam([weight], fused=True).step()


@on("name", [FIRST, SECOND], indirect=True)
@on("dtype", [torch.float32, torch.float16])
def test_the_gated_unit_is_torchs_on_the_cpu(name, dtype):
    """Output and gradient in the erf form; torch's own gelu differs by up to 5e-4 on the device."""
    torch.manual_seed(0)
    inner = 3 * torch.randn(2, 5, 16)
    above = torch.randn(2, 5, 8)
    on_cpu = inner.clone().requires_grad_()
    value, gate = on_cpu.chunk(2, -1)
    want = value * nn.functional.gelu(gate)
    want.backward(above)
    on_npu = inner.to(NPU, dtype).requires_grad_()
    out, active = gelu.geglu(on_npu)
    out.backward(above.to(NPU, dtype))
    by_hand = gelu.geglu_gradient(above.to(NPU, dtype), on_npu.detach(), active.detach())
    tolerance = {"rtol": 0, "atol": 1e-5 if dtype == torch.float32 else 3e-2}
    torch.testing.assert_close(out.float().cpu(), want, **tolerance)
    for gradient in (on_npu.grad, by_hand):
        torch.testing.assert_close(gradient.float().cpu(), on_cpu.grad, **tolerance)
    off = (nn.functional.gelu(inner.to(NPU)).cpu() - nn.functional.gelu(inner)).abs().max()
    assert 2e-4 < off < 1e-3


def test_a_text_encoder_with_gelu_computes_the_erf_form():
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=100, hidden_act="gelu", eos_token_id=99)).eval()
    ids = torch.arange(8)[None]
    want = encoder(ids).last_hidden_state
    names = encoder.state_dict().keys()
    use_erf_gelu(encoder)
    assert encoder.state_dict().keys() == names and torch.equal(encoder(ids).last_hidden_state, want)
    got = encoder.to(NPU)(ids.to(NPU)).last_hidden_state
    torch.testing.assert_close(got.cpu(), want, rtol=0, atol=2e-6)


def test_text_states_under_the_shared_mask_are_the_cpus(monkeypatch):
    """One mask of the text's length, and no triangle of 2048 x 2048 in each layer."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3, "num_attention_heads": 2}
    encoder = CLIPTextModel(CLIPTextConfig(**sizes, vocab_size=100, eos_token_id=99)).eval()
    use = EncoderUse(skipped_layers=1, final_norm=False, pooled=False)
    ids = torch.randint(0, 98, (2, 1, 77))
    want = encode([encoder], Tokens((ids,)), [use]).context_BTC
    masks = []
    fused = torch_npu.npu_fusion_attention
    monkeypatch.setattr(
        "torch_npu._operators.npu_fusion_attention",
        lambda *given, **named: masks.append(named["atten_mask"].shape) or fused(*given, **named),
    )
    got = encode([encoder.to(NPU)], Tokens((ids.to(NPU),)), [use]).context_BTC
    torch.testing.assert_close(got.cpu(), want, rtol=1e-4, atol=1e-5)
    assert masks == [(1, 1, 77, 77)] * 2


@on(("environment", "hccl", "group"), [({}, "3600", 3660), ({"HCCL_EXEC_TIMEOUT": "7200"}, "7200", 7260)])
def test_collectives_may_take_the_time_that_was_asked_for(monkeypatch, environment, hccl, group):
    monkeypatch.delenv("HCCL_EXEC_TIMEOUT", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert devices.collective_timeout(NPU, timedelta(hours=1)) == timedelta(seconds=group)
    assert os.environ["HCCL_EXEC_TIMEOUT"] == hccl
    monkeypatch.setenv("HCCL_EXEC_TIMEOUT", "30m")
    with pytest.raises(InputError, match="HCCL_EXEC_TIMEOUT=30m"):
        devices.collective_timeout(NPU, timedelta(hours=1))


def test_attention_that_fails_on_a_device_is_found_before_the_run(monkeypatch, caplog):
    for backend in ("npu", "sdpa"):
        assert attention_trial.usable(backend, NPU, torch.float16, 64) == backend
    assert attention_trial.failure("sdpa", NPU, torch.float32, 512, backward=False) is None
    right = torch_npu.npu_fusion_attention

    def wrong(query, key, value, *given, **named):
        return right(query, key, 1.1 * value, *given, **named)

    monkeypatch.setattr(torch_npu, "npu_fusion_attention", wrong)
    assert attention_trial.usable("npu", NPU, torch.float16, 64) == "math"
    assert "its output differs from the formula's by 0.1 of its norm; the formula runs instead" in caplog.text

    def refused(*given, **named):
        raise RuntimeError("npu_fusion_attention: aclnnFlashAttentionScore is not supported on this product")

    monkeypatch.setattr(torch_npu, "npu_fusion_attention", refused)
    assert attention_trial.usable("npu", NPU, torch.float16, 64) == "math"
    assert "is not supported on this product; the formula" in caplog.text


def test_a_vae_whose_attention_fails_attends_by_the_formula(monkeypatch, caplog):
    from diffusers import AutoencoderKL

    torch.manual_seed(0)
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",), up_block_types=("UpDecoderBlock2D",), block_out_channels=(32,)
    ).eval()
    pixels = torch.rand(2, 3, 16, 16)
    want = vae.encode(pixels).latent_dist.mean
    vae.to(NPU)
    choose_attention(vae)
    assert not caplog.records
    monkeypatch.setattr("library.models.vae.failure", lambda *given, **named: "it was tried")
    choose_attention(vae)
    assert "the VAE's attention was tried on Ascend910B3 and fails: it was tried" in caplog.text
    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", None)  # nobody calls it
    torch.testing.assert_close(vae.encode(pixels.to(NPU)).latent_dist.mean.cpu(), want, rtol=1e-4, atol=1e-5)


def test_the_profile_is_torch_npus_own(tmp_path):
    profiler = StepProfiler("1..2", tmp_path, NPU, 0, 0, 2)
    for step in (1, 2):
        profiler.begin(step)
        torch.ones(2, device=NPU) * 2
        profiler.end(step)
    (trace,) = tmp_path.glob("rank0_*_ascend_pt/ASCEND_PROFILER_OUTPUT/trace_view.json")
    assert "ProfilerStep#1" in {event.get("name") for event in json.loads(trace.read_text())["traceEvents"]}
