"""What a run trains: facts that its processes compare before the first step, and that a training state holds."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from library.diffusion.schedule import NoiseSchedule, Prediction
from library.models.denoiser import Denoiser
from library.models.model import Model
from library.models.text_encoders import used_tensors
from library.options.training import TrainingOptions

_DIGEST_LETTERS = 12
_NUMBERS_READ = 4  # of each tensor

Identity = Mapping[str, str]


def identify(
    options: TrainingOptions,
    model: Model,
    recipe: str,
    module: Denoiser,
    prediction: Prediction,
    schedule: NoiseSchedule,
) -> Identity:
    """What is learned, each fact under the name that a message gives it.

    A run with another identity learns something else from the same samples. Weights that train are not among the
    facts: a state holds those. Networks that do not train are told by digests.

    Args:
        model: as it was loaded, before anything is cast.
        recipe: the recipe's name.
        module: the model's networks, what trains of them marked by requires_grad.
        schedule: on the CPU.
    """
    snr = "a zero terminal SNR" if schedule.ends_in_pure_noise else "an SNR above zero at its end"
    facts: dict[str, str] = {
        "the family": model.family.title,
        "the recipe": recipe,
        "the prediction type": prediction.name,
        "the noise schedule": f"{schedule.timesteps} timesteps with {snr} "
        f"({short_digest(schedule.alphas_cumprod_S.numpy().tobytes())})",
        "the caption length in tokens": str(options.model.max_token_length or 77),
        "the text encoders' outputs": ", ".join(str(use.skipped_layers) for use in module.uses)
        + " layers left out at the end",
        "the weights in captions": "read" if options.model.weighted_captions else "not read",
        "the VAE's encoder": _vae_fact(model.vae),
    }
    for number, tokenizer in enumerate(model.tokenizers, start=1):
        words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.eos_token_id])
        facts[f"tokenizer {number}"] = short_digest(words.encode())
    encoders = zip(model.text_encoders, module.trained_encoders, module.uses, strict=True)
    for number, (encoder, trained, use) in enumerate(encoders, start=1):
        used = used_tensors(encoder, use)
        facts[f"text encoder {number}"] = "trains" if trained else f"frozen, weights {tensors_digest(used)}"
    frozen = {name: weight for name, weight in module.unet.named_parameters() if not weight.requires_grad}
    facts["the U-Net's frozen weights"] = f"{len(frozen)} tensors, {tensors_digest(frozen)}" if frozen else "none"
    return facts


def _vae_fact(vae: Any) -> str:
    """What the latents depend on: the encoder's weights, and by what its output is shifted and multiplied."""
    encoder = {f"encoder.{name}": tensor for name, tensor in vae.encoder.state_dict().items()}
    quant = getattr(vae, "quant_conv", None)
    encoder |= {f"quant_conv.{name}": tensor for name, tensor in ({} if quant is None else quant.state_dict()).items()}
    settings = [vae.config.get(name) for name in ("scaling_factor", "shift_factor", "latents_mean", "latents_std")]
    shift = short_digest(repr(settings[1:]).encode())
    return f"scaling factor {settings[0]:g}, shift {shift}, weights {tensors_digest(encoder)}"


def weights_digest(module: nn.Module) -> str:
    """A digest of the first few numbers of every tensor: another model is told apart without reading all of it."""
    return tensors_digest(module.state_dict())


def tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the names and the first few numbers of tensors."""
    heads = {name: tensor.detach().flatten()[:_NUMBERS_READ] for name, tensor in tensors.items()}
    parts = (f"{name} {head.float().cpu().tolist()}".encode() for name, head in sorted(heads.items()))
    return short_digest(*parts)


def bits_digest(tensors: Mapping[str, Tensor]) -> str:
    """A digest of the names and of the sum of each tensor's bits as whole numbers: exact, and told by any one bit."""
    kinds = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    sums = (
        f"{name} {tensor.detach().cpu().contiguous().view(kinds[tensor.element_size()]).sum(dtype=torch.int64)}"
        for name, tensor in sorted(tensors.items())
    )
    return short_digest(*(text.encode() for text in sums))


def changed(saved: Mapping[str, Any], now: Identity) -> list[str]:
    """The facts of a state that are other ones now, each as a message has it."""
    return [
        f"{name} ({saved[name]} then, {now.get(name, 'none')} now)" for name in saved if saved[name] != now.get(name)
    ] + [f"{name} (unknown then, {now[name]} now)" for name in now if name not in saved]


def short_digest(*parts: bytes) -> str:
    """The first letters of a SHA-256 digest over parts of known length, for facts that people read."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:_DIGEST_LETTERS]
