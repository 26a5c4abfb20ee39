"""accelerate's Accelerator with a sharded optimizer: fairscale's wrapper, and clipping by the norm of all shares."""

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from fairscale.nn.data_parallel import ShardedDataParallel
from fairscale.optim.oss import OSS
from torch import Tensor, nn

from third_patch.fairscale_patch.oss import bind
from third_patch.registry import Patch

VERSIONS = ">=1.11,<=1.15"

# Gradients travel in flat buckets, one for each process that owns some. fairscale's default of 2^23 elements is kept up
# to 8 processes; beyond that the buckets shrink, so that all of a process's together stay within 2^26 elements.
BUCKET_ELEMENTS, ALL_BUCKETS_ELEMENTS = 2**23, 2**26


def _prepare(original: Callable[..., Any]) -> Callable[..., Any]:
    def prepare(self: Any, *args: Any, device_placement: Any = None) -> Any:
        """Prepare objects as accelerate does; a model that comes with an OSS is wrapped in ShardedDataParallel."""
        optimizers = [argument for argument in args if isinstance(argument, OSS)]
        if not optimizers:
            return original(self, *args, device_placement=device_placement)
        models = [argument for argument in args if isinstance(argument, nn.Module)]
        if len(optimizers) != 1 or len(models) != 1:
            raise ValueError(f"one model goes with one OSS; got {len(models)} models and {len(optimizers)} OSS")
        made = {
            id(models[0]): _wrapped(self, models[0], optimizers[0]),
            id(optimizers[0]): self.prepare_optimizer(optimizers[0], device_placement=False),
        }
        placement = list(device_placement or [None for _ in args])
        others = [index for index, argument in enumerate(args) if id(argument) not in made]
        results = {index: made.get(id(argument)) for index, argument in enumerate(args)}
        if others:
            rest = original(self, *(args[n] for n in others), device_placement=[placement[n] for n in others])
            results |= dict(zip(others, rest if len(others) > 1 else (rest,), strict=True))
        for prepared in made.values():
            prepared._is_accelerate_prepared = True  # accelerate wraps no object with this mark again
        return tuple(results[index] for index in range(len(args)))

    return prepare


def _wrapped(accelerator: Any, model: nn.Module, optimizer: OSS) -> ShardedDataParallel:
    """The model on its device, with autocast, in ShardedDataParallel, which reduces each gradient to its owner."""
    prepared = accelerator.prepare_model(model, evaluation_mode=True)  # "evaluation" leaves out DDP alone
    optimizer.refresh_trainable()
    wrapper = ShardedDataParallel(
        prepared,
        optimizer,
        broadcast_buffers=False,
        reduce_buffer_size=min(BUCKET_ELEMENTS, ALL_BUCKETS_ELEMENTS // dist.get_world_size()),
        warn_on_trainable_params_changed=False,
    )
    bind(optimizer, wrapper)
    models = accelerator._models
    models[next(index for index, model in enumerate(models) if model is prepared)] = wrapper
    return wrapper


def _clip_grad_norm(original: Callable[..., Any]) -> Callable[..., Any]:
    def clip_grad_norm_(self: Any, parameters: Any, max_norm: float, norm_type: float = 2) -> Tensor:
        """Clip as accelerate does; with an OSS the norm is computed over all processes' shares."""
        sharded = [wrapper.optimizer for wrapper in self._optimizers if isinstance(wrapper.optimizer, OSS)]
        if not sharded:
            return original(self, parameters, max_norm, norm_type=norm_type)
        self.unscale_gradients()
        return sharded[0].clip_grad_norm(max_norm, norm_type)

    return clip_grad_norm_


PATCHES = (
    Patch(
        target="accelerate.accelerator:Accelerator.prepare",
        why="a model beside fairscale's OSS is wrapped in ShardedDataParallel, not in DistributedDataParallel",
        versions=VERSIONS,
        signature="(self, *args, device_placement=None)",
        replace=_prepare,
        remove_when="accelerate takes a factory for the data-parallel wrapper (or when oss is given up)",
    ),
    Patch(
        target="accelerate.accelerator:Accelerator.clip_grad_norm_",
        why="with OSS a process holds the gradients of its share alone; OSS knows the norm of all",
        versions=VERSIONS,
        signature="(self, parameters, max_norm, norm_type=2)",
        replace=_clip_grad_norm,
        remove_when="as above",
    ),
)
