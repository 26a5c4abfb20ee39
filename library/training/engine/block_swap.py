"""Blocks whose weights live in the CPU's memory and are on the device only while they compute (--blocks_to_swap).

A block's weights are copied to the device before it computes, in forward, in recomputation and in backward, the next
swapped block's meanwhile on a stream beside; they are not copied back, for nothing there changes them. In backward they
stay until all their gradients are made. A frozen weight never has a gradient: a block with frozen weights stays until
the gradient of its input is made.
Gradients are copied to the CPU as they are made. Between passes weights and gradients of these blocks are the CPU's, so
whatever the optimizer keeps for them is, too, and so is its update, as in ZeRO-Offload (Ren et al. 2021, 2101.06840).
"""

from collections.abc import Callable, Collection, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library import device as devices
from library.training.engine.swap_schedule import next_wanted


def move_all_but(module: nn.Module, device: torch.device, staying: Collection[Tensor]) -> None:
    """Move a module to a device, but for some of its parameters."""
    stay = {id(tensor) for tensor in staying}
    for tensor in (*module.parameters(), *module.buffers()):
        if id(tensor) not in stay:
            tensor.data = tensor.data.to(device)


class _Block:
    """One block: where its weights are."""

    def __init__(self, module: nn.Module, streams: devices.CopyStream) -> None:
        self.module, self._streams = module, streams
        self.parameters = list(module.parameters())
        self.trained = [parameter for parameter in self.parameters if parameter.requires_grad]
        self.has_frozen = len(self.trained) < len(self.parameters)
        for parameter in self.parameters:
            parameter.data = parameter.data.pin_memory()
        self._home = [parameter.data for parameter in self.parameters]
        self._there: tuple[list[Tensor], Any] | None = None  # on the device or on their way, and when they have come
        self._gradients: list[Tensor | None] = []
        self.is_here = True  # in the CPU's memory
        self.in_backward = False
        self.backward_follows = False  # the last forward is part of a graph
        self.missing = 0  # gradients that backward has not made yet
        self.forward_context = ExitStack()

    def fetch(self) -> None:
        """Have the weights copied, without waiting."""
        if self._there is None:
            self._there = self._streams.to_device(self._home)

    def arrive(self) -> None:
        """The weights are the device's for what is launched from now on."""
        if not self.is_here:
            return
        self.fetch()
        assert self._there is not None
        weights, come = self._there
        self._streams.wait(come, weights)
        # A gradient of an earlier micro-batch stays behind: autograd would add to it on the device.
        self._gradients = [parameter.grad for parameter in self.parameters]
        for parameter, weight in zip(self.parameters, weights, strict=True):
            parameter.grad = None
            parameter.data = weight
        self.is_here = False

    def leave(self) -> None:
        """The weights are the CPU's again; the device's copies go once nothing there needs them."""
        self._there = None
        if self.is_here:
            return
        for parameter, home, gradient in zip(self.parameters, self._home, self._gradients, strict=True):
            parameter.data = home
            parameter.grad = gradient
        self._gradients = []
        self.is_here = True

    def pack(self, saved: Tensor) -> Any:
        """What stands for a tensor that forward saves for backward: of a weight, or a view of it, no memory."""
        if self._there is not None:
            storage = saved.untyped_storage()._cdata
            for place, weight in enumerate(self._there[0]):
                if weight.untyped_storage()._cdata == storage:
                    return place, saved.size(), saved.stride(), saved.storage_offset()
        return saved

    def unpack(self, packed: Any) -> Tensor:
        """The tensor, of the weights that are on the device now."""
        if isinstance(packed, Tensor):
            return packed
        place, size, stride, offset = packed
        assert self._there is not None, "backward of a swapped block without its weights"
        return self._there[0][place].as_strided(size, stride, offset)


