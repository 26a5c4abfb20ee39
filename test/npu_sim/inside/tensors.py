"""Checks that run in a child process on the simulated NPU (test/test_npu_sim.py starts them)."""

import copy
import io

import pytest
import torch
import torch_npu  # noqa: F401  makes "npu" known
from torch import nn

NPU = torch.device("npu", 0)


def on_both(function, *tensors):
    """What function gives on the CPU and on the NPU, and the gradients of a weighted sum of it."""
    results = []
    for device in ("cpu", "npu"):
        inputs = [tensor.detach().to(device).requires_grad_(tensor.is_floating_point()) for tensor in tensors]
        out = function(*inputs)
        weights = torch.linspace(-1, 1, out.numel()).view(out.shape).to(out)
        (out * weights).sum().backward()
        results.append([out, *(tensor.grad for tensor in inputs if tensor.grad is not None)])
    return results


def assert_same_on_both(function, *tensors):
    on_cpu, on_npu = on_both(function, *tensors)
    assert len(on_cpu) == len(on_npu)
    for want, got in zip(on_cpu, on_npu, strict=True):
        assert got.device == NPU
        torch.testing.assert_close(got.cpu(), want)


def test_tensors_say_where_they_are_and_come_back():
    values = torch.arange(6.0).view(2, 3)
    tensor = values.npu()
    assert (tensor.device, tensor.is_npu, tensor.is_cpu) == (NPU, True, False)
    assert torch.equal(tensor.cpu(), values) and tensor.tolist() == values.tolist()
    assert tensor.sum().item() == 15 and tensor.t().is_contiguous() is False
    assert torch.equal(tensor.to(torch.int64).cpu(), values.long())
    assert "npu:0" in repr(tensor)
    with pytest.raises(TypeError, match="npu"):
        tensor.numpy()


def test_views_share_memory_and_in_place_changes_show_in_all():
    base = torch.zeros(4, 4, device=NPU)
    row, flat, transposed = base[1], base.view(-1), base.t()
    row.fill_(3)
    transposed[0, 0] = 5
    assert flat.cpu().tolist() == [5, 0, 0, 0, 3, 3, 3, 3] + [0] * 8
    out = torch.empty(0, device=NPU)
    torch.add(row, 1, out=out.resize_(4))
    assert out.tolist() == [4, 4, 4, 4] and out.device == NPU


def test_tensors_of_two_devices_do_not_meet():
    here, there, host = torch.ones(3, device=NPU), torch.ones(3, device="npu:1"), torch.ones(3)
    for other in (there, host):
        for operation in (torch.add, torch.mul, torch.dot, lambda a, b: torch.cat([a, b]), lambda a, b: a.add_(b)):
            with pytest.raises(RuntimeError, match="same device"):
                operation(here, other)
            with pytest.raises(RuntimeError, match="same device"):
                operation(other, here)
    with pytest.raises(RuntimeError, match="same device"):
        nn.functional.linear(torch.ones(2, 3, device=NPU), torch.ones(4, 3))
    with pytest.raises(RuntimeError, match="same device"):
        nn.functional.conv2d(torch.ones(1, 3, 4, 4, device=NPU), torch.ones(2, 3, 3, 3))
    assert (here * torch.tensor(2.0)).tolist() == [2, 2, 2]  # numbers may come from the CPU
    assert torch.equal((here.to("npu:1") + there).cpu(), host * 2)
    with pytest.raises(RuntimeError, match="ordinal"):
        torch.ones(1, device="npu:99")


