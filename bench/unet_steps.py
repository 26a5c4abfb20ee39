"""The training step that benchmarks take: our U-Net and diffusers', of the same sizes and weights, on the same batch.

Forward, mean squared error, backward, clipping of the gradients' norm to 1, AdamW, the learning rate's schedule. Ours
takes what follows the loss by the trainer's own classes, diffusers' as in its train_text_to_image_sdxl.py.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from torch.utils.flop_counter import FlopCounterMode

from library import device as devices
from library.models.compiled import compile_blocks
from library.models.files.diffusers_config import unet_config_to_diffusers
from library.models.files.key_maps import rename, unet_to_diffusers
from library.models.unet import UNet, UNetConfig, size_embedding
from library.training.engine.fused_backward import FusedBackward
from library.training.engine.optimizers import ParameterGroup, make_optimizer
from library.training.engine.sharding import Replicated

SIZE_WIDTH = 6 * 256
TINY = UNetConfig(
    model_channels=64, channel_mult=(1, 1), transformer_depth=(0, 1), transformer_depth_middle=1, context_dim=64,
    adm_in_channels=64 + SIZE_WIDTH,
)  # fmt: skip
SMALL = UNetConfig(
    model_channels=64,
    transformer_depth=(0, 1, 2),
    transformer_depth_middle=2,
    context_dim=192,
    adm_in_channels=128 + SIZE_WIDTH,
)
MIDDLE = UNetConfig(
    model_channels=128,
    transformer_depth=(0, 2, 4),
    transformer_depth_middle=4,
    context_dim=768,
    adm_in_channels=512 + SIZE_WIDTH,
)
# configuration, latent rows and columns, batch
SIZES = {
    "tiny": (TINY, (8, 8), 1),
    "small": (SMALL, (16, 16), 8),
    "middle": (MIDDLE, (32, 32), 2),
    "full": (UNetConfig(), (128, 128), 1),
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_TOKENS = 77
LEARNING_RATE = 1e-5
MAX_GRAD_NORM = 1.0
KINDS = ("ours", "diffusers")
FUSED = "ours fused"
COMPILED = ("ours compiled", "diffusers compiled")


@dataclass(frozen=True)
class Case:
    """The settings of a measurement."""

    config: UNetConfig
    latent_hw: tuple[int, int]
    batch: int
    dtype: torch.dtype
    device: torch.device
    gradient_checkpointing: bool
    dynamo_backend: str | None = None  # compiled networks are measured, too
    fused_backward_pass: bool = False  # and ours with the optimizer in backward
    no_update: bool = False  # forward and backward alone
    optimizer_type: str = "AdamW"  # of ours, as --optimizer_type takes it
    optimizer_args: tuple[str, ...] = ()

    @property
    def kinds(self) -> tuple[str, ...]:
        """The names of the networks that take steps in turns."""
        fused = (FUSED,) if self.fused_backward_pass else ()
        return (*KINDS, *fused, *(() if self.dynamo_backend is None else COMPILED))


@dataclass(frozen=True)
class Inputs:
    """One batch: noised latents, timesteps, text states, pooled text, sizes, and the target."""

    x_BCHW: Tensor
    t_B: Tensor
    context_BTX: Tensor
    pooled_BP: Tensor
    sizes_B6: Tensor
    target_BCHW: Tensor


def make_inputs(case: Case) -> Inputs:
    """The same random batch every time."""
    torch.manual_seed(1)
    batch, (rows, columns) = case.batch, case.latent_hw
    latents = (batch, case.config.in_channels, rows, columns)
    tensors = (
        torch.randn(latents),
        torch.randint(0, 1000, (batch,)),
        torch.randn(batch, TEXT_TOKENS, case.config.context_dim),
        torch.randn(batch, (case.config.adm_in_channels or SIZE_WIDTH) - SIZE_WIDTH),
        torch.randint(0, 2048, (batch, 6)).float(),
        torch.randn(latents),
    )
    return Inputs(*(tensor.to(case.device) for tensor in tensors))


def weights(case: Case) -> dict[str, Tensor]:
    """Random weights by Stability's names; no layer is zero, as after training. Empty on the meta device."""
    with torch.device("meta"):
        empty = UNet(case.config).state_dict()
    if case.device.type == "meta":
        return empty
    shapes = {name: tensor.shape for name, tensor in empty.items()}
    generator = torch.Generator(case.device).manual_seed(2)
    return {
        name: torch.randn(shape, generator=generator, device=case.device).mul_(0.02) for name, shape in shapes.items()
    }


def model_flops(case: Case) -> int:
    """Floating-point operations of a step by its mathematics: backward is two forwards."""
    with torch.device("meta"):
        network, batch = UNet(case.config), make_inputs(replace(case, device=torch.device("meta")))
        vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
        with FlopCounterMode(display=False) as counter, torch.no_grad():
            network(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)
    return 3 * counter.get_total_flops()


