"""SDXL pre-training as a task of the loop: how a batch becomes a loss, what is saved, what is sampled.

Legend: B batch, C channels, H W latent rows and columns, T text tokens, V vector conditions.
"""

import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from library import device as devices
from library.data.micro_batch import MicroBatch
from library.diffusion.masks import latent_weights
from library.diffusion.random_draws import normal, timesteps
from library.diffusion.schedule import NoiseSchedule, prediction_type
from library.errors import InputError
from library.families import SDXL
from library.generation.prompts import SamplePrompt, read_prompts
from library.keyed_random import Stream
from library.models.compiled import CompiledBlocks, compile_blocks, plan
from library.models.denoiser import Denoiser, frozen_copy
from library.models.files.modelspec import modelspec
from library.models.files.read import load_model, load_tokenizers
from library.models.files.write import save_model, saved_bytes
from library.models.model import Model
from library.models.text import TextStates, Tokens
from library.models.text_encoders import tokenize_all
from library.models.token_counts import TokenCounter
from library.models.vae import encode_images, latent_shape
from library.options.training import TrainingOptions
from library.signals import Signals
from library.training.encoders import Encoders
from library.training.engine.bf16_update import bf16_update
from library.training.engine.block_swap import HostBlocks, move_all_but
from library.training.engine.optimizers import ParameterGroup, make_optimizer
from library.training.engine.precision import DTYPES, SAVE_DTYPES
from library.training.engine.sharding import sharding_kind
from library.training.engine.swap_schedule import choose_blocks
from library.training.memory.checkpoint_policy import choose_checkpoints
from library.training.memory.estimate import GIB, MemoryEstimate, estimator
from library.training.memory.resident import Training
from library.training.preview import GuidedDenoiser, Previewer
from library.training.run import Surroundings, run

logger = logging.getLogger(__name__)

VALIDATION_TIMESTEPS = 4  # 200, 400, 600 and 800 of 1000, as in the reference


def load_token_counter(options: TrainingOptions) -> TokenCounter:
    """A token counter of a model of which nothing else is loaded."""
    model = options.model
    tokenizers = load_tokenizers(model.pretrained_model_name_or_path, SDXL, options.text_encoders.tokenizers)
    return TokenCounter(tokenizers, model.max_token_length, model.weighted_captions)


