"""What a run says of itself before it trains: the resolved plan, in the words that users of such trainers look for."""

from collections.abc import Sequence

from accelerate import Accelerator

from library import device as devices
from library.data.training_set import TrainingSet
from library.options.caches import CacheOptions
from library.options.ema import EMAOptions
from library.options.precision import BF16_UPDATES, PrecisionOptions
from library.options.states import StateOptions
from library.options.training import TrainingOptions
from library.training.engine.optimizers import ParameterGroup


def plan_lines(
    options: TrainingOptions,
    data: TrainingSet,
    steps: int,
    epochs: int,
    groups: Sequence[ParameterGroup],
    accelerator: Accelerator,
    sharding: str,
) -> list[str]:
    """A line for each thing that was resolved."""
    trained = {group.name: sum(parameter.numel() for parameter in group.parameters) for group in groups}
    optimizer = options.optimizer
    return [
        f"device: {devices.device_name(accelerator.device)} x {accelerator.num_processes}",
        f"mixed precision: {options.precision.mixed_precision}",
        *_bf16_lines(options.precision),
        *(f"train {name}: {count:,} parameters" for name, count in trained.items()),
        f"number of trainable parameters: {sum(trained.values()):,}",
        *(f"learning rate of {group.name}: {group.learning_rate:g}" for group in groups),
        f"optimizer: {optimizer.optimizer_type}, schedule: {optimizer.lr_scheduler}, "
        f"warm-up steps: {optimizer.warmup_steps(steps)}, max grad norm: {optimizer.max_grad_norm:g}",
        *_average_lines(options.ema),
        *_fused_lines(options),
        *_sharding_lines(sharding, accelerator.num_processes),
        *_epoch_lines(data, epochs),
        f"batch size per device: {options.data.train_batch_size}",
        f"gradient accumulation steps: {options.run.gradient_accumulation_steps}",
        f"global batch: {data.global_batch}",
        f"total optimization steps: {steps}",
        *_cache_lines(options.caches),
        f"gradient checkpointing: {options.memory.gradient_checkpointing}",
        f"checkpoints: {_each(options.saving.save_every_n_steps, options.saving.save_every_n_epochs)}at the end",
        f"training states: {_states_in_words(options.states)}",
        f"samples: {_each(options.preview.sample_every_n_steps, options.preview.sample_every_n_epochs)}"
        f"{'before the first step' if options.preview.sample_at_first else 'no others'}",
        f"output: {options.saving.output_dir}, TensorBoard: {options.logs.logging_dir or 'none'}",
    ]


def _bf16_lines(precision: PrecisionOptions) -> list[str]:
    """What --full_bf16 does."""
    how = precision.bf16_update or BF16_UPDATES[0]
    return [f"weights, gradients and optimizer state in bf16, update: {how}"] * precision.full_bf16


def _average_lines(options: EMAOptions) -> list[str]:
    """What --use_ema does."""
    if not options.use_ema:
        return []
    where = "in the CPU's memory" if options.offload_ema else "beside the weights"
    return [f"moving average: decay {options.ema_decay:g}, {where}; sampled from and saved as NAME-ema"]


def _fused_lines(options: TrainingOptions) -> list[str]:
    """What --fused_backward_pass changes, where it is given."""
    norm = options.optimizer.max_grad_norm
    clipped = f", each tensor's gradient clipped to {norm:g}" * (norm > 0)
    return [f"fused backward pass: weights are updated in backward{clipped}"] * options.memory.fused_backward_pass


def _epoch_lines(data: TrainingSet, epochs: int) -> list[str]:
    """How long an epoch is and how many there are, as far as anybody knows."""
    if data.samples is None:
        return ["num examples: unknown", "num batches per epoch: unknown", "num epochs: unknown"]
    return [
        f"num examples: {data.samples}",
        f"num batches per epoch: {data.epochs.steps_before_epoch(1)} (first epoch; leftovers go to the next)",
        f"num epochs: {epochs}",
    ]


def _sharding_lines(sharding: str, processes: int) -> list[str]:
    """What is sharded, where somebody asked for it or could ask."""
    if processes == 1:
        return [] if sharding == "none" else [f"sharding: {sharding} on one process has nothing to shard"]
    return [f"sharding: {sharding}"]


def _cache_lines(caches: CacheOptions) -> list[str]:
    """What is computed before training, where anything is."""
    asked = {
        "latents": (caches.latents, caches.cache_latents_to_disk),
        "text-encoder outputs": (caches.text, caches.cache_text_encoder_outputs_to_disk),
    }
    kept = [f"{name} {'on disk' if on_disk else 'in memory'}" for name, (wanted, on_disk) in asked.items() if wanted]
    return [f"caches: {', '.join(kept)}"] if kept else []


def _states_in_words(states: StateOptions) -> str:
    """When states are saved; on a signal always."""
    occasions = [
        "with each checkpoint, at the end" if states.save_state else "",
        f"each {states.save_state_every_n_steps} steps" if states.save_state_every_n_steps else "",
        f"each {states.save_state_every_n_minutes:g} minutes" if states.save_state_every_n_minutes else "",
        "at the end" if states.save_state_on_train_end and not states.save_state else "",
        "on SIGTERM, SIGINT, SIGHUP and SIGUSR1",
    ]
    return ", ".join(filter(None, occasions))


def _each(steps: int | None, epochs: int | None) -> str:
    """A cadence in words, to be followed by others."""
    return "".join(f"each {count} {unit}, " for count, unit in ((steps, "steps"), (epochs, "epochs")) if count)
