"""The U-Net's fused functions against torch's own layers: outputs, all gradients, what they keep, every precision."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from library.models import cpu_kernels as products
from library.models.cpu_kernels import Conv2d, Linear
from library.models.fused_ops import normed_convolution, normed_feed_forward, normed_linears


def layers(*made):
    """Layers whose parameters are far from the trivial ones."""
    for layer in made:
        for parameter in layer.parameters():
            nn.init.normal_(parameter, mean=float(parameter.ndim == 1), std=0.3)
    return made


def convolution_case(batch=2, channels=64, out=96, side=6):
    norm, convolution = layers(nn.GroupNorm(32, channels), nn.Conv2d(channels, out, 3, padding=1))
    x = torch.randn(batch, channels, side, side + 1)
    return (
        x,
        (norm, convolution),
        lambda x, norm, convolution: convolution(F.silu(norm(x))),
        normed_convolution,
    )


def linears_case():
    made = layers(nn.LayerNorm(48), *(nn.Linear(48, size, bias=False) for size in (48, 32, 64)))

    def plain(x, norm, *linears):
        return torch.cat([linear(norm(x)) for linear in linears], dim=-1)

    return torch.randn(2, 10, 48), made, plain, lambda x, *made: torch.cat(normed_linears(x, *made), dim=-1)


def feed_forward_case():
    def plain(x, norm, inner, outer):
        value, gate = inner(norm(x)).chunk(2, dim=-1)
        return outer(value * F.gelu(gate))

    made = layers(nn.LayerNorm(48), nn.Linear(48, 256), nn.Linear(128, 48))
    return torch.randn(2, 10, 48), made, plain, normed_feed_forward


CASES = {"convolution": convolution_case, "linears": linears_case, "feed-forward": feed_forward_case}


@pytest.fixture(params=CASES)
def case(request):
    torch.manual_seed(0)
    return CASES[request.param]()


def output_and_gradients(run, x, made):
    x = x.clone().requires_grad_(True)
    made = [copy.deepcopy(layer) for layer in made]
    out = run(x, *made)
    torch.manual_seed(1)
    out.float().backward(torch.randn(out.shape))
    return [out.detach(), x.grad, *(parameter.grad for layer in made for parameter in layer.parameters())]


def assert_close(found, expected, tolerance):
    assert len(found) == len(expected)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert (one.float() - other.float()).norm() <= tolerance * other.float().norm()


def test_output_and_all_gradients_are_those_of_torchs_layers(case):
    x, made, plain, lean = case
    assert_close(output_and_gradients(lean, x, made), output_and_gradients(plain, x, made), 1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_they_are_no_further_from_fp32_than_torchs_layers(case, dtype):
    x, made, plain, lean = case
    exact = output_and_gradients(plain, x, made)
    with torch.autocast("cpu", dtype=dtype):
        found, usual = output_and_gradients(lean, x, made), output_and_gradients(plain, x, made)
    assert found[0].dtype == usual[0].dtype == dtype
    for one, other, true in zip(found, usual, exact, strict=True):
        assert one.dtype == other.dtype
        error, usual_error = ((what.float() - true).norm() / true.norm() for what in (one, other))
        assert error < 1.5 * usual_error + 1e-3


def test_strides_of_neither_input_nor_gradient_matter():
    x, made, plain, lean = convolution_case()

    def permuted(run):
        return lambda x, *made: run(x.to(memory_format=torch.channels_last), *made).permute(0, 2, 3, 1)

    assert_close(output_and_gradients(permuted(lean), x, made), output_and_gradients(permuted(plain), x, made), 1e-5)


def test_frozen_parameters_get_no_gradient(case):
    x, made, _, lean = case
    for layer in made:
        layer.requires_grad_(False)
    _, grad, *rest = output_and_gradients(lean, x, made)
    assert grad is not None and all(one is None for one in rest)
    made[-1].weight.requires_grad_(True)
    out = lean(x, *made)
    out.sum().backward()
    assert made[-1].weight.grad is not None and made[0].weight.grad is None


def test_less_is_kept_for_backward(case):
    x, made, plain, lean = case
    parameters = {parameter.data_ptr() for layer in made for parameter in layer.parameters()}

    def kept(run):
        found = {}

        def pack(tensor):
            if tensor.data_ptr() not in parameters:
                found[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            out = run(x.clone().requires_grad_(True), *made)
        assert out.requires_grad
        return sum(found.values())

    assert kept(lean) < 0.6 * kept(plain)


@pytest.mark.parametrize("very_many", [products.VERY_MANY_WEIGHTS, 2**21])
def test_weights_of_many_channels_over_few_pixels_get_the_same_gradient(monkeypatch, very_many):
    monkeypatch.setattr(products, "VERY_MANY_WEIGHTS", very_many)
    torch.manual_seed(0)
    x, made, plain, lean = convolution_case(batch=2, channels=512, out=480, side=3)
    assert products._few_pixels_for_many_weights(x, made[1].weight)
    assert_close(output_and_gradients(lean, x, made), output_and_gradients(plain, x, made), 1e-5)


class WantedOfConvolutions(TorchDispatchMode):
    """Which gradients (input, weight, bias) each call of torch's operator is asked for."""

    def __init__(self):
        super().__init__()
        self.wanted = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            self.wanted.append(tuple(args[10]))
        return func(*args, **(kwargs or {}))


