"""What encodes and does not train: the VAE, and text encoders where their outputs are cached.

Legend: B batch, C channels, H W rows and columns in px, h w of latents, K chunks of a caption, T text tokens.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from library import device as devices
from library.models.denoiser import Denoiser
from library.models.text import TextStates, Tokens
from library.models.text_encoders import encode
from library.models.vae import decode_latents, downscale_factor, encode_moments, latent_shape, sample_latents


class Encoders:
    """Encodes for training, for caches and for sample pictures, with whatever has left the device brought back."""

    def __init__(
        self,
        vae: Any,
        module: Denoiser,
        tokenizers: Sequence[Any],
        tokenize: Callable[[Sequence[str]], Tokens],
        autocast: Callable[[], AbstractContextManager],
        device: torch.device,
        vae_batch_size: int,
        text_batch_size: int,
    ) -> None:
        """
        Args:
            module: holds the text encoders until they are released.
            vae_batch_size: images that go through the VAE at once.
            text_batch_size: captions that are encoded at once for a cache.
        """
        self.vae = vae
        self._module, self._tokenizers, self._tokenize = module, tokenizers, tokenize
        self._autocast, self._device = autocast, device
        self._vae_batch_size, self._text_batch_size = vae_batch_size, text_batch_size
        self._released: tuple[Any, ...] = ()  # text encoders
        self._digests: dict[str, str] = {}

    def latents(self, images_BHWC: Tensor, noise_BChw: Tensor) -> Tensor:
        """A sample of the posterior of images."""
        moments = encode_moments(self.vae, devices.upload(images_BHWC, self._device), slice_size=self._vae_batch_size)
        return sample_latents(self.vae, *moments, devices.upload(noise_BChw, self._device))

    def cached_latents(self, mean_BChw: Tensor, std_BChw: Tensor, noise_BChw: Tensor) -> Tensor:
        """A sample of a cached posterior."""
        mean_BChw, std_BChw, noise_BChw = (
            devices.upload(part, self._device) for part in (mean_BChw, std_BChw, noise_BChw)
        )
        return sample_latents(self.vae, mean_BChw, std_BChw, noise_BChw)

    def decode(self, latents_BChw: Tensor) -> Tensor:
        """Pictures (B, H, W, C) in uint8."""
        home = next(self.vae.parameters()).device
        self.vae.to(self._device)
        pictures_BHWC = decode_latents(self.vae, latents_BChw)
        self.vae.to(home)
        return pictures_BHWC

    def text_states(self, module: Denoiser, tokens: Tokens) -> TextStates:
        """Text states of tokens, with the module's text encoders or the released ones."""
        if not self._released:
            return self._encoded(module.text_encoders, tokens)
        for encoder in self._released:
            encoder.to(self._device)
        states = self._encoded(self._released, tokens)
        for encoder in self._released:
            encoder.to("cpu")
        return states

    def image_digest(self) -> str:
        """Of the VAE's weights and precision."""
        return self._digest("image", lambda: _weights_digest(self.vae.encoder, getattr(self.vae, "quant_conv", None)))

    def caption_digest(self) -> str:
        """Of tokenizers, text encoders, what is used of them, their precision and the number of chunks."""

        def compute() -> str:
            # Its shape and numbers differ with the number of chunks, and with and without weighted captions.
            tokens = self._tokenize(["a (caption:1.5)"])
            example = [tensor.tolist() for tensor in (*tokens.ids, *tokens.weights)]
            words = [_tokenizer_facts(tokenizer) for tokenizer in self._tokenizers]
            weights = _weights_digest(*self._module.text_encoders)
            uses = [asdict(use) for use in self._module.uses]
            facts = [example, words, weights, uses, self._autocast_dtype()]
            return hashlib.sha256(json.dumps(facts, default=str).encode()).hexdigest()

        return self._digest("caption", compute)

    @torch.no_grad()
    def encode_images(self, images_BHWC: Tensor) -> tuple[Tensor, ...]:
        """Mean and standard deviation of the posterior, on the CPU, in the VAE's precision."""
        moments = encode_moments(self.vae, images_BHWC.to(self._device), slice_size=self._vae_batch_size)
        return tuple(moment_BChw.cpu() for moment_BChw in moments)

    @torch.no_grad()
    def encode_captions(self, captions: Sequence[str]) -> tuple[Tensor, ...]:
        """Text states (B, T, C) and pooled text (B, P), on the CPU, as training would compute them.

        Missing captions are filled up to the batch that is encoded at once, as in `encode_moments`.
        """
        filled = [*captions, *[""] * (self._text_batch_size - len(captions))]
        outputs = self._encoded(self._module.text_encoders, self._tokenize(filled))
        return tuple(output[: len(captions)].cpu() for output in outputs if output is not None)

    def _encoded(self, text_encoders: Any, tokens: Tokens) -> TextStates:
        ids, weights = (tuple(tensor.to(self._device) for tensor in part) for part in tokens)
        with self._autocast():
            return encode(text_encoders, Tokens(ids, weights), self._module.uses)

    @property
    def latent_px(self) -> int:
        """Pixels a side that one latent stands for."""
        return downscale_factor(self.vae)

    @property
    def latent_channels(self) -> int:
        """Of the VAE's latents."""
        return latent_shape(self.vae, 0, 0)[0]

    @property
    def latents_ending(self) -> str:
        """How the names of .npz files with latents end, as sd-scripts names them for the family."""
        return self._module.family.latents_ending

    @property
    def first_text_width(self) -> int:
        """How many channels of the text states are the first text encoder's, until it is released."""
        encoder: Any = self._module.text_encoders[0]
        return encoder.config.hidden_size

    def image_bytes(self, width_px: int, height_px: int) -> int:
        """Of the moments of one image."""
        channels, rows, columns = latent_shape(self.vae, height_px, width_px)
        return 2 * channels * rows * columns * self.vae.dtype.itemsize

    def release(self, images: bool, captions: bool) -> None:
        """Move to the CPU what is only needed for sample pictures from now on."""
        if images:
            self.vae.to("cpu")
        if captions:
            self._released = self._module.without_text_encoders()
            for encoder in self._released:
                encoder.to("cpu")
        devices.release_memory(self._device)

    def _autocast_dtype(self) -> str:
        """The precision that products are computed in, whatever that of the weights: of --mixed_precision."""
        kind = self._device.type
        with self._autocast():
            return str(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else "weights"

    def _digest(self, of: str, compute: Callable[[], str]) -> str:
        if of not in self._digests:
            self._digests[of] = compute()
        return self._digests[of]


def _tokenizer_facts(tokenizer: Any) -> Any:
    """All that a tokenizer's words depend on, as JSON has it; not how long texts are cut, which calls change."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        ranks = getattr(tokenizer, "bpe_ranks", {})
        return [sorted(tokenizer.get_vocab().items()), sorted((str(pair), rank) for pair, rank in ranks.items())]
    content = json.loads(backend.to_str())
    return [content[part] for part in ("normalizer", "pre_tokenizer", "post_processor", "added_tokens", "model")]


def _weights_digest(*networks: nn.Module | None) -> str:
    """Of all numbers in all tensors, and of their precision."""
    found = hashlib.sha256()
    for network in networks:
        for name, tensor in ({} if network is None else network.state_dict()).items():
            found.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            found.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()