class HostBlocks:
    """The swapped blocks of a network, moved by hooks on their modules."""

    def __init__(self, modules: Sequence[nn.Module], device: torch.device) -> None:
        """
        Args:
            modules: in the order in which they compute, once each a pass, with tensors as inputs and one as output;
                each computes from what those before it made. Still on the CPU; what is frozen now stays frozen.
            device: what computes; not the CPU.
        """
        streams = devices.CopyStream(device)
        self._streams = streams
        self._blocks = [_Block(module, streams) for module in modules]
        self._coming: list[tuple[nn.Parameter, Tensor, Any]] = []  # gradients on their way to the CPU
        self._ready: Callable[[nn.Parameter], None] = lambda parameter: None
        self._arrived: Callable[[nn.Parameter], None] = lambda parameter: None
        for place, block in enumerate(self._blocks):
            block.module.register_forward_pre_hook(partial(self._before_forward, place))
            block.module.register_forward_hook(partial(self._after_forward, place), always_call=True)
            for parameter in block.trained:
                parameter.register_post_accumulate_grad_hook(partial(self._take_gradient, place))

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All weights that live in the CPU's memory."""
        return [parameter for block in self._blocks for parameter in block.parameters]

    def on_gradients(
        self, ready: Callable[[nn.Parameter], None], arrived: Callable[[nn.Parameter], None] = lambda parameter: None
    ) -> None:
        """Have functions called with a parameter: when its gradient is made, and when both are in the CPU's memory."""
        self._ready, self._arrived = ready, arrived

    def settle(self) -> None:
        """After a pass: all weights and gradients are in the CPU's memory."""
        for block in self._blocks:
            block.leave()
            block.in_backward = block.backward_follows = False
        self._receive()

    def _before_forward(self, place: int, module: Any, inputs: tuple[Tensor, ...]) -> None:
        block = self._blocks[place]
        block.arrive()
        if block.in_backward:  # computed again; it stays until its gradients are made
            return
        block.forward_context.close()
        # Autocast would keep half copies of the weights until the pass has ended.
        block.forward_context.enter_context(devices.autocast_cache_off())
        if torch.is_grad_enabled() and not module.checkpointing:
            block.forward_context.enter_context(torch.autograd.graph.saved_tensors_hooks(block.pack, block.unpack))
        self._fetch(next_wanted(place, len(self._blocks), False, torch.is_grad_enabled()))
        if block.has_frozen and torch.is_grad_enabled() and inputs[0].requires_grad:
            inputs[0].register_hook(lambda _: self._finish(block))

    def _after_forward(self, place: int, module: Any, _: Any, output: Any) -> None:
        block = self._blocks[place]
        if block.in_backward:
            return
        block.forward_context.close()
        block.backward_follows = follows = isinstance(output, Tensor) and output.requires_grad
        if follows:
            output.register_hook(partial(self._start_backward, place))
        if next_wanted(place, len(self._blocks), False, follows) != place:
            block.leave()

    def _start_backward(self, place: int, _: Tensor) -> None:
        if place + 1 < len(self._blocks):
            self._finish(self._blocks[place + 1])  # what a block computes from has its gradient after the block
        block = self._blocks[place]
        block.in_backward = True
        block.missing = len(block.trained)
        block.arrive()
        coming = next_wanted(place, len(self._blocks), True)
        if coming is not None and self._blocks[coming].backward_follows:  # not in front of all that trains
            self._fetch(coming)

    def _fetch(self, place: int | None) -> None:
        if place is not None:
            self._blocks[place].fetch()

    @torch.no_grad()
    def _take_gradient(self, place: int, parameter: nn.Parameter) -> None:
        self._ready(parameter)
        gradient = parameter.grad
        assert gradient is not None
        self._coming.append((parameter, *self._streams.to_host(gradient)))
        parameter.grad = None
        block = self._blocks[place]
        block.missing -= 1
        if not block.missing and not block.has_frozen:
            self._finish(block)

    def _finish(self, block: _Block) -> None:
        """Backward of the block is done: its weights go."""
        if block.in_backward:
            self._receive(but=block)  # of blocks before; this one's are on their way
            block.in_backward = False
            block.leave()

    @torch.no_grad()
    def _receive(self, but: _Block | None = None) -> None:
        """Add the gradients that are on their way to what their parameters have."""
        own = {id(parameter) for parameter in but.parameters} if but else set()
        coming, self._coming = self._coming, [one for one in self._coming if id(one[0]) in own]
        for parameter, gradient, come in coming:
            if id(parameter) in own:
                continue
            come.synchronize()
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.add_(gradient)
            self._arrived(parameter)
