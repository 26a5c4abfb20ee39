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


def parallel_of(network, swap, fused=False, optimizer=ADAMW, precision="no", max_grad_norm=0.05):
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = make_accelerator(precision)
    network = copy.deepcopy(network)
    chosen = [network.unet.blocks()[number] for number in swap]
    blocks = HostBlocks(chosen, NPU) if swap else None
    move_all_but(network, NPU, blocks.parameters if blocks else ())
    rest = (
        accelerator, network, [ParameterGroup("unet", list(network.parameters()), 1e-2)],
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
    then.read_parts([copy.deepcopy(first.own_parts())])
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
        training = Training(partial(make_optimizer, "AdamW", arguments=[]), fused_backward=fused, swapped=swapped)
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
