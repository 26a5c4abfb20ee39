"""All parts of one model, in memory."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from library.errors import InputError
from library.models.family import EncoderUse, Family

if TYPE_CHECKING:
    from torch import Tensor

    from library.models.unet import UNet


LATENT_PX = 8  # pixels a side that a latent of the published VAEs stands for
UNET, VAE = "unet", "vae"  # as diffusers names the folders of a model's parts; text encoders have their specs'


@dataclass
class Model:
    """The networks, the tokenizers and the scheduler's configuration (diffusers' scheduler_config.json).

    Attributes:
        vae: diffusers' AutoencoderKL, whose classes the type checker cannot follow.
        text_encoders: transformers' CLIPTextModel or CLIPTextModelWithProjection, in the family's order.
        tokenizers: transformers' CLIPTokenizer, one for each text encoder.
        prediction_source: where the files that were read say what the U-Net predicts; "" where they do not.
        sample_size: latent rows and columns that pipelines draw where nobody asks for others, as unet/config.json has
            it; None: the family's.
        pipeline_settings: of model_index.json, in place of the family's.
        carried: tensors of the single file that was read, by their names in it, of which no output is made; they are
            written back into single files.
        originals: weights that do not train and were rounded to compute with, as they were read: by the part's folder
            and the parameter's name, on the CPU. They are written in place of the rounded ones.
    """

    family: Family
    unet: "UNet"
    vae: Any
    text_encoders: tuple[Any, ...]
    tokenizers: tuple[Any, ...]
    scheduler_config: dict[str, Any]
    prediction_source: str = ""
    sample_size: int | list[int] | None = None
    pipeline_settings: "Mapping[str, bool]" = field(default_factory=dict)
    carried: "Mapping[str, Tensor]" = field(default_factory=dict)
    originals: "Mapping[str, Mapping[str, Tensor]]" = field(default_factory=dict)

    @property
    def prediction_type(self) -> str:
        """What the U-Net predicts, in diffusers' words: "epsilon" or "v_prediction"."""
        return str(self.scheduler_config.get("prediction_type", "epsilon"))

    @property
    def architecture(self) -> str:
        """ModelSpec's name of what it is."""
        return self._by_prediction(self.family.architectures)

    @property
    def default_px(self) -> int:
        """Width and height of the pictures that such a model draws where nobody asks for others."""
        return self._by_prediction(self.family.default_px)

    @property
    def default_sample_size(self) -> int:
        """The same in latent rows and columns."""
        return self.default_px // LATENT_PX

    def weights(self, part: str) -> "dict[str, Tensor]":
        """The tensors of a part, by the names that they have in its network, as they are to be written.

        Args:
            part: its folder in diffusers' layout.
        """
        networks = {UNET: self.unet, VAE: self.vae}
        networks |= {spec.folder: one for spec, one in zip(self.family.encoders, self.text_encoders, strict=True)}
        return {**networks[part].state_dict(), **self.originals.get(part, {})}

    def uses(self, clip_skip: int | None) -> tuple[EncoderUse, ...]:
        """What is used of each text encoder, with --clip_skip (None: not given) and the tokenizers' own EOS.

        An id above EOS (a token that was added) is not taken for the end, as transformers takes it with published
        configurations, which say "the highest id" in place of EOS's.

        Raises:
            InputError: there is no such layer.
        """
        uses = self.family.uses(clip_skip)
        for encoder, use in zip(self.text_encoders, uses, strict=True):
            layers = encoder.config.num_hidden_layers
            if not 0 <= use.skipped_layers < layers:
                raise InputError(no_such_layer(clip_skip, layers))
        if not self.tokenizers:
            return uses
        ids = [tokenizer.eos_token_id for tokenizer in self.tokenizers]
        return tuple(replace(use, eos_id=eos_id) for use, eos_id in zip(uses, ids, strict=True))

    def _by_prediction(self, values: Mapping[str, Any]) -> Any:
        return values.get(self.prediction_type, values["epsilon"])


def no_such_layer(clip_skip: int | None, layers: int) -> str:
    """A sentence about --clip_skip that names none of a text encoder's layers."""
    return (
        f"--clip_skip={clip_skip} counts the text encoder's layers from the last, 1, back; this model's has {layers}: "
        f"give 1 to {layers}, or leave it out"
    )
