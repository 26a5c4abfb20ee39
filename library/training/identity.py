"""What a run trains: facts that its processes compare before the first step, and that a training state holds."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from library.diffusion.schedule import NoiseSchedule, Prediction
from library.models.model import Model
from library.options.training import TrainingOptions

_DIGEST_LETTERS = 12
_NUMBERS_READ = 4  # of each tensor

Identity = Mapping[str, str]


def identify(
    options: TrainingOptions,
    model: Model,
    recipe: str,
    trains: Sequence[bool],
    prediction: Prediction,
    schedule: NoiseSchedule,
) -> Identity:
    """What is learned, each fact under the name that a message gives it.

    A run with another identity learns something else from the same samples. Weights that train are not among the
    facts: a state holds those. Networks that do not train are told by digests.

    Args:
        model: as it was loaded, before anything is cast.
        recipe: the recipe's name.
        trains: whether something of each text encoder trains.
        schedule: on the CPU.
    """
    snr = "a zero terminal SNR" if schedule.ends_in_pure_noise else "an SNR above zero at its end"
    facts: dict[str, str] = {
        "the family": model.family.title,
        "the recipe": recipe,
        "the prediction type": prediction.name,
        "the noise schedule": f"{schedule.timesteps} timesteps with {snr} "
        f"({_digest(schedule.alphas_cumprod_S.numpy().tobytes())})",
        "the caption length in tokens": str(options.model.max_token_length or 77),
        "the text encoders' outputs": ", ".join(str(use.skipped_layers) for use in model.uses(options.clip_skip))
        + " layers left out at the end",
        "the weights in captions": "read" if options.model.weighted_captions else "not read",
        "the VAE": f"scaling factor {model.vae.config.scaling_factor:g}, weights {weights_digest(model.vae)}",
    }
    for number, tokenizer in enumerate(model.tokenizers, start=1):
        words = json.dumps([sorted(tokenizer.get_vocab().items()), tokenizer.pad_token_id, tokenizer.eos_token_id])
        facts[f"tokenizer {number}"] = _digest(words.encode())
    for number, (encoder, trained) in enumerate(zip(model.text_encoders, trains, strict=True), start=1):
        facts[f"text encoder {number}"] = "trains" if trained else f"frozen, weights {weights_digest(encoder)}"
    return facts


def weights_digest(module: nn.Module) -> str:
    """A digest of the first few numbers of every tensor: another model is told apart without reading all of it."""
    heads = {name: tensor.detach().flatten()[:_NUMBERS_READ] for name, tensor in module.state_dict().items()}
    parts = (f"{name} {head.float().cpu().tolist()}".encode() for name, head in sorted(heads.items()))
    return _digest(*parts)


def changed(saved: Mapping[str, Any], now: Identity) -> list[str]:
    """The facts of a state that are other ones now, each as a message has it."""
    return [
        f"{name} ({saved[name]} then, {now.get(name, 'none')} now)" for name in saved if saved[name] != now.get(name)
    ] + [f"{name} (unknown then, {now[name]} now)" for name in now if name not in saved]


def _digest(*parts: bytes) -> str:
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "little"))
        digest.update(part)
    return digest.hexdigest()[:_DIGEST_LETTERS]
