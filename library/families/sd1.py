"""SD 1.x (Rombach et al. 2022, 2112.10752): CLIP-L's last states, a U-Net with 8 heads everywhere."""

from library.models.family import EncoderSpec, EncoderUse, Family
from library.models.unet import UNetConfig

CLIP_L = EncoderSpec(
    folder="text_encoder",
    tokenizer_folder="tokenizer",
    tokenizer="openai/clip-vit-large-patch14",
    pad_id=None,  # EOS
    hidden_act="quick_gelu",
    projection=False,
    width=768,
    single_file_prefix="cond_stage_model.transformer.",
    single_file_names="transformers",
    single_file_unused=r"text_projection(\.weight)*|logit_scale",  # CLIP's own training has both
    lora_name="lora_te",
)


def uses(clip_skip: int | None) -> tuple[EncoderUse, ...]:
    """The last layer's states after the final norm; with --clip_skip n those of the n-th layer from the end."""
    return (EncoderUse((1 if clip_skip is None else clip_skip) - 1, final_norm=True, pooled=False),)


SCHEDULER = {
    "_class_name": "PNDMScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "trained_betas": None,
}

# Without a classifier of unsafe pictures, which training has no need of.
PIPELINE_SETTINGS = {
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
}

SD1 = Family(
    name="sd1",
    title="SD 1.x",
    architectures=dict.fromkeys(("epsilon", "v_prediction"), "stable-diffusion-v1"),
    pipeline="StableDiffusionPipeline",
    pipeline_settings=PIPELINE_SETTINGS,
    encoders=(CLIP_L,),
    uses=uses,
    unet=UNetConfig(
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(1, 1, 1, 0),
        transformer_depth_middle=1,
        context_dim=768,
        adm_in_channels=None,
        num_heads=8,
        use_linear_in_transformer=False,
    ),
    scheduler=SCHEDULER,
    vae_scaling_factor=0.18215,
    latents_ending="_sd.npz",
    vector=None,
    default_px=dict.fromkeys(("epsilon", "v_prediction"), 512),
)
