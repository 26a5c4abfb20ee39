"""The U-Net in two halves, with what a ControlNet adds between them, against diffusers' U-Net."""

import copy

import pytest
import torch

from library.models.compiled import compile_blocks
from library.models.files.key_maps import unet_to_diffusers
from test.models.unets import CONFIGS, SD2_LIKE, diffusers_unet, inputs, our_unet, relative


def residuals_for(network, given, seed=4):
    """Random ones of the skip connections' and the middle's shapes, which ask for gradients."""
    x, t, context, vector = given
    with torch.no_grad():
        middle, skips = network.encode(x, network.embed(t, vector, x.dtype), context)
    torch.manual_seed(seed)
    made = [0.5 * torch.randn_like(one) for one in (*skips, middle)]
    return [one.requires_grad_(True) for one in made]


def gradients(out, wanted):
    target = torch.randn(out.shape, generator=torch.Generator().manual_seed(9))
    return torch.autograd.grad((out - target).square().mean(), wanted)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", CONFIGS)
def test_outputs_and_all_gradients_are_those_of_diffusers_with_the_same_residuals(kind, checkpointing):
    config = CONFIGS[kind]
    ours = our_unet(config)
    theirs = diffusers_unet(config, ours)
    given, (their_given, added) = inputs(config, 8, 12)
    *skips, middle = residuals_for(ours, given)
    ours.enable_gradient_checkpointing(checkpointing)
    found = ours(*given, skip_residuals=skips, middle_residual=middle)
    expected = theirs(
        *their_given,
        added_cond_kwargs=added,
        down_block_additional_residuals=tuple(skips),
        mid_block_additional_residual=middle,
    ).sample
    assert relative(found, expected) < 1e-4
    assert relative(found, ours(*given)) > 1e-2

    names = unet_to_diffusers(config)
    theirs_by_name = dict(theirs.named_parameters())
    parameters = dict(ours.named_parameters())
    found_gradients = gradients(found, [*skips, middle, *parameters.values()])
    expected_gradients = gradients(expected, [*skips, middle, *(theirs_by_name[names[name]] for name in parameters)])
    rounding = 1e-7 * float(torch.stack([one.norm() for one in expected_gradients]).norm())
    assert all(
        (one - other).norm() <= 1e-4 * other.norm() + rounding
        for one, other in zip(found_gradients, expected_gradients, strict=True)
    )
    assert all(one.any() for one in found_gradients[: len(skips) + 1])


def test_the_two_halves_are_the_whole_bit_for_bit():
    ours = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    x, t, context, vector = given
    whole = ours(*given)
    emb = ours.embed(t, vector, x.dtype)
    middle, skips = ours.encode(x, emb, context)
    assert len(skips) == len(ours.output_blocks)
    assert torch.equal(ours.decode(middle, skips, emb, context), whole)
    assert skips == []


def test_compiled_blocks_take_residuals_too():
    ours = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    *skips, middle = residuals_for(ours, given)
    compiled = copy.deepcopy(ours)
    compile_blocks(compiled, "aot_eager", "sdpa", torch.float32)
    found, expected = (network(*given, skip_residuals=skips, middle_residual=middle) for network in (compiled, ours))
    assert relative(found, expected) < 1e-4


def test_residuals_for_some_skip_connections_only_are_refused():
    ours = our_unet(SD2_LIKE)
    given, _ = inputs(SD2_LIKE)
    *skips, middle = residuals_for(ours, given)
    assert relative(ours(*given, middle_residual=middle), ours(*given)) > 1e-3
    with pytest.raises(ValueError, match=f"{len(skips) - 1} residuals for {len(skips)} skip connections"):
        ours(*given, skip_residuals=skips[1:])
