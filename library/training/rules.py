"""Rules between options, checked once, before anything is read or loaded; each error names the flag and the way out."""

import logging

import torch

from library import device as devices
from library.address import Address
from library.errors import InputError
from library.generation.prompts import read_prompts
from library.options.data import DataOptions
from library.options.optimization import EMA_DECAY, OptimizationOptions
from library.options.options import Options
from library.options.run import DYNAMO_BACKEND, PreviewOptions, RunOptions, SavingOptions
from library.training.engine.optimizers import check_warmup, choose_optimizer
from library.training.engine.sharding import sharding_kind

logger = logging.getLogger(__name__)

MANY_PASSES = 16  # whose gradients may be added up in bf16 without a warning


def check_data(options: DataOptions, run: RunOptions) -> None:
    """Raise InputError where options of the data cannot go together."""
    if options.debug_dataset and run.dry_run:
        raise InputError("--debug_dataset writes a page, and --dry_run writes nothing; give one of them")
    if options.masked_loss and not any(subset.alpha_mask for subset in options.subsets):
        raise InputError(
            "--masked_loss has no masks: they come from the images' alpha channel; add --alpha_mask (or alpha_mask in "
            "--dataset_config), or leave it out"
        )


def check_checkpointing(run: RunOptions) -> None:
    """Raise InputError where flags that say what is recomputed have nothing to act on, or no limit."""
    auto = run.checkpoint_policy == "auto"
    if auto and not run.gradient_checkpointing:
        raise InputError(
            "--checkpoint_policy=auto has nothing to act on without --gradient_checkpointing; add that, or leave it out"
        )
    if auto and run.checkpoint_memory_gb is None:
        raise InputError(
            "--checkpoint_policy=auto needs to know what a step may take; add --checkpoint_memory_gb, or use "
            "--checkpoint_policy=full"
        )
    if run.checkpoint_memory_gb is not None and not auto:
        raise InputError(
            "--checkpoint_memory_gb has nothing to act on without --checkpoint_policy=auto; add that, or leave it out"
        )


def check_compiling(run: RunOptions, device: torch.device) -> None:
    """Raise InputError where a backend of torch.compile has nothing to act on, or cannot be had on the device."""
    backend, instead = run.dynamo_backend, "use --dynamo_backend=aot_eager or eager, or leave out --torch_compile"
    if not run.torch_compile:
        if backend != DYNAMO_BACKEND:
            raise InputError(
                f"--dynamo_backend={backend} has nothing to act on without --torch_compile; add that, or leave it out"
            )
        return
    if devices.is_npu(device) and backend not in ("eager", "aot_eager"):
        raise InputError(
            f"--dynamo_backend={backend} makes no code for Ascend without a code generator of Ascend's own "
            f"(triton-ascend), which nobody has tried here, and its graph mode (torchair) is none of these backends; "
            f"{instead}"
        )
    if backend == "cudagraphs" and devices.is_cpu(device):
        raise InputError(f"--dynamo_backend=cudagraphs needs an NVIDIA GPU, and this run is on the CPU; {instead}")


def check_half_weights(run: RunOptions) -> None:
    """Raise InputError where weights in half precision cannot train, or a flag about them has nothing to act on."""
    if run.full_fp16:
        raise InputError(
            "--full_fp16 is not supported: fp16 weights have fp16 gradients, which loss scaling cannot bring back to "
            "their own size without losing the small ones, and squares of gradients below 2e-4, which optimizers keep, "
            "are 0. Use --mixed_precision=fp16, which keeps fp32 weights, or --mixed_precision=bf16 --full_bf16"
        )
    if run.full_bf16 and run.mixed_precision != "bf16":
        raise InputError(
            f"--full_bf16 trains bf16 weights, and --mixed_precision={run.mixed_precision} computes with others; add "
            "--mixed_precision=bf16, or leave it out"
        )
    if run.bf16_update and not run.full_bf16:
        raise InputError("--bf16_update has nothing to act on without --full_bf16; add that, or leave it out")
    if run.full_bf16 and run.gradient_accumulation_steps > MANY_PASSES:
        logger.warning(
            "--full_bf16 adds up gradients in bf16: of --gradient_accumulation_steps=%d passes each loses up to 1/512 "
            "of the sum so far; a larger --train_batch_size with fewer passes is more exact",
            run.gradient_accumulation_steps,
        )


