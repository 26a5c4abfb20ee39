"""SDXL (Podell et al. 2023, 2307.01952): two text encoders, pooled text and sizes as vector conditions."""

import torch
from torch import Tensor

from library.models.family import EncoderSpec, EncoderUse, Family
from library.models.unet import UNetConfig, size_embedding

CLIP_L = EncoderSpec(
    folder="text_encoder",
    tokenizer_folder="tokenizer",
    tokenizer="openai/clip-vit-large-patch14",
    pad_id=None,
    hidden_act="quick_gelu",
    projection=False,
    width=768,
    single_file_prefix="conditioner.embedders.0.transformer.",
    single_file_names="transformers",
    single_file_unused=r"text_projection(\.weight)*|logit_scale",  # CLIP's own training has both
    lora_name="lora_te1",
)
OPENCLIP_BIGG = EncoderSpec(
    folder="text_encoder_2",
    tokenizer_folder="tokenizer_2",
    tokenizer="laion/CLIP-ViT-bigG-14-laion2B-39B-b160k",
    pad_id=0,  # OpenCLIP pads with id 0; the tokenizer on the hub is CLIP's, which pads with EOS
    hidden_act="gelu",
    projection=True,
    width=1280,
    single_file_prefix="conditioner.embedders.1.model.",
    single_file_names="open_clip",
    single_file_unused="logit_scale",  # the temperature of CLIP's own training
    lora_name="lora_te2",
)


def uses(clip_skip: int | None) -> tuple[EncoderUse, ...]:
    """The hidden states before the last layer (section 2.1), or of the layer that --clip_skip counts from the end."""
    skipped = (2 if clip_skip is None else clip_skip) - 1
    return EncoderUse(skipped, final_norm=False, pooled=False), EncoderUse(skipped, final_norm=False, pooled=True)


def vector_conditions(pooled_BP: Tensor, size_ids_B6: Tensor) -> Tensor:
    """(B, V): pooled text beside the six embedded sizes (section 2.2), in px."""
    return torch.cat([pooled_BP, size_embedding(size_ids_B6).to(pooled_BP.dtype)], dim=1)


SDXL = Family(
    name="sdxl",
    title="SDXL",
    architectures=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-xl-v1-base"),
    pipeline="StableDiffusionXLPipeline",
    pipeline_settings={"force_zeros_for_empty_prompt": True},
    encoders=(CLIP_L, OPENCLIP_BIGG),
    uses=uses,
    unet=UNetConfig(),
    scheduler={
        "_class_name": "EulerDiscreteScheduler",
        "beta_end": 0.012,
        "beta_schedule": "scaled_linear",
        "beta_start": 0.00085,
        "clip_sample": False,
        "interpolation_type": "linear",
        "num_train_timesteps": 1000,
        "prediction_type": "epsilon",
        "sample_max_value": 1.0,
        "set_alpha_to_one": False,
        "skip_prk_steps": True,
        "steps_offset": 1,
        "timestep_spacing": "leading",
        "trained_betas": None,
        "use_karras_sigmas": False,
    },
    vae_scaling_factor=0.13025,
    latents_ending="_sdxl.npz",
    vector=vector_conditions,
    default_px=dict.fromkeys(("epsilon", "v_prediction"), 1024),
)