def test_torch_is_not_asked_for_a_bias_alone_for_which_it_would_compute_the_weights_gradient():
    x, (norm, convolution), _, lean = convolution_case(batch=2, channels=512, out=480, side=3)
    out = lean(x.requires_grad_(True), norm, convolution)
    with WantedOfConvolutions() as calls:
        out.sum().backward()
    assert calls.wanted == [(True, False, False)]


@pytest.mark.parametrize("onednn", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_a_linear_layer_is_torchs_with_onednn_and_without(monkeypatch, bias, onednn):
    monkeypatch.setattr(products, "_ONEDNN", onednn)
    torch.manual_seed(0)
    ours, theirs = Linear(24, 40, bias=bias), nn.Linear(24, 40, bias=bias)
    theirs.load_state_dict(ours.state_dict())
    for x in (torch.randn(2, 7, 24), torch.randn(24, 7, 2).transpose(0, 2)):
        expected = output_and_gradients(lambda x, layer: layer(x), x, [theirs])
        assert_close(output_and_gradients(lambda x, layer: layer(x), x, [ours]), expected, 1e-5)


def kept_beside_parameters(layer, x):
    """Sizes of what a layer's forward keeps for backward, its own parameters apart; and the input's gradient."""
    own, kept = {one.data_ptr() for one in layer.parameters()}, []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tensor.numel())
        return tensor

    x = x.clone().requires_grad_(True)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        out = layer(x)
    out.square().sum().backward()
    return kept, x.grad


@pytest.mark.parametrize("kind", ["linear", "linear on oneDNN", "pointwise convolution, compiled"])
def test_a_frozen_layer_keeps_no_input_and_has_the_same_input_gradient(monkeypatch, kind):
    """Its input is needed for its weight's gradient alone; a network of frozen layers with LoRA keeps half as much."""
    torch.manual_seed(0)
    if kind.startswith("linear"):
        monkeypatch.setattr(products, "_ONEDNN", kind.endswith("oneDNN"))
        layer, x = Linear(24, 40), torch.randn(2, 7, 24)
    else:
        monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
        layer, x = Conv2d(24, 40, 1), torch.randn(2, 24, 5, 6)
    kept, expected = kept_beside_parameters(layer, x)
    assert x.numel() in kept
    layer.requires_grad_(False)
    kept, found = kept_beside_parameters(layer, x)
    assert kept == []
    assert (found - expected).norm() <= 1e-6 * expected.norm()
    layer.zero_grad()
    layer.bias.requires_grad_(True)
    layer(x.requires_grad_(True)).sum().backward()
    assert layer.weight.grad is None and layer.bias.grad.sum() == pytest.approx(layer(x).numel())


def test_a_frozen_fused_function_keeps_its_norms_input_and_no_weights_product(case):
    """The norm's input (and the feed-forward's inner product) lead to the input's gradient, frozen or not."""
    x, made, _, lean = case
    for layer in made:
        layer.requires_grad_(False)
    own = {parameter.data_ptr() for layer in made for parameter in layer.parameters()}
    kept = []

    def pack(tensor):
        if tensor.data_ptr() not in own:
            kept.append(tuple(tensor.shape))
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        lean(x.clone().requires_grad_(True), *made)
    inner = [(2, 10, 256)] if lean is normed_feed_forward else []
    assert kept == [tuple(x.shape), *inner]
