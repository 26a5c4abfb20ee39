"""All parts of one model, in memory."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from library.models.family import Family

if TYPE_CHECKING:
    from library.models.unet import UNet


@dataclass
class Model:
    """The networks, the tokenizers and the scheduler's configuration (diffusers' scheduler_config.json).

    Attributes:
        vae: diffusers' AutoencoderKL, whose classes the type checker cannot follow.
        text_encoders: transformers' CLIPTextModel or CLIPTextModelWithProjection, in the family's order.
        tokenizers: transformers' CLIPTokenizer, one for each text encoder.
    """

    family: Family
    unet: "UNet"
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts, in diffusers' words: "epsilon" or "v_prediction"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))