@pytest.mark.parametrize(
    "module",
    [
        nn.Linear(8, 4),
        nn.Conv2d(8, 6, 3, padding=1),
        nn.Conv2d(8, 8, 3, stride=2, groups=2, bias=False),
        nn.ConvTranspose2d(8, 6, 3, stride=2),
        nn.GroupNorm(2, 8),
        nn.LayerNorm(8),
        nn.BatchNorm2d(8),
        nn.Sequential(nn.SiLU(), nn.GELU("tanh"), nn.Softmax(-1)),
        nn.Upsample(scale_factor=2, mode="nearest"),
    ],
    ids=repr,
)
def test_modules_give_the_same_output_and_gradients_as_on_the_cpu(module):
    torch.manual_seed(0)
    x = torch.randn(2, 8, 8, 8)
    on_cpu, on_npu = module, copy.deepcopy(module).to(NPU)
    for parts in (on_both(lambda x: (on_cpu if x.is_cpu else on_npu)(x), x),):
        for want, got in zip(*parts, strict=True):
            torch.testing.assert_close(got.cpu(), want, rtol=1e-5, atol=1e-5)
    for want, got in zip(on_cpu.parameters(), on_npu.parameters(), strict=True):
        assert got.grad.device == NPU
        torch.testing.assert_close(got.grad.cpu(), want.grad, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("loss", ["mse_loss", "smooth_l1_loss", "l1_loss"])
@pytest.mark.parametrize("reduction", ["mean", "none", "sum"])
def test_losses(loss, reduction):
    torch.manual_seed(0)
    assert_same_on_both(
        lambda a, b: getattr(nn.functional, loss)(a, b, reduction=reduction), torch.randn(3, 4), torch.randn(3, 4)
    )


def test_attention_embeddings_and_indexing():
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 3, 5, 16).unbind()
    assert_same_on_both(nn.functional.scaled_dot_product_attention, q, k, v)
    places = torch.tensor([[0, 2], [2, 1]])
    assert_same_on_both(lambda weight: nn.functional.embedding(places.to(weight.device), weight), torch.randn(4, 8))
    assert_same_on_both(lambda x: x[torch.tensor([1, 0])], torch.randn(3, 4))  # indices may lie on the CPU


def test_autocast_casts_as_on_every_device():
    linear, norm = nn.Linear(4, 4).to(NPU), nn.LayerNorm(4).to(NPU)
    x = torch.randn(2, 4, device=NPU)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("npu", dtype=dtype):
            y = linear(x)
            assert y.dtype == dtype
            assert norm(y).dtype == y.softmax(-1).dtype == nn.functional.mse_loss(y, y).dtype == torch.float32
            assert (y + x).dtype == torch.float32
            with torch.autocast("npu", enabled=False):
                assert linear(x).dtype == torch.float32
        y.float().sum().backward()
        assert linear.weight.grad.dtype == torch.float32
        torch.testing.assert_close(y.float(), linear(x), rtol=2e-2, atol=2e-2)
    with pytest.raises(RuntimeError, match="dtype"):
        nn.functional.linear(x.half(), linear.weight)


def test_random_numbers_are_the_devices_own():
    torch.manual_seed(5)
    first, host = torch.randn(4, device=NPU), torch.randn(4)
    torch.manual_seed(5)
    assert torch.equal(torch.randn(4), host)  # drawing on the NPU leaves the CPU's numbers alone
    assert torch.equal(torch.randn(4, device=NPU), first)
    state, host_state = torch.npu.get_rng_state(), torch.get_rng_state()
    dropped = nn.functional.dropout(torch.ones(64, device=NPU), 0.5)
    assert torch.equal(torch.get_rng_state(), host_state)
    torch.npu.set_rng_state(state)
    assert torch.equal(nn.functional.dropout(torch.ones(64, device=NPU), 0.5), dropped)
    assert 0 < dropped.count_nonzero() < 64
    torch.npu.manual_seed(7)
    assert not torch.equal(torch.randn(4, device=NPU), first)
    own = torch.Generator(device=NPU).manual_seed(3)
    drawn = torch.randn(4, device=NPU, generator=own)
    assert torch.equal(torch.randn(4, device=NPU, generator=own.manual_seed(3)), drawn)
    with pytest.raises(RuntimeError, match="npu"):
        torch.randn(4, device=NPU, generator=torch.Generator())
    with pytest.raises(RuntimeError):
        torch.randn(4, generator=own)
    torch.manual_seed(5)
    torch.npu.set_device(1)
    assert torch.randn(4, device="npu").device.index == 1
    torch.npu.set_device(0)
    assert torch.equal(torch.randn(4, device=NPU), first)  # each device draws from its own state