@dataclass(frozen=True)
class TrainStep:
    """A network and the two halves of a step; a call takes a whole step and returns the loss."""

    network: nn.Module
    optimizer: torch.optim.Optimizer | None
    forward_backward: Callable[[], Tensor]
    update: Callable[[], None]

    def __call__(self) -> Tensor:
        loss = self.forward_backward()
        self.update()
        return loss

    def state_bytes(self) -> int:
        """Bytes of the weights and of the optimizer's state after a step."""
        by_parameter = self.optimizer.state.values() if self.optimizer is not None else ()
        states = [value for state in by_parameter for value in state.values()]
        kept = [*self.network.parameters(), *(value for value in states if isinstance(value, Tensor))]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept)


Halves = tuple[torch.optim.Optimizer | None, Callable[[Tensor], None], Callable[[], None]]


def without_update(network: nn.Module) -> Halves:
    """Backward only, which frees each gradient at once: for devices that hold only the weights."""

    def drop(parameter: Tensor) -> None:
        parameter.grad = None

    for parameter in network.parameters():
        parameter.register_post_accumulate_grad_hook(drop)
    return None, Tensor.backward, lambda: None


def of_example(network: nn.Module) -> Halves:
    """torch's AdamW with its defaults, backward, and the rest of a step, as diffusers' example has them."""
    parameters = list(network.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=LEARNING_RATE, weight_decay=1e-2)
    schedule = LambdaLR(optimizer, lambda step: 1.0)

    def update() -> None:
        nn.utils.clip_grad_norm_(parameters, MAX_GRAD_NORM)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()

    return optimizer, Tensor.backward, update


def of_trainer(kind: str, case: Case, network: nn.Module) -> Halves:
    """The halves of a step by the trainer's classes; with the optimizer in backward only the norm remains after it."""
    fused = kind == FUSED
    parallel = (partial(FusedBackward, max_grad_norm=MAX_GRAD_NORM) if fused else Replicated)(
        Accelerator(cpu=devices.is_cpu(case.device)),
        network,
        [ParameterGroup("unet", list(network.parameters()), LEARNING_RATE)],
        lambda groups: make_optimizer(case.optimizer_type, groups, case.optimizer_args),
        lambda optimizer: LambdaLR(optimizer, lambda step: 1.0),
    )

    def update() -> None:
        parallel.clip(MAX_GRAD_NORM)
        if not fused:
            parallel.optimizer.step()
        parallel.schedule.step()
        parallel.zero_grad()

    return parallel.own_optimizer, parallel.backward, update


Forward = Callable[[Inputs], Tensor]


def make_network(kind: str, case: Case) -> tuple[nn.Module, Forward]:
    """Ours or diffusers' network and its prediction of a batch; its blocks compiled if the kind says so."""
    if kind.startswith("ours"):
        with torch.device("meta"):
            ours = UNet(case.config)
        ours.load_state_dict(weights(case), assign=True)
        ours.requires_grad_(True).enable_gradient_checkpointing(case.gradient_checkpointing)
        if kind in COMPILED:
            compile_blocks(ours, str(case.dynamo_backend), "sdpa", case.dtype)

        def predict(batch: Inputs) -> Tensor:
            vector_BV = torch.cat([batch.pooled_BP, size_embedding(batch.sizes_B6)], dim=1)
            return ours(batch.x_BCHW, batch.t_B, batch.context_BTX, vector_BV)

        return ours, predict

    from diffusers import UNet2DConditionModel

    with torch.device("meta"):
        theirs = UNet2DConditionModel.from_config(unet_config_to_diffusers(case.config))
    theirs.load_state_dict(rename(weights(case), unet_to_diffusers(case.config)), assign=True)
    if case.gradient_checkpointing:
        theirs.enable_gradient_checkpointing()
    network = theirs.requires_grad_(True).train()
    if kind in COMPILED:
        theirs.compile_repeated_blocks(backend=case.dynamo_backend)

    def predict_by_theirs(batch: Inputs) -> Tensor:
        added = {"text_embeds": batch.pooled_BP, "time_ids": batch.sizes_B6}
        return theirs(batch.x_BCHW, batch.t_B, batch.context_BTX, added_cond_kwargs=added).sample

    return network, predict_by_theirs


def make_step(kind: str, case: Case) -> TrainStep:
    """A network with its optimizer, ready to train."""
    network, predict = make_network(kind, case)
    if case.no_update:
        optimizer, backward, update = without_update(network)
    else:
        optimizer, backward, update = (
            of_trainer(kind, case, network) if kind.startswith("ours") else of_example(network)
        )
    batch = make_inputs(case)

    def forward_backward() -> Tensor:
        with torch.autocast(case.device.type, dtype=case.dtype, enabled=case.dtype != torch.float32):
            prediction = predict(batch)
        loss = F.mse_loss(prediction.float(), batch.target_BCHW)
        backward(loss)
        return loss.detach()

    return TrainStep(network, optimizer, forward_backward, update)