class SDXLPretraining:
    """Trains SDXL's U-Net and, if asked, both text encoders on the noise-prediction loss."""

    network_name = "SDXL"

    def __init__(self, options: TrainingOptions, surroundings: Surroundings) -> None:
        model_options = options.model
        self.model_options, self.options = model_options, options
        self.accelerator, self.seed, self.signals = surroundings.accelerator, surroundings.seed, surroundings.signals
        # A dry run answers whether the device is large enough: it must not need the device's memory for it.
        self.device = torch.device("cpu") if options.run.dry_run else surroundings.device
        te1_rate, te2_rate = options.text_encoders.rates(options.optimizer.learning_rate)
        self.learning_rates = {
            "unet": options.optimizer.learning_rate,
            "text_encoder1": te1_rate,
            "text_encoder2": te2_rate,
        }
        self.model = load_model(
            model_options.pretrained_model_name_or_path,
            SDXL,
            vae=model_options.vae,
            tokenizers=options.text_encoders.tokenizers,
        )
        self.prediction = prediction_type(
            "v_prediction"
            if options.objective.v_parameterization
            else self.model.scheduler_config.get("prediction_type", "epsilon")
        )
        schedule = NoiseSchedule.from_config(self.model.scheduler_config, options.objective.zero_terminal_snr)
        if schedule.ends_in_pure_noise and self.prediction.name == "epsilon":
            raise InputError(
                "a zero terminal SNR (--zero_terminal_snr, or rescale_betas_zero_snr in the model's scheduler) is not "
                "for epsilon prediction, which says nothing about pure noise; add --v_parameterization"
            )
        # Checkpoints say what the model was trained to predict, not what it predicted before.
        trained: dict[str, Any] = {"prediction_type": self.prediction.name}
        if schedule.ends_in_pure_noise:
            trained |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        self.model.scheduler_config = {**self.model.scheduler_config, **trained}
        self.previewer = self._previewer(schedule)
        self.checkpoint_lines: list[str] = []
        self.compiled: CompiledBlocks | None = None
        self.swap_lines: list[str] = []
        self._place(schedule)

    def _place(self, schedule: NoiseSchedule) -> None:
        """Choose precisions and the attention backend, move everything to the device."""
        half = DTYPES[self.options.precision.mixed_precision]
        self.module = Denoiser(
            self.model,
            [self.learning_rates[name] > 0 for name in ("text_encoder1", "text_encoder2")],
            gradient_checkpointing=self.options.memory.gradient_checkpointing,
        )
        self.module.cast_frozen(half)
        if self.options.precision.full_bf16:
            self.module.cast_trained(torch.bfloat16)
        self.attention_backend = "npu" if self.model_options.enable_npu_flash_attention else "sdpa"
        self.module.unet.set_attention_backend(self.attention_backend)
        vae_dtype = torch.float32 if self.model_options.no_half_vae else half
        if vae_dtype == torch.float16 and not self.model_options.vae:
            logger.warning(
                "the model's own VAE runs in fp16; SDXL's stock VAE overflows there: if the loss is not finite, use "
                "--vae=madebyollin/sdxl-vae-fp16-fix or --no_half_vae"
            )
        self.swapped = self._blocks_to_swap()
        # On the CPU, for --dry_run, everything stays where it is.
        swaps = bool(self.swapped) and not self.options.run.dry_run
        self.host_blocks = HostBlocks(self.swapped, self.device) if swaps else None
        if self.host_blocks is not None:
            move_all_but(self.module, self.device, self.host_blocks.parameters)
        else:
            self.module.to(self.device)
        batch_size, caches = self.options.data.train_batch_size, self.options.caches
        self.encoders = Encoders(
            frozen_copy(self.model.vae, vae_dtype).to(self.device),
            self.module,
            self.model.tokenizers,
            self.tokenize,
            self.accelerator.autocast,
            self.device,
            vae_batch_size=caches.vae_batch_size or batch_size,
            text_batch_size=caches.text_encoder_batch_size or batch_size,
        )
        self.schedule = schedule.to(self.device)

    def _blocks_to_swap(self) -> list[nn.Module]:
        """The U-Net's blocks that --blocks_to_swap=N is about.

        Raises:
            InputError: there are fewer.
        """
        count, blocks = self.options.memory.blocks_to_swap, self.module.unet.blocks()
        if count is None:
            return []
        if count > len(blocks):
            raise InputError(
                f"--blocks_to_swap={count}: this model's U-Net has {len(blocks)} blocks; give at most that"
            )
        sizes = [sum(one.numel() * one.element_size() for one in block.parameters()) for block in blocks]
        chosen = choose_blocks(sizes, count)
        weights = sum(sizes[number] for number in chosen) / GIB
        self.swap_lines = [
            f"blocks swapped: {count} of {len(blocks)} of the U-Net, {weights:.3f} GiB of weights in the CPU's memory"
        ]
        return [blocks[number] for number in chosen]

    def plan_lines(self) -> list[str]:
        """What is resolved about the model, for the log."""
        compiling = self.options.compiling
        snr = ", zero terminal SNR" if self.schedule.ends_in_pure_noise else ""
        prompts = len(self.previewer.prompts) if self.previewer else 0
        return [
            f"model: {self.model_options.pretrained_model_name_or_path}, VAE: {self.model_options.vae or 'its own'}",
            f"prediction: {self.prediction.name}{snr}; VAE in {str(self.encoders.vae.dtype).removeprefix('torch.')}",
            f"attention backend asked for: {self.attention_backend}",
            f"checkpoints as: {self.options.saving.save_model_as or self._loaded_form()}, "
            f"precision: {self.options.saving.save_precision or 'float'}",
            f"sample prompts: {prompts}",
            *self.checkpoint_lines,
            *([plan(self.module.unet, compiling.dynamo_backend)] if compiling.torch_compile else []),
            *self.swap_lines,
        ]

    def compile(self) -> None:
        """With --torch_compile compile the U-Net by block; what copies there are of it stay plain."""
        compiling = self.options.compiling
        if compiling.torch_compile:
            dtype = DTYPES[self.options.precision.mixed_precision]
            self.compiled = compile_blocks(self.module.unet, compiling.dynamo_backend, self.attention_backend, dtype)

    def report_lines(self) -> list[str]:
        """What was compiled."""
        return self.compiled.lines() if self.compiled else []

    def parameter_groups(self) -> Sequence[ParameterGroup]:
        """The U-Net's parameters and those of each text encoder that trains."""
        parts = {
            "unet": list(self.module.unet.parameters()),
            "text_encoder1": self.module.trained_encoders[0],
            "text_encoder2": self.module.trained_encoders[1],
        }
        return [ParameterGroup(name, part, self.learning_rates[name]) for name, part in parts.items() if part]

    def token_counter(self) -> TokenCounter:
        """What counts the tokens of captions."""
        options = self.model_options
        return TokenCounter(self.model.tokenizers, options.max_token_length, options.weighted_captions)

    def tokenize(self, captions: Sequence[str]) -> Tokens:
        """Tokens of captions for each text encoder, with their weights under --weighted_captions."""
        options = self.model_options
        return tokenize_all(self.model.tokenizers, captions, options.max_token_length, options.weighted_captions)

    def loss(self, module: nn.Module, batch: MicroBatch) -> Tensor:
        """Mean squared error of the prediction (Ho et al., 2006.11239, equation 14, on latents), times the weights.

        With a weight w for each of B samples: Σ w·mean((prediction - target)²) / B, as DreamBooth (Ruiz et al.,
        2208.12242, equation 2) weighs the prior-preservation term by λ. A mask weighs each latent pixel's error.
        """
        places = batch.places_B.tolist()
        shape_CHW = self._noise_shape(batch)
        latents_BCHW = self._latents(batch, normal(self.seed, Stream.VAE, batch.step, places, shape_CHW))
        noise_BCHW = normal(self.seed, Stream.NOISE, batch.step, places, shape_CHW)
        t_B = timesteps(self.seed, batch.step, places, self.schedule.timesteps)
        return (
            self._losses(module, batch, latents_BCHW, noise_BCHW, t_B)
            * devices.upload(batch.loss_weights_B, self.device)
        ).mean()

    def validation_losses(self, module: nn.Module, batch: MicroBatch, seed: int, numbers: range) -> Tensor:
        """Each sample's mean loss at four timesteps that divide the schedule evenly, its noise keyed by its number.

        A batch may hold more samples than there are numbers: those beyond are not looked at.
        """
        keys = [*numbers, *[0] * (len(batch) - len(numbers))]
        shape_CHW = self._noise_shape(batch)
        latents_BCHW = self._latents(batch, normal(seed, Stream.VALIDATION_VAE, 0, keys, shape_CHW))
        times = np.linspace(0, self.schedule.timesteps, VALIDATION_TIMESTEPS + 2, dtype=int)[1:-1].tolist()
        losses = []
        for time in times:
            noise_BCHW = normal(seed, Stream.VALIDATION_NOISE, time, keys, shape_CHW)
            losses.append(self._losses(module, batch, latents_BCHW, noise_BCHW, torch.full((len(batch),), time)))
        return torch.stack(losses).mean(dim=0)[: len(numbers)]

    def _losses(
        self, module: nn.Module, batch: MicroBatch, latents_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor
    ) -> Tensor:
        """(B,) mean squared error of each sample's prediction; noise and timesteps come from the CPU."""
        noise_BCHW, t_B = devices.upload(noise_BCHW, self.device), devices.upload(t_B, self.device)
        noisy_BCHW = self.schedule.add_noise(latents_BCHW, noise_BCHW, t_B)
        predicted_BCHW = module(noisy_BCHW, t_B, self._text(batch), devices.upload(batch.size_ids_B6, self.device))
        target_BCHW = self.prediction.target(self.schedule, latents_BCHW, noise_BCHW, t_B)
        loss_BCHW = nn.functional.mse_loss(predicted_BCHW.float(), target_BCHW, reduction="none")
        if batch.masks_BHW is not None:
            weights_B1HW = latent_weights(batch.masks_BHW, noisy_BCHW.shape[2:])
            loss_BCHW = loss_BCHW * devices.upload(weights_B1HW, self.device)
        return loss_BCHW.mean(dim=(1, 2, 3))

    def _text(self, batch: MicroBatch) -> Tokens | TextStates:
        """The batch's tokens, or its cached text states, on the device."""
        if batch.text is not None:
            context_BTC, pooled_BP = batch.text
            return TextStates(
                devices.upload(context_BTC, self.device),
                None if pooled_BP is None else devices.upload(pooled_BP, self.device),
            )
        if batch.tokens is None:
            raise ValueError("a micro-batch without tokens and without cached text states")
        ids, weights = (tuple(devices.upload(tensor, self.device) for tensor in part) for part in batch.tokens)
        return Tokens(ids, weights)

    def _noise_shape(self, batch: MicroBatch) -> tuple[int, int, int]:
        """(C, H, W) of the batch's latents."""
        height_px, width_px = (int(side) for side in batch.size_ids_B6[0, 4:])  # the bucket's
        return self._latent_shape(height_px, width_px)

    def _latents(self, batch: MicroBatch, noise_BCHW: Tensor) -> Tensor:
        """The images' latents (B, C, H, W), drawn from the VAE's posterior by noise from the CPU."""
        if batch.moments is not None:
            mean_BCHW, std_BCHW = batch.moments
            return self.encoders.cached_latents(mean_BCHW, std_BCHW, noise_BCHW)
        if batch.images_BHWC is None:
            raise ValueError("a micro-batch without images and without cached latents")
        return self.encoders.latents(batch.images_BHWC, noise_BCHW)

    def save(self, stem: str, module: nn.Module) -> Path:
        """Write the whole model, complete or not at all."""
        saving = self.options.saving
        return save_model(
            self._model_with(module),
            saving.output_dir / stem,
            saving.save_model_as or self._loaded_form(),
            SAVE_DTYPES[saving.save_precision],
            modelspec(title=stem, resolution_wh_px=self.options.data.resolution, prediction_type=self.prediction.name),
        )

    def checkpoint_bytes(self) -> int:
        """What all parts of the model take in the precision that they are saved in."""
        return saved_bytes(self.model, SAVE_DTYPES[self.options.saving.save_precision])

    def _model_with(self, module: Any) -> Model:
        """The model with the weights that train taken from `module`; the frozen ones as they were loaded."""
        encoders = list(self.model.text_encoders)
        for place, trained in enumerate(self.module.trained_encoders):
            if trained:
                encoders[place] = module.text_encoders[place]
        return replace(self.model, unet=module.unet, text_encoders=tuple(encoders))

    def _loaded_form(self) -> str:
        """The form that checkpoints take without --save_model_as: that of the model the run started from."""
        single_file = Path(self.model_options.pretrained_model_name_or_path).is_file()
        return "safetensors" if single_file else "diffusers_safetensors"

    def _previewer(self, schedule: NoiseSchedule) -> Previewer | None:
        """The previewer that --sample_prompts asks for, checked before anything trains."""
        preview = self.options.preview
        if preview.sample_prompts is None:
            return None
        saving = self.options.saving
        previewer = Previewer(
            read_prompts(preview.sample_prompts),
            saving.output_dir,
            saving.output_name,
            preview.sample_sampler,
            schedule,
            self.prediction,
            self.seed,
        )
        previewer.check()
        return previewer

    @torch.no_grad()
    def preview(self, position: str, step: int, module: nn.Module) -> None:
        """Sample the preview prompts with the weights as they are."""
        if self.previewer is not None:
            denoiser = partial(self._denoiser, module)
            self.previewer.run(denoiser, self.encoders.decode, self._latent_shape, position, step, self.device)

    def _denoiser(self, module: Any, prompt: SamplePrompt) -> GuidedDenoiser:
        """The U-Net with a prompt's conditions, in row 0, and its negative prompt's, in row 1."""
        size_hw = (prompt.height, prompt.width)
        size_ids_26 = torch.tensor([[*size_hw, 0, 0, *size_hw]] * 2, dtype=torch.float32, device=self.device)
        states = self.encoders.text_states(module, [prompt.prompt, prompt.negative_prompt])
        context_2TC, vector_2V = module.conditions(states, size_ids_26)

        def predict(noisy_BCHW: Tensor, t_B: Tensor, context_BTC: Tensor, vector_BV: Tensor | None) -> Tensor:
            """The U-Net in the precision that it trains in; sampler and VAE keep their own."""
            self.signals.stop_if_requested()
            with self.accelerator.autocast():
                return module.unet(noisy_BCHW, t_B, context_BTC, vector_BV)

        return GuidedDenoiser(predict, context_2TC, vector_2V, prompt.scale)

    def _latent_shape(self, height_px: int, width_px: int) -> tuple[int, int, int]:
        return latent_shape(self.model.vae, height_px, width_px)

    def memory_lines(self, bucket_px: tuple[int, int]) -> list[str]:
        """What a step needs at a bucket's width and height, found by running it on shapes alone."""
        _, predict = self._on_shapes(bucket_px)
        return predict().lines()

    def choose_checkpoints(self, bucket_px: tuple[int, int]) -> None:
        """With --checkpoint_policy=auto recompute only what a bucket of that width and height needs for the limit."""
        memory = self.options.memory
        if memory.checkpoint_memory_gb is not None:
            step, predict = self._on_shapes(bucket_px)
            limit = memory.checkpoint_memory_gb * GIB
            compute_dtype = DTYPES[self.options.precision.mixed_precision]
            self.checkpoint_lines = choose_checkpoints(self.module, compute_dtype, step, predict, limit)

    def _on_shapes(self, bucket_px: tuple[int, int]) -> tuple[Callable[[Any], Tensor], Callable[[], MemoryEstimate]]:
        """A step of a data-less copy of the module, and the estimate of its memory."""
        width, height = bucket_px
        batch = self.options.data.train_batch_size
        tokens = Tokens(tuple(ids_BK77.to("meta") for ids_BK77 in self.tokenize([""] * batch).ids))
        noisy_BCHW = torch.empty(batch, *self._latent_shape(height, width), device="meta")
        compute_dtype = DTYPES[self.options.precision.mixed_precision]
        fused = devices.has_fused_attention(self.accelerator.device)

        def step(shapes: Any) -> Tensor:
            # "sdpa" stands for any fused kernel; written out, attention holds what "math" does.
            shapes.unet.set_attention_backend("sdpa" if fused else "math")
            t_B, size_ids_B6 = torch.zeros(batch, device="meta"), torch.zeros(batch, 6, device="meta")
            return shapes(noisy_BCHW, t_B, tokens, size_ids_B6).float().mean()

        def encode(shapes: nn.Module) -> Tensor:
            return encode_images(shapes, torch.empty(batch, height, width, 3, dtype=torch.uint8, device="meta"))

        optimizer, memory, ema = self.options.optimizer, self.options.memory, self.options.ema
        compiled = self.options.compiling.torch_compile
        training = Training(
            partial(
                make_optimizer,
                optimizer.optimizer_type,
                arguments=optimizer.optimizer_args,
                bf16=bf16_update(self.options.precision, self.seed),
            ),
            sharding_kind(optimizer.sharding, optimizer.optimizer_type),
            self.accelerator.num_processes,
            memory.fused_backward_pass,
            ema.use_ema and not ema.offload_ema,
            [list(block.parameters()) for block in self.swapped],
            self.options.run.gradient_accumulation_steps,
            [list(block.parameters()) for block in self.module.unet.blocks()] if compiled else (),
        )
        return step, estimator(self.module, self.encoders.vae, compute_dtype, step, encode, training)


def pretrain(options: TrainingOptions, families: Sequence[str], signals: Signals, started: float) -> None:
    """Train as the options of sdxl_pretrain.py have it; `library.script` gives every recipe these parameters."""
    run(options, partial(SDXLPretraining, options), partial(load_token_counter, options), signals, started)
