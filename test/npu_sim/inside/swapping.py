"""--blocks_to_swap against training without it, bit for bit, and the device's byte counters, in a child process
(test/test_npu_sim.py starts it).
"""

import copy
import gc
from functools import partial

import pytest
import torch
from accelerate.state import AcceleratorState
from torch import nn

from library.models.unet import UNet, UNetConfig
from library.training.engine.block_swap import HostBlocks, move_all_but
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import ParameterGroup, make_lr_schedule, make_optimizer, set_schedule
from library.training.engine.precision import make_accelerator
from library.training.engine.sharding import shard
from library.training.engine.swapped_backward import SwappedBlocks, SwappedFusedBackward
from library.training.memory.estimate import estimate
from library.training.memory.resident import Training
from library.training.state.tensor_rows import saved_parts
from test.models.low_rank import put_low_rank_on

NPU = torch.device("npu", 0)
ADAMW, ADAFACTOR = ("AdamW", []), ("AdaFactor", ["relative_step=False", "scale_parameter=False"])
TINY = UNetConfig(
    model_channels=32, channel_mult=(1, 2), num_res_blocks=1, transformer_depth=(0, 1), transformer_depth_middle=2,
    context_dim=32, adm_in_channels=32 + 6 * 256, num_head_channels=32,
)  # fmt: skip
STEPS, BLOCKS = 2, 13


class Network(nn.Module):
    """A U-Net and the loss of a step's random sample."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.unet = UNet(TINY)
        self.unet.set_attention_backend("math")  # as the simulated device has it
        for parameter in self.unet.parameters():  # a new model's branches end in zeros, behind which nothing differs
            nn.init.normal_(parameter, std=0.05)

    def sharding_units(self):
        return []

    def forward(self, device, step=0, side=8):
        random = torch.Generator().manual_seed(step)

        def made(*shape):
            drawn = torch.randn(*shape, generator=random)
            return drawn.to(device)

        predicted = self.unet(made(2, 4, side, side), made(2).abs() * 900, made(2, 77, 32), made(2, 32 + 6 * 256))
        return (predicted.float() - made(2, 4, side, side)).square().mean()


def parallel_of(
    network, swap, fused=False, optimizer=ADAMW, precision="no", max_grad_norm=0.05, parameters=nn.Module.parameters
):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(precision)
    network = copy.deepcopy(network)
    chosen = [network.unet.blocks()[number] for number in swap]
    blocks = HostBlocks(chosen, NPU) if swap else None
    move_all_but(network, NPU, blocks.parameters if blocks else ())
    rest = (
        accelerator, network, [ParameterGroup("unet", list(parameters(network)), 1e-2)],
        lambda groups, **_: make_optimizer(optimizer[0], groups, optimizer[1]),
        lambda optimizer: make_lr_schedule("linear", optimizer, STEPS, 0, 1, 1.0),
    )  # fmt: skip
    if swap and fused:
        return SwappedFusedBackward(*rest, max_grad_norm=max_grad_norm, host_blocks=blocks)
    if swap:
        return SwappedBlocks(*rest, host_blocks=blocks)
    return FusedBackward(*rest, max_grad_norm) if fused else shard("none", *rest)


def train(parallel, max_grad_norm=0.05, accumulation=1, steps=range(STEPS)):
    """Losses, norms and, of the last step, what the gradients were."""
    found = []
    for step in steps:
        for micro in range(accumulation):
            loss = parallel.module(NPU, step * accumulation + micro) / accumulation
            parallel.backward(loss)
        found += [float(loss.detach()), float(parallel.clip(max_grad_norm))]
        found += [parameter.grad.cpu() for parameter in parallel.parameters if parameter.grad is not None]
        parallel.optimizer.step()
        parallel.schedule.step()
        parallel.zero_grad()
    return found


def same(one, other):
    return len(one) == len(other) and all(
        torch.equal(a.cpu(), b.cpu()) if torch.is_tensor(a) else a == b for a, b in zip(one, other, strict=True)
    )


def numbers(parallel):
    """Weights and the optimizer's state, by name."""
    return [
        value
        for name, part in sorted(parallel.own_parts().items())
        for value in (part["weight"], *(part["state"][key] for key in sorted(part["state"])))
    ]


