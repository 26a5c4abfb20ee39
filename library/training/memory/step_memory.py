"""A run's training step on shapes alone: what it needs in memory at a bucket, and which blocks it computes again.

Legend: B batch, C channels, H W latent rows and columns.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from library import device as devices
from library.models.text import Tokens
from library.models.vae import encode_images, latent_shape
from library.options.training import TrainingOptions
from library.training.engine.bf16_update import bf16_update
from library.training.engine.optimizers import make_optimizer
from library.training.engine.placement import Placement
from library.training.engine.sharding import sharding_kind
from library.training.memory.checkpoint_policy import choose_checkpoints
from library.training.memory.estimate import GIB, MemoryEstimate, estimator
from library.training.memory.resident import Training


class StepMemory:
    """The memory of a run's step, as its options have it."""

    def __init__(
        self,
        options: TrainingOptions,
        placement: Placement,
        vae: Any,
        tokens: Tokens,
        device: torch.device,
        processes: int,
        seed: int,
    ) -> None:
        """
        Args:
            tokens: of one micro-batch of captions; only their shapes are used.
            device: the one that will train, also in a dry run, whose module stays on the CPU.
        """
        self._options, self._placement, self._vae = options, placement, vae
        self._tokens = Tokens(tuple(ids_BKL.to("meta") for ids_BKL in tokens.ids))
        self._fused, self._fused_geglu = devices.has_fused_attention(device), devices.has_fused_geglu(device)
        self._processes, self._seed = processes, seed

    def lines(self, bucket_wh_px: tuple[int, int]) -> list[str]:
        """What a step needs at a bucket's width and height, for --dry_run."""
        _, predict = self._on_shapes(bucket_wh_px)
        return predict().lines()

    def choose_checkpoints(self, bucket_wh_px: tuple[int, int]) -> list[str]:
        """With --checkpoint_policy=auto recompute only what a bucket of that width and height needs for the limit.

        Returns:
            Lines for the log; none where there is no limit.
        """
        memory = self._options.memory
        if memory.checkpoint_memory_gb is None:
            return []
        step, predict = self._on_shapes(bucket_wh_px)
        limit = memory.checkpoint_memory_gb * GIB
        return choose_checkpoints(self._placement.module, self._placement.compute_dtype, step, predict, limit)

    def _on_shapes(self, bucket_wh_px: tuple[int, int]) -> tuple[Callable[[Any], Tensor], Callable[[], MemoryEstimate]]:
        """A step of a data-less copy of the module, and the estimate of its memory."""
        width, height = bucket_wh_px
        module, batch = self._placement.module, self._options.data.train_batch_size
        noisy_BCHW = torch.empty(batch, *latent_shape(self._vae, height, width), device="meta")

        def step(shapes: Any) -> Tensor:
            # "sdpa" stands for any fused kernel; written out, attention holds what "math" does.
            shapes.unet.set_attention_backend("sdpa" if self._fused else "math")
            t_B, size_ids_B6 = torch.zeros(batch, device="meta"), torch.zeros(batch, 6, device="meta")
            return shapes(noisy_BCHW, t_B, self._tokens, size_ids_B6).float().mean()

        def encode(shapes: nn.Module) -> Tensor:
            return encode_images(shapes, torch.empty(batch, height, width, 3, dtype=torch.uint8, device="meta"))

        optimizer, memory, ema = self._options.optimizer, self._options.memory, self._options.ema
        compiled = self._options.compiling.torch_compile
        training = Training(
            partial(
                make_optimizer,
                optimizer.optimizer_type,
                arguments=optimizer.optimizer_args,
                bf16=bf16_update(self._options.precision, self._seed),
            ),
            sharding_kind(optimizer.sharding, optimizer.optimizer_type),
            self._processes,
            memory.fused_backward_pass,
            ema.use_ema and not ema.offload_ema,
            [list(block.parameters()) for block in self._placement.swapped],
            self._options.run.gradient_accumulation_steps,
            [list(block.parameters()) for block in module.unet.blocks()] if compiled else (),
            self._fused_geglu,
        )
        return step, estimator(module, self._vae, self._placement.compute_dtype, step, encode, training)
