"""All parts of one SDXL model, in memory."""

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

    from library.models.unet import UNet

# The scheduler that SDXL's base model is published with; single files do not carry one.
DEFAULT_SCHEDULER: dict[str, Any] = {
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
}


@dataclass
class SDXLModel:
    """The networks, the tokenizers and the scheduler's configuration (diffusers' scheduler_config.json)."""

    unet: "UNet"
    vae: Any  # diffusers' AutoencoderKL, whose classes the type checker cannot follow
    text_encoder1: "CLIPTextModel"
    text_encoder2: "CLIPTextModelWithProjection"
    tokenizer1: "CLIPTokenizer"
    tokenizer2: "CLIPTokenizer"
    scheduler_config: dict[str, Any] = field(default_factory=lambda: dict(DEFAULT_SCHEDULER))

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts, in diffusers' words: "epsilon" or "v_prediction"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))