KEPT, RECOMPUTED, SOME = (), range(BLOCKS), range(0, BLOCKS, 2)
CASES = [
    (False, ADAMW, 1, "no", range(BLOCKS)),
    (False, ADAFACTOR, 2, "no", [1, 4, 5, 9]),
    (True, ADAMW, 1, "no", [0, 6, 7, 10]),
    (True, ADAFACTOR, 1, "no", range(BLOCKS)),
    (False, ADAMW, 2, "fp16", [3, 4, 8]),
    (True, ADAMW, 1, "bf16", [5]),
]
QUICK = [*zip(CASES, (KEPT, SOME, RECOMPUTED, SOME, RECOMPUTED, KEPT), strict=True)]


@pytest.mark.parametrize(
    ("fused", "optimizer", "accumulation", "precision", "swap", "checkpointed"),
    [
        *((*case, checkpointed) for case, checkpointed in QUICK),
        *(
            pytest.param(*case, checkpointed, marks=pytest.mark.all)
            for case in CASES
            for checkpointed in (KEPT, RECOMPUTED, SOME)
            if (case, checkpointed) not in QUICK
        ),
    ],
)
def test_it_is_the_training_without_bit_for_bit(fused, optimizer, accumulation, precision, swap, checkpointed):
    network = Network()
    assert len(network.unet.blocks()) == BLOCKS
    network.unet.checkpoint_blocks(checkpointed)
    plain, swapped = (parallel_of(network, chosen, fused, optimizer, precision) for chosen in ((), swap))
    found = []
    for parallel in (plain, swapped):
        found.append(train(parallel, accumulation=accumulation))
        with torch.no_grad():  # validation and sample pictures: forward alone
            found[-1].append(float(parallel.module(NPU, 99)))
    assert same(*found)
    assert same(numbers(plain), numbers(swapped))
    for parameter in swapped.host_blocks.parameters:
        state = swapped.bare_optimizer.state[parameter].values()
        assert parameter.is_cpu and parameter.is_pinned() and all(one.is_cpu for one in state if torch.is_tensor(one))


@pytest.mark.parametrize("swap_first", [True, False])
def test_a_state_goes_on_with_and_without(swap_first):
    network, chosen = Network(), ([2, 6, 7], ())
    whole, first, then = (parallel_of(network, swap) for swap in ((), chosen[not swap_first], chosen[swap_first]))
    train(whole)
    train(first, steps=range(1))
    then.read_parts(saved_parts([copy.deepcopy(first.own_parts())]))
    set_schedule(then.schedule.scheduler, 1)
    train(then, steps=range(1, STEPS))
    assert same(numbers(whole), numbers(then))


def test_averages_are_those_without_and_can_stand_in_the_weights_place():
    plain, swapped = (parallel_of(Network(), swap) for swap in ((), [2, 6, 7]))
    losses = []
    for parallel in (plain, swapped):
        parallel.keep_averages(0.9)
        for step in range(STEPS):
            train(parallel, steps=[step])
            parallel.averages.update()
        with parallel.averages_in_place(), torch.no_grad():
            losses.append(float(parallel.module(NPU, 99)))
    assert losses[0] == losses[1]
    assert same(list(plain.averages.averages.values()), list(swapped.averages.averages.values()))
    assert same(numbers(plain), numbers(swapped))


def test_what_forward_saves_for_backward_holds_no_weights():
    held, sizes = [], []
    for swap in ((), range(BLOCKS)):
        network = Network()
        sizes = [4 * sum(one.numel() for one in block.parameters()) for block in network.unet.blocks()]
        gc.collect()  # what other tests have left in cycles must not go in between
        before = torch.npu.memory_allocated()
        parallel = parallel_of(network, swap)
        loss = parallel.module(NPU)
        held.append(torch.npu.memory_allocated() - before)
        del loss, parallel
    assert held[0] - held[1] == sum(sizes[:-1])  # the last one stays: backward begins with it


@pytest.mark.parametrize(("checkpointing", "fused"), [(True, True), (False, False)])
def test_the_device_holds_less_and_what_is_estimated(checkpointing, fused):
    peaks, at_rest, sizes = {}, {}, []
    for swap in ((), (5, 6, 7), tuple(range(BLOCKS))):
        network = Network()
        network.unet.enable_gradient_checkpointing(checkpointing)
        swapped = [list(network.unet.blocks()[number].parameters()) for number in swap]
        sizes = [4 * sum(one.numel() for one in block.parameters()) for block in network.unet.blocks()]
        make = partial(make_optimizer, "AdamW", arguments=[])
        training = Training(make, fused_backward=fused, swapped=swapped, fused_geglu=True)
        predicted = estimate(
            network, nn.Identity(), torch.float32, lambda shapes: shapes("meta"), lambda shapes: None, training
        )
        gc.collect()  # what earlier tests left in cycles would be freed in the midst of the measurement
        before = torch.npu.memory_allocated()
        parallel = parallel_of(network, swap, fused)
        train(parallel, steps=[0])
        at_rest[swap] = torch.npu.memory_allocated() - before
        torch.npu.reset_peak_memory_stats()
        train(parallel, steps=[1])
        peaks[swap] = torch.npu.max_memory_allocated() - before
        assert predicted.total == pytest.approx(peaks[swap], rel=0.1)
        del parallel
    moved = sum(sizes[number] for number in (5, 6, 7))
    # Weights and both moments, and in the ordinary pass gradients, too.
    assert at_rest[()] - at_rest[5, 6, 7] == pytest.approx(3 * moved, rel=0.01)
    assert peaks[()] - peaks[5, 6, 7] > (2 if fused else 3) * moved
    assert peaks[tuple(range(BLOCKS))] < peaks[5, 6, 7]


