"""Layers that others have touched (replaced `forward`, hooks, wrappers, parametrizations) act, and only they change."""

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize

from library.models.compiled import compile_blocks
from library.models.cpu_kernels import Conv2d, Linear
from library.models.fused_ops import is_plain
from test.models.low_rank import put_low_rank_on
from test.models.unets import CONFIGS, SD2_LIKE, diffusers_unet, inputs, module_names, our_unet, relative


@pytest.fixture(params=CONFIGS)
def config(request):
    return CONFIGS[request.param]


def layers_with_weights(network, kinds=(nn.Linear, nn.Conv2d)):
    return [path for path, module in network.named_modules() if isinstance(module, kinds)]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_replaced_forwards_are_called_everywhere_and_have_diffusers_outputs_and_gradients(config, checkpointing):
    ours = our_unet(config)
    theirs = diffusers_unet(config, ours)
    given, (their_given, added) = inputs(config)
    plain = ours(*given).detach()
    names = module_names(config)
    paths = layers_with_weights(ours)
    ours.enable_gradient_checkpointing(checkpointing)
    branches = put_low_rank_on(ours, paths)
    their_branches = put_low_rank_on(theirs, [names[path] for path in paths])
    assert relative(ours(*given), plain) < 1e-5  # as branches start at zero

    torch.manual_seed(2)
    for path, branch in branches.items():
        nn.init.normal_(branch.up.weight, std=0.1)
        their_branches[names[path]].load_state_dict(branch.state_dict())
        branch.calls = 0
    out, expected = ours(*given), theirs(*their_given, added_cond_kwargs=added).sample
    assert relative(out, expected) < 1e-4 and relative(out, plain) > 1e-2
    assert {path for path, branch in branches.items() if branch.calls != 1} == set()
    for one in (out, expected):
        one.square().mean().backward()
    scale = float(torch.stack([one.up.weight.grad.norm() for one in their_branches.values()]).norm())
    wrong = []
    for path, branch in branches.items():
        for (name, one), other in zip(branch.named_parameters(), their_branches[names[path]].parameters(), strict=True):
            if not (one.grad - other.grad).norm() <= 1e-4 * other.grad.norm() + 1e-7 * scale:
                wrong.append(f"{path}.{name}")
    assert not wrong and all(parameter.grad is None for parameter in ours.parameters())


def test_a_replaced_or_hooked_norm_acts(config):
    ours = our_unet(config)
    given, _ = inputs(config)
    plain = ours(*given).detach()
    norms = layers_with_weights(ours, (nn.LayerNorm, nn.GroupNorm))
    calls = []
    for number, path in enumerate(norms):
        norm = ours.get_submodule(path)
        if number % 2:
            norm.register_forward_hook(lambda module, given, out, path=path: calls.append(path))
        else:
            forward = norm.forward
            norm.forward = lambda x, forward=forward, path=path: (calls.append(path), forward(x))[1]
    out = ours(*given)
    assert sorted(calls) == sorted(norms)
    assert relative(out, plain) < 1e-5


@pytest.mark.filterwarnings("ignore:Full backward hook is firing")
@pytest.mark.parametrize("hook", ["forward", "forward_pre", "full_backward", "full_backward_pre"])
def test_hooks_of_every_kind_run(hook):
    ours = our_unet(SD2_LIKE)
    calls = []
    paths = layers_with_weights(ours)
    for path in paths:
        layer = ours.get_submodule(path)
        getattr(layer, f"register_{hook}_hook")(lambda *_, path=path: calls.append(path))
    ours(*inputs(SD2_LIKE)[0]).square().mean().backward()
    assert sorted(calls) == sorted(paths)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


class Wrapped(nn.Module):
    """A layer in another's place, which shows the weight of the one within, as peft's do."""

    def __init__(self, layer):
        super().__init__()
        self.base_layer = layer

    @property
    def weight(self):
        return self.base_layer.weight

    @property
    def bias(self):
        return self.base_layer.bias

    def forward(self, x):
        return 2 * self.base_layer(x)


@pytest.mark.parametrize("how", ["wrapped", "parametrized"])
def test_layers_that_are_wrapped_or_parametrized_act(how):
    """Both double a product without bias, so both are the network whose weight is twice as large."""
    path = "input_blocks.1.1.transformer_blocks.0.attn1.to_k"
    ours, doubled = our_unet(SD2_LIKE), our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    with torch.no_grad():
        doubled.get_submodule(path).weight.mul_(2)
    parent, layer = ours.get_submodule(path.rpartition(".")[0]), ours.get_submodule(path)
    if how == "wrapped":
        parent.to_k = Wrapped(layer)
    else:
        parametrize.register_parametrization(layer, "weight", Doubled())
    assert relative(ours(*given), doubled(*given)) < 1e-5