def check_optimization(options: OptimizationOptions, run: RunOptions) -> None:
    """Raise InputError where optimizer, sharding, rates and schedule cannot go together."""
    choice = choose_optimizer(options.optimizer_type, options.optimizer_args)
    sharding = sharding_kind(options.sharding, options.optimizer_type)
    if sharding == "fsdp" and not choice.by_element:
        raise InputError(
            f"--sharding=fsdp leaves each process some rows of a tensor, and {choice.kind.__name__} needs all of them; "
            "use --sharding=oss or zero1, or --optimizer_type=AdamW"
        )
    if run.full_bf16 and "8bit" in choice.kind.__name__:
        raise InputError(
            f"--full_bf16 steps in fp32 and rounds, and {choice.kind.__name__} updates bf16 weights in a kernel of its "
            "own, to the nearest; use --optimizer_type=AdamW or AdaFactor, or leave --full_bf16 out"
        )
    if options.fused_backward_pass:
        check_fused_backward(sharding, run)
    if choice.sets_its_own_rates:
        logger.warning(
            "--optimizer_type=%s sets its own rates: --learning_rate and --lr_scheduler, which the log shows, do "
            'nothing; it goes by them with --optimizer_args "relative_step=False" "scale_parameter=False"',
            options.optimizer_type,
        )
    text_encoder_rates(options)
    warmup = options.lr_warmup_steps
    if options.lr_scheduler == "constant" and warmup:
        raise InputError(
            f"--lr_warmup_steps={warmup} has no effect with --lr_scheduler=constant; use constant_with_warmup"
        )
    if not options.use_ema and (options.offload_ema or options.ema_decay != EMA_DECAY):
        raise InputError("--ema_decay and --offload_ema have nothing to act on without --use_ema; add that")
    if run.max_train_epochs is None:
        check_warmup(warmup, run.max_train_steps)


def check_fused_backward(sharding: str, run: RunOptions) -> None:
    """Raise InputError where something needs all gradients of a step at once, and there never are."""
    flag = "--fused_backward_pass updates each weight as soon as its gradient is there"
    if run.gradient_accumulation_steps > 1:
        raise InputError(
            f"{flag}, so gradients cannot be added up over --gradient_accumulation_steps="
            f"{run.gradient_accumulation_steps}; raise --train_batch_size instead, or leave one of the two out"
        )
    if run.mixed_precision == "fp16":
        raise InputError(
            f"{flag}, and fp16's loss scaling must see all of them before; use --mixed_precision=bf16 or no"
        )
    if sharding != "none":
        raise InputError(
            f"{flag}, and --sharding={sharding} hands gradients round after backward; leave one of the two out"
        )


def check_swapping(options: OptimizationOptions, run: RunOptions, device: torch.device, processes: int) -> None:
    """Raise InputError where --blocks_to_swap has nowhere to swap to, or something needs all weights on the device."""
    if options.blocks_to_swap is None:
        return
    flag = f"--blocks_to_swap={options.blocks_to_swap}"
    if devices.is_cpu(device):
        raise InputError(
            f"{flag} keeps blocks in the CPU's memory, and the CPU is what computes here: there is nothing to save. "
            "Leave it out"
        )
    if run.full_bf16:
        raise InputError(
            f"{flag} has weights on two devices, and --full_bf16 puts small ones together to update them as one; leave "
            "one of the two out"
        )
    if run.torch_compile:
        raise InputError(
            f"{flag} exchanges the weights of a block each time that it computes, and code of --torch_compile is made "
            "for weights that stay where they are; leave one of the two out"
        )
    sharding = sharding_kind(options.sharding, options.optimizer_type)
    if processes > 1 and sharding != "none":
        raise InputError(
            f"{flag} updates blocks on the CPU, and --sharding={sharding} shares all weights' gradients or state "
            "among the devices; leave one of the two out (--sharding=fsdp shares the weights, too)"
        )
    if processes > 1 and not options.fused_backward_pass:
        raise InputError(
            f"{flag} on several processes needs --fused_backward_pass, which averages each gradient while it is still "
            "on the device; add that, or use --sharding=fsdp instead"
        )


def text_encoder_rates(options: OptimizationOptions) -> tuple[float, float]:
    """Learning rates of both text encoders; 0 for one that does not train.

    Raises:
        InputError: a rate is given for encoders that do not train.
    """
    te1, te2 = options.learning_rate_te1, options.learning_rate_te2
    if options.train_text_encoder:
        return options.learning_rate if te1 is None else te1, options.learning_rate if te2 is None else te2
    for flag, rate in (("--learning_rate_te1", te1), ("--learning_rate_te2", te2)):
        if rate:
            raise InputError(f"{flag}={rate:g} trains nothing without --train_text_encoder; add that, or leave it out")
    return 0.0, 0.0


