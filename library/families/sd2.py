"""SD 2.x, the base models (epsilon, 512 px) and the 768-v ones: OpenCLIP-H's penultimate states, heads of 64.

The published folders hold 23 of OpenCLIP-H's 24 layers, so that the penultimate layer is the last of 23. Single files
hold the 24th as well, with the text projection and CLIP's temperature; no reader uses them (sd-scripts and diffusers
leave them out by name, the original code never calls the 24th layer), and files without them are read by all:
diffusers takes the number of layers from the configuration, the others load what there is.
"""

from library.families.sd1 import PIPELINE_SETTINGS, SCHEDULER
from library.models.family import EncoderSpec, EncoderUse, Family
from library.models.unet import UNetConfig

OPENCLIP_H = EncoderSpec(
    folder="text_encoder",
    tokenizer_folder="tokenizer",
    tokenizer="openai/clip-vit-large-patch14",  # the same vocabulary as OpenCLIP's, and found wherever SD 1.x is
    pad_id=0,  # "!", as OpenCLIP pads
    hidden_act="gelu",
    projection=False,
    width=1024,
    single_file_prefix="cond_stage_model.model.",
    single_file_names="open_clip",
    single_file_unused=r"transformer\.resblocks\.23\..*|text_projection(\.weight)*|logit_scale",
    lora_name="lora_te",
)


def uses(clip_skip: int | None) -> tuple[EncoderUse, ...]:
    """The states of the last of 23 layers after the final norm; with --clip_skip n of the n-th from the end."""
    return (EncoderUse((1 if clip_skip is None else clip_skip) - 1, final_norm=True, pooled=False),)


SD2 = Family(
    name="sd2",
    title="SD 2.x",
    architectures={"epsilon": "stable-diffusion-v2-512", "v_prediction": "stable-diffusion-v2-768-v"},
    pipeline="StableDiffusionPipeline",
    pipeline_settings=PIPELINE_SETTINGS,
    encoders=(OPENCLIP_H,),
    uses=uses,
    unet=UNetConfig(
        channel_mult=(1, 2, 4, 4),
        transformer_depth=(1, 1, 1, 0),
        transformer_depth_middle=1,
        context_dim=1024,
        adm_in_channels=None,
        upcast_attention=True,  # as 2.1's folders say: in fp16 its scores overflow
    ),
    scheduler={**SCHEDULER, "_class_name": "DDIMScheduler"},
    vae_scaling_factor=0.18215,
    latents_ending="_sd.npz",
    vector=None,
    default_px={"epsilon": 512, "v_prediction": 768},
)