def test_a_layer_without_weights_of_its_own_is_no_obstacle():
    """LyCORIS's `full` takes them away."""
    ours = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    plain = ours(*given).detach()
    for path in layers_with_weights(ours):
        layer = ours.get_submodule(path)
        weight, bias, call = layer.weight.detach(), layer.bias, type(layer).forward
        del layer.weight, layer.bias
        twin = type(layer).__new__(type(layer))
        twin.__dict__ = {**layer.__dict__, "weight": weight, "bias": bias}
        layer.forward = lambda x, twin=twin, call=call: call(twin, x)
    assert next(ours.time_embed.parameters(), None) is None
    assert relative(ours(*given), plain) < 1e-5


def test_a_convolution_of_another_kind_or_a_bias_that_came_later_is_seen():
    ours = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    plain = ours(*given).detach()
    block = ours.input_blocks[1]
    block[1].transformer_blocks[0].attn1.to_q.bias = nn.Parameter(torch.ones(64))
    biased = ours(*given).detach()
    assert relative(biased, plain) > 1e-4
    block[0].in_layers[2].padding_mode = "circular"
    assert relative(ours(*given), biased) > 1e-4


@pytest.mark.parametrize("ours", [Linear, Conv2d])
def test_our_layers_are_made_as_torchs_are_and_have_their_names(ours):
    """LyCORIS makes layers like those that it extends, by place and by keyword."""
    theirs = {Linear: nn.Linear, Conv2d: nn.Conv2d}[ours]
    assert ours.__name__ == theirs.__name__
    if ours is Linear:
        made, x = [(one(6, 4), one(6, 4, bias=False)) for one in (ours, theirs)], torch.randn(3, 6)
    else:
        made = [
            (one(4, 6, 1), one(4, 6, (3, 3), 2, 1, bias=False), one(4, 6, kernel_size=1, stride=2, padding=1, groups=2))
            for one in (ours, theirs)
        ]
        x = torch.randn(2, 4, 5, 5)
    for one, other in zip(*made, strict=True):
        one.load_state_dict(other.state_dict())
        assert relative(one(x), other(x)) < 1e-6
        compiled = torch.compile(one, backend="eager")
        assert relative(compiled(x), other(x)) < 1e-6
        assert is_plain(one) and is_plain(other)


def test_compiled_blocks_call_what_others_have_put_in():
    torch._dynamo.reset()
    ours, plain = our_unet(SD2_LIKE), our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    results = []
    for network in (ours, plain):
        branches = put_low_rank_on(network, layers_with_weights(network))
        torch.manual_seed(2)
        for branch in branches.values():
            nn.init.normal_(branch.up.weight, std=0.1)
        if network is ours:
            record = compile_blocks(network, "aot_eager", "sdpa", torch.float32)
        out = network(*given)
        out.square().mean().backward()
        results.append([out, *(one.grad for branch in branches.values() for one in branch.parameters())])
    for one, other in zip(*results, strict=True):
        assert (one - other).norm() <= 1e-4 * other.norm() + 1e-8
    assert record.graph_breaks == 0 and record.graphs == record.programs  # none for each block


def test_random_numbers_that_others_draw_are_the_same_when_a_block_is_computed_again():
    """torch's dropout in a replaced forward, under gradient checkpointing: the gradients are those without."""
    ours = our_unet(SD2_LIKE)
    branches = put_low_rank_on(ours, layers_with_weights(ours))
    given, _ = inputs(SD2_LIKE)
    found = []
    for branch in branches.values():
        nn.init.normal_(branch.up.weight, std=0.1)
        branch.up.register_forward_pre_hook(lambda module, x: nn.functional.dropout(x[0], 0.5))
    for checkpointing in (False, True):
        ours.enable_gradient_checkpointing(checkpointing)
        torch.manual_seed(3)
        ours(*given).square().mean().backward()
        found.append([one.grad for branch in branches.values() for one in branch.parameters()])
        for branch in branches.values():
            branch.zero_grad()
    assert all(torch.equal(one, other) for one, other in zip(*found, strict=True))