def check_saving(options: SavingOptions) -> None:
    """Raise InputError where flags that say how many are kept, or how one resumes, have nothing to act on."""
    epochs, steps = options.save_every_n_epochs, options.save_every_n_steps
    needs = [
        ("--save_last_n_epochs", options.save_last_n_epochs, epochs, "--save_every_n_epochs"),
        ("--save_last_n_steps", options.save_last_n_steps, steps, "--save_every_n_steps"),
        (
            "--save_last_n_epochs_state",
            options.save_last_n_epochs_state,
            epochs and options.save_state,
            "--save_every_n_epochs and --save_state",
        ),
        (
            "--save_last_n_steps_state",
            options.save_last_n_steps_state,
            (steps and options.save_state) or options.save_state_every_n_steps or options.save_state_every_n_minutes,
            "--save_state_every_n_steps, --save_state_every_n_minutes, or --save_every_n_steps with --save_state",
        ),
        ("--resume_anyway", options.resume_anyway, options.resume, "--resume"),
    ]
    for flag, given, acts_on, other in needs:
        if given and not acts_on:
            raise InputError(f"{flag} has nothing to act on without {other}; add that, or leave it out")


def check_without_epochs(run: RunOptions, saving: SavingOptions, preview: PreviewOptions) -> None:
    """Raise InputError where something happens by epochs of a stream whose number of samples nobody knows."""
    needs = [
        ("--max_train_epochs", run.max_train_epochs, "--max_train_steps"),
        ("--save_every_n_epochs", saving.save_every_n_epochs, "--save_every_n_steps"),
        ("--sample_every_n_epochs", preview.sample_every_n_epochs, "--sample_every_n_steps"),
    ]
    for flag, given, instead in needs:
        if given:
            raise InputError(
                f"{flag}: how many samples an epoch of this stream has is not known. Give {instead}, or put a "
                'sizes.json ({"00000.tar": 10000, …}) beside the shards'
            )


def check_preview(options: PreviewOptions) -> None:
    """Raise InputError where sample pictures are asked for without prompts, or the prompts cannot be read."""
    if options.sample_prompts is not None:
        read_prompts(options.sample_prompts)
    elif options.sample_at_first or options.sample_every_n_steps or options.sample_every_n_epochs:
        raise InputError("--sample_at_first and --sample_every_n_... sample nothing without --sample_prompts")


def check_caches(options: Options) -> None:
    """Raise InputError where something random, or something that trains, stands against a cache."""
    caches = options.caches
    latents = "--cache_latents" + ("_to_disk" if caches.cache_latents_to_disk else "")
    text = "--cache_text_encoder_outputs" + ("_to_disk" if caches.cache_text_encoder_outputs_to_disk else "")
    if caches.text and options.optimization.train_text_encoder:
        raise InputError(f"{text} keeps what text encoders give that --train_text_encoder changes; leave out one")
    for subset in options.data.subsets:
        if (caches.latents or caches.text) and isinstance(subset.train_data_dir, Address):
            raise InputError(
                f"{latents if caches.latents else text} needs an index, and --train_data_dir {subset.train_data_dir} "
                "is a stream. Leave it out, or download the shards"
            )
        against_latents = {
            "--random_crop": subset.random_crop,
            "--color_aug": subset.color_aug,
            "--face_crop_aug_range": subset.face_crop_aug_range is not None,
            "--alpha_mask": subset.alpha_mask,
        }
        against_text = {
            "--shuffle_caption": subset.shuffle_caption,
            "--enable_wildcard": subset.enable_wildcard,
            "--caption_tag_dropout_rate": subset.caption_tag_dropout_rate > 0,
            "--token_warmup_step": subset.token_warmup_step > 0,
        }
        for flag, forbids in against_latents.items():
            if caches.latents and forbids:
                raise InputError(
                    f"{latents} encodes each image once, as it is, and {flag} needs its pixels; leave out one"
                )
        for flag, forbids in against_text.items():
            if caches.text and forbids:
                raise InputError(
                    f"{text} encodes each caption once, and {flag} makes it another at each step; leave out one (the "
                    "dropout of whole captions goes together with the cache)"
                )
    needs = [
        ("--text_encoder_batch_size", caches.text_encoder_batch_size, caches.text, "--cache_text_encoder_outputs"),
        (
            "--skip_cache_check",
            caches.skip_cache_check,
            caches.cache_latents_to_disk or caches.cache_text_encoder_outputs_to_disk,
            "--cache_latents_to_disk or --cache_text_encoder_outputs_to_disk",
        ),
    ]
    for flag, given, acts_on, other in needs:
        if given and not acts_on:
            raise InputError(f"{flag} has nothing to act on without {other}; add that, or leave it out")
