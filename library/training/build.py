"""From options to the parts of a run: model, recipe, placement, encoders, objective, task."""

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from accelerate import Accelerator

from library.data.micro_batch import Tokenize
from library.diffusion.schedule import NoiseSchedule, Prediction
from library.models.denoiser import frozen_copy
from library.models.family import Family
from library.models.files.read import load_model, load_tokenizers
from library.models.model import Model
from library.models.prediction import check_v2, choose_prediction
from library.models.text_encoders import CHUNK_TOKENS, tokenize_all
from library.models.token_counts import TokenCounter
from library.models.vae import choose_attention
from library.options.prompts import PromptFile
from library.options.training import TrainingOptions
from library.signals import Signals
from library.training.encoders import Encoders
from library.training.engine.placement import Placement, place
from library.training.identity import Identity, identify
from library.training.memory.step_memory import StepMemory
from library.training.objective import Objective
from library.training.preview import Previewer
from library.training.recipes.recipe import Recipe
from library.training.task import Task

logger = logging.getLogger(__name__)

MakeRecipe = Callable[[TrainingOptions, Model], Recipe]


@dataclass
class Parts:
    """What a run is made of once its model is loaded.

    Attributes:
        tokenize: from captions to tokens; called in the loader's workers.
        token_counter: counts the tokens of captions.
        identity: what is learned, for the other processes and for training states.
        lines: what is resolved about the model, for the log.
    """

    model: Model
    recipe: Recipe
    placement: Placement
    encoders: Encoders
    task: Task
    tokenize: Tokenize
    token_counter: TokenCounter
    memory: StepMemory
    identity: Identity
    lines: list[str] = field(default_factory=list)

    def choose_checkpoints(self, bucket_wh_px: tuple[int, int]) -> None:
        """Decide what is recomputed in backward, by the largest bucket's width and height."""
        self.lines += self.memory.choose_checkpoints(bucket_wh_px)


def load_token_counter(options: TrainingOptions, families: Sequence[Family]) -> TokenCounter:
    """A token counter of a model of which nothing else is loaded."""
    model = options.model
    tokenizers = load_tokenizers(model.pretrained_model_name_or_path, families, options.text_encoders.tokenizers)
    return TokenCounter(tokenizers, model.max_token_length, model.weighted_captions)


def build_parts(
    options: TrainingOptions,
    families: Sequence[Family],
    make_recipe: MakeRecipe,
    accelerator: Accelerator,
    seed: int,
    signals: Signals,
) -> Parts:
    """Load the model and make all that a run needs of it.

    Raises:
        InputError: the model cannot be read, or options do not go together with it.
    """
    # A dry run answers whether the device is large enough: it must not need the device's memory for it.
    device = torch.device("cpu") if options.run.dry_run else accelerator.device
    source = options.model.pretrained_model_name_or_path
    vae = f" and the VAE {options.model.vae}" if options.model.vae else ""
    logger.info("loading the model %s%s", source, vae)
    model = load_model(source, families, vae=options.model.vae, tokenizers=options.text_encoders.tokenizers)
    check_v2(options.v2, model.family, source)
    chosen = choose_prediction(
        model,
        source,
        v_parameterization=options.objective.v_parameterization,
        zero_terminal_snr=options.objective.zero_terminal_snr,
    )
    for warning in chosen.warnings:
        logger.warning(warning)
    model.scheduler_config = chosen.scheduler_config
    prediction, schedule = chosen.prediction, chosen.schedule
    counter = TokenCounter(model.tokenizers, options.model.max_token_length, options.model.weighted_captions)
    previewer = _previewer(options, prediction, schedule, accelerator, seed, counter, signals)
    tokenize = partial(
        tokenize_all,
        model.tokenizers,
        max_token_length=options.model.max_token_length,
        weighted=options.model.weighted_captions,
    )
    recipe = make_recipe(options, model)
    identity = identify(options, model, recipe.name, recipe.module, prediction, schedule)  # before anything is cast
    placement = place(recipe.module, options, device)
    encoders = _encoders(options, model, recipe, placement, tokenize, accelerator)
    objective = Objective(prediction, schedule.to(device), seed, device)
    processes, batch_size = accelerator.num_processes, options.data.train_batch_size
    return Parts(
        model,
        recipe,
        placement,
        encoders,
        Task(recipe, objective, encoders, previewer),
        tokenize,
        counter,
        StepMemory(options, placement, encoders.vae, tokenize([""] * batch_size), accelerator.device, processes, seed),
        identity,
        [
            f"model: {source}, VAE: {options.model.vae or 'its own'}",
            *chosen.lines,
            f"VAE in {str(encoders.vae.dtype).removeprefix('torch.')}",
            f"attention backend asked for: {placement.attention_backend}",
            *recipe.lines(),
            *_prompt_lines(options.preview.prompts, counter),
            *placement.lines,
        ],
    )


def _previewer(
    options: TrainingOptions,
    prediction: Prediction,
    schedule: NoiseSchedule,
    accelerator: Accelerator,
    seed: int,
    counter: TokenCounter,
    signals: Signals,
) -> Previewer | None:
    """What samples the pictures that --sample_prompts asks for, checked before anything trains."""
    preview = options.preview
    if preview.prompts is None:
        return None
    previewer = Previewer(
        preview.prompts.prompts,
        options.saving.output_dir,
        options.saving.output_name,
        preview.sample_sampler,
        schedule,
        prediction,
        seed,
        accelerator.autocast,
        counter.tokenize_whole,
        signals.stop_if_requested,
    )
    previewer.check()
    return previewer


def _prompt_lines(file: PromptFile | None, counter: TokenCounter) -> list[str]:
    """Which prompts are drawn, for the log, and which of them are longer than a caption can be in training."""
    if file is None:
        return ["sample prompts: none"]
    prompts = file.prompts
    counts = (counter([prompt.prompt for prompt in prompts]), counter([prompt.negative_prompt for prompt in prompts]))
    longest = [max(tokens) for tokens in zip(*counts, strict=True)]
    return [
        f"sample prompts: {file}",
        *(
            f"sample prompt {number} has {tokens} tokens: it is drawn by all of them, in chunks of {CHUNK_TOKENS}, and "
            f"captions train by their first {counter.most} (--max_token_length): {prompt.prompt:.60}…"
            for number, (prompt, tokens) in enumerate(zip(prompts, longest, strict=True), start=1)
            if tokens > counter.most
        ),
    ]


def _encoders(
    options: TrainingOptions,
    model: Model,
    recipe: Recipe,
    placement: Placement,
    tokenize: Tokenize,
    accelerator: Accelerator,
) -> Encoders:
    """What encodes and does not train, on the device."""
    vae_dtype = torch.float32 if options.model.no_half_vae else placement.compute_dtype
    if vae_dtype == torch.float16 and not options.model.vae and model.family.name == "sdxl":
        logger.warning(
            "the model's own VAE runs in fp16; SDXL's stock VAE overflows there: if the loss is not finite, use "
            "--vae=madebyollin/sdxl-vae-fp16-fix or --no_half_vae"
        )
    batch_size, caches = options.data.train_batch_size, options.caches
    vae = frozen_copy(model.vae, vae_dtype).to(placement.device)
    choose_attention(vae)
    return Encoders(
        vae,
        recipe.module,
        model.tokenizers,
        tokenize,
        accelerator.autocast,
        placement.device,
        vae_batch_size=caches.vae_batch_size or batch_size,
        text_batch_size=caches.text_encoder_batch_size or batch_size,
    )