class Branched(Network):
    """The same network, all of it frozen, with low-rank branches on some of its layers, which train."""

    def __init__(self, paths):
        super().__init__()
        self.branches = nn.ModuleList(put_low_rank_on(self.unet, paths).values())
        for branch in self.branches:
            nn.init.normal_(branch.up.weight, std=0.05)


BRANCHES = {
    "first block, middle and last": (
        "input_blocks.1.0.in_layers.2", "middle_block.1.transformer_blocks.1.attn1.to_q",
        "middle_block.1.transformer_blocks.1.ff.net.2", "output_blocks.3.0.emb_layers.1",
    ),
    "from the middle on": ("middle_block.1.transformer_blocks.0.attn2.to_k", "middle_block.2.out_layers.3"),
    "time embedding": ("time_embed.2", "output_blocks.0.1.proj_in"),
}  # fmt: skip


@pytest.mark.parametrize("branches", BRANCHES)
@pytest.mark.parametrize("checkpointed", [(), range(BLOCKS)])
def test_a_frozen_network_trains_its_branches_as_without_and_gives_its_blocks_back(monkeypatch, branches, checkpointed):
    """A frozen weight never has a gradient: a block's weights go when the gradients of its inputs are made."""
    on_device = []
    start = HostBlocks._start_backward

    def watched(self, place, gradient):
        start(self, place, gradient)
        on_device.append(sum(block._there is not None for block in self._blocks))

    monkeypatch.setattr(HostBlocks, "_start_backward", watched)
    network = Branched(BRANCHES[branches])
    network.unet.checkpoint_blocks(checkpointed)
    found = []
    for swap in ((), range(BLOCKS)):
        parallel = parallel_of(network, swap, parameters=lambda network: list(network.branches.parameters()))
        found.append([*train(parallel, accumulation=2), *numbers(parallel)])
        with torch.no_grad():
            found[-1].append(float(parallel.module(NPU, 99)))
    assert same(*found) and len(found[0]) > 10
    assert 1 <= max(on_device) <= 2  # the one that computes and the next one
    assert all(parameter.is_cpu and parameter.grad is None for parameter in parallel.host_blocks.parameters)


@pytest.mark.parametrize("fused", [False, True])
def test_weights_of_which_some_are_frozen_stay_until_the_blocks_backward_is_done(fused):
    """What trains lies behind what is frozen, so its gradient is made while the rest of the block is not done."""
    network = Network()
    network.unet.requires_grad_(False)
    for block in network.unet.blocks():
        for name, parameter in block.named_parameters():
            parameter.requires_grad_(name.startswith(("out_layers.3", "ff.net.2")))
    wanted = lambda network: [one for one in network.parameters() if one.requires_grad]  # noqa: E731
    plain, swapped = (parallel_of(network, swap, fused, parameters=wanted) for swap in ((), range(BLOCKS)))
    assert same(train(plain), train(swapped)) and same(numbers(plain), numbers(swapped))


def test_a_frozen_block_goes_before_blocks_that_are_not_swapped_have_their_backward():
    network = Branched(BRANCHES["first block, middle and last"])
    parallel = parallel_of(network, [7], parameters=lambda network: list(network.branches.parameters()))
    (block,), at_home = parallel.host_blocks._blocks, []
    first = parallel.bare_module.unet.input_blocks[1]

    def watch(module, inputs, out):
        out.register_hook(lambda _: at_home.append((block.is_here, block._there)))

    first.register_forward_hook(watch)
    loss = parallel.module(NPU)
    assert not block.is_here  # it is the first one that backward needs
    parallel.backward(loss)
    assert at_home == [(True, None)]
