"""Whether the parts of a model fit each other: what one puts out is what the next takes in.

Each part is built by its own sizes, and may be from another place (--vae, a folder put together by hand): parts that
do not fit would end in an error of shapes in the first step, or be trained on something else without a word.
"""

from typing import Any

from library.errors import InputError
from library.models.model import Model
from library.models.text_encoders import CHUNK_LENGTH
from library.models.unet import SIZE_EMBEDDING_DIM

SIZES = 6  # original height and width, crop top and left, target height and width
RGB = 3


def check_parts(model: Model, source: str, vae_source: str | None) -> None:
    """Raise InputError where two parts of a model do not fit; it names both and what each has.

    Args:
        source: the model's file, folder or hub name, for messages.
        vae_source: the same of a VAE that was given by --vae.
    """
    _check_vae(model, source, f"--vae {vae_source}" if vae_source else source)
    unet, encoders = model.unet.config, model.text_encoders
    for number, encoder in enumerate(encoders, start=1):
        positions = encoder.config.max_position_embeddings
        if positions < CHUNK_LENGTH:
            raise InputError(
                f"{source}: text encoder {number} has {positions} positions, and captions have {CHUNK_LENGTH} tokens: "
                "it is no CLIP text encoder of Stable Diffusion. Give a complete model."
            )
    widths = [encoder.config.hidden_size for encoder in encoders]
    if unet.context_dim != sum(widths):
        raise _unfit(source, "attends to text", unet.context_dim, _sum("the text encoders put out", widths), model)
    if model.family.vector is None:
        if unet.adm_in_channels is not None:
            raise _unfit(source, "takes vectors", unet.adm_in_channels, f"{model.family.title} has none", model)
        return
    pooled = [encoder.config.projection_dim for encoder in encoders if hasattr(encoder, "text_projection")]
    have = _sum("pooled text and sizes have", [*pooled, SIZES * SIZE_EMBEDDING_DIM])
    if unet.adm_in_channels != sum(pooled) + SIZES * SIZE_EMBEDDING_DIM:
        raise _unfit(source, "takes vectors", unet.adm_in_channels, have, model)


def _check_vae(model: Model, source: str, vae_source: str) -> None:
    unet, vae = model.unet.config, model.vae.config
    latents = vae.latent_channels
    if unet.in_channels == unet.out_channels != latents:
        raise InputError(
            f"{vae_source}: this VAE's latents have {latents} channels, and the U-Net in {source} takes "
            f"{unet.in_channels}: it is the VAE of another kind of model. Give an {model.family.title} VAE."
        )
    if unet.in_channels != latents:
        raise InputError(
            f"{source}: its U-Net takes {unet.in_channels} channels, and latents have {latents}: "
            "it is a model for inpainting or the like. Give a model that makes pictures from text alone."
        )
    if unet.out_channels != latents:
        raise InputError(
            f"{source}: its U-Net puts out {unet.out_channels} channels, and latents have {latents}: it predicts "
            "something else besides, which is not trained here. Give another model."
        )
    for what, channels in (("takes", vae.in_channels), ("makes", vae.out_channels)):
        if channels != RGB:
            raise InputError(f"{vae_source}: this VAE {what} pictures of {channels} channels, not of {RGB}.")


def _sum(what: str, widths: list[Any]) -> str:
    return f"{what} {' + '.join(map(str, widths))}" + (f" = {sum(widths)}" if len(widths) > 1 else "")


def _unfit(source: str, does: str, wanted: int | None, have: str, model: Model) -> InputError:
    return InputError(
        f"{source}: its parts do not fit each other: the U-Net {does} of {wanted or 0} channels, and {have}. Give a "
        f"complete {model.family.title} base model, all parts of which belong together."
    )