def test_memory_figures_rise_and_fall():
    torch.npu.reset_peak_memory_stats()
    before, other_before = torch.npu.memory_allocated(), torch.npu.memory_allocated(1)
    held = torch.zeros(1000, 1000, device=NPU)
    assert torch.npu.memory_allocated() - before == 4_000_000
    view = held[:10]
    result = held + 1
    assert torch.npu.memory_allocated() - before == 8_000_000
    del held, result
    assert torch.npu.memory_allocated() - before == 4_000_000  # the view holds it
    del view
    assert torch.npu.memory_allocated() == before
    assert torch.npu.max_memory_allocated() - before == 8_000_000
    torch.npu.reset_peak_memory_stats()
    assert torch.npu.max_memory_allocated() == before
    there = torch.zeros(10, device="npu:1")
    assert torch.npu.memory_allocated(1) - other_before == there.nbytes
    there.untyped_storage().resize_(0)
    assert torch.npu.memory_allocated(1) == other_before


def test_a_module_moved_keeps_its_parameters_so_an_optimizer_made_before_trains_it():
    module = nn.Linear(3, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    identities = [id(parameter) for parameter in module.parameters()]
    module.to(NPU)
    assert [id(parameter) for parameter in module.parameters()] == identities
    before = module.weight.detach().clone()
    module(torch.ones(2, 3, device=NPU)).sum().backward()
    optimizer.step()
    assert not torch.equal(module.weight, before)
    assert optimizer.state[module.weight]["exp_avg"].device == NPU


@pytest.mark.parametrize("options", [{}, {"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_optimizers_step_as_on_the_cpu(options):
    weights = []
    for device in ("cpu", "npu"):
        torch.manual_seed(0)
        module = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).to(device)
        optimizer = torch.optim.AdamW(module.parameters(), lr=0.01, **options)
        for _ in range(3):
            module(torch.ones(2, 4, device=device)).square().sum().backward()
            nn.utils.clip_grad_norm_(module.parameters(), 0.5)
            optimizer.step()
            optimizer.zero_grad()
        weights.append([parameter.detach().cpu() for parameter in module.parameters()])
    torch.testing.assert_close(weights[1], weights[0])


def test_state_is_saved_loaded_and_copied():
    module = nn.Linear(3, 2).to(NPU)
    file = io.BytesIO()
    torch.save(module.state_dict(), file)
    for location, device in ((None, NPU), ("cpu", torch.device("cpu")), ("npu:1", torch.device("npu", 1))):
        file.seek(0)
        loaded = torch.load(file, map_location=location)
        assert {tensor.device for tensor in loaded.values()} == {device}
        assert torch.equal(loaded["weight"].cpu(), module.weight.cpu())
    other = copy.deepcopy(module)
    assert other.weight.device == NPU and other.weight.data_ptr() != module.weight.data_ptr()
    nn.init.zeros_(other.weight)
    assert module.weight.count_nonzero() > 0
    other.load_state_dict(module.state_dict())
    assert torch.equal(other.weight, module.weight)


def test_gradient_checkpointing_recomputes_the_same():
    from torch.utils.checkpoint import checkpoint

    module = nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.5), nn.GELU(), nn.Linear(8, 1)).to(NPU)
    x, gradients = torch.randn(4, 8, device=NPU), []
    for run in (module, lambda x: checkpoint(module, x, use_reentrant=False)):
        torch.npu.manual_seed(1)
        module.zero_grad()
        run(x).sum().backward()
        gradients.append([parameter.grad.clone() for parameter in module.parameters()])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


def test_streams_events_and_pinned_memory():
    start, end = torch.npu.Event(enable_timing=True), torch.npu.Event(enable_timing=True)
    stream = torch.npu.Stream()
    with torch.npu.stream(stream):
        start.record()
        tensor = torch.ones(4).pin_memory().to(NPU, non_blocking=True)
        end.record()
    torch.npu.current_stream().wait_event(end)
    tensor.record_stream(stream)
    torch.npu.synchronize()
    assert start.elapsed_time(end) > 0 and end.query()
    assert torch.ones(4).pin_memory().is_pinned() and not torch.ones(4).is_pinned()
