"""What tells the families of Stable Diffusion apart, as data and two functions; `library.families` has the families."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.unet import UNetConfig


@dataclass(frozen=True)
class EncoderSpec:
    """One text encoder of a family and the tokenizer before it.

    Attributes:
        folder, tokenizer_folder: their folders in diffusers' layout.
        tokenizer: hub name of the tokenizer that the family was trained with.
        pad_id: id that pads captions where that tokenizer's own files say otherwise; None: as they say.
        hidden_act: the activation, which single files do not tell: "quick_gelu" or "gelu".
        projection: whether it is a CLIPTextModelWithProjection.
        width: channels of its states in the published model; each of its heads has 64.
        single_file_prefix, single_file_names: where a single file has it, and by whose names.
        single_file_unused: a pattern for the names of tensors that no output is made of, as they end after what the
            prefix begins with, `transformer.` or `model.` (other programs leave that out).
        lora_name: how names in LoRA files begin.
    """

    folder: str
    tokenizer_folder: str
    tokenizer: str
    pad_id: int | None
    hidden_act: str
    projection: bool
    width: int
    single_file_prefix: str
    single_file_names: Literal["transformers", "open_clip"]
    single_file_unused: str
    lora_name: str


@dataclass(frozen=True)
class EncoderUse:
    """Which outputs of a text encoder condition the U-Net.

    Attributes:
        skipped_layers: how many of its last layers the text states leave out.
        final_norm: whether the text states go through its final norm.
        pooled: whether its projected state at EOS, after all layers, is the pooled vector.
        eos_id: the tokenizer's EOS; None: as the text encoder's configuration has it.
    """

    skipped_layers: int
    final_norm: bool
    pooled: bool
    eos_id: int | None = None


@dataclass(frozen=True)
class Family:
    """One family of models that share an architecture.

    Attributes:
        name: as flags and files have it: "sd1", "sd2" or "sdxl".
        title: as messages have it.
        architectures: ModelSpec's name of it, by prediction type ("epsilon", "v_prediction").
        pipeline: diffusers' class that draws with it.
        pipeline_settings: what that class's model_index.json says besides the parts.
        encoders: its text encoders in the order of the context's channels.
        uses: from --clip_skip (None: not given) to what is used of each text encoder.
        unet: the published U-Net's configuration; a single file whose U-Net has the same widths gets the same number
            of attention heads, which its shapes do not tell.
        scheduler: the scheduler's configuration that the family was published with; single files carry none.
        vae_scaling_factor: what latents are multiplied by.
        latents_ending: how sd-scripts ends the names of .npz files with latents for it.
        vector: from the pooled text (B, P) and six sizes in px (B, 6) to the U-Net's vector conditions (B, V);
            None: the U-Net has none.
        default_px: width and height of the pictures that it was trained on, by prediction type.
    """

    name: str
    title: str
    architectures: Mapping[str, str]
    pipeline: str
    pipeline_settings: Mapping[str, Any]
    encoders: tuple[EncoderSpec, ...]
    uses: Callable[[int | None], tuple[EncoderUse, ...]]
    unet: "UNetConfig"
    scheduler: Mapping[str, Any]
    vae_scaling_factor: float
    latents_ending: str
    vector: "Callable[[Tensor, Tensor], Tensor] | None"
    default_px: Mapping[str, int]
