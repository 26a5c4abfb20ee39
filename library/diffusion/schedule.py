"""The noise schedule and the prediction types: the targets that the network learns to predict.

Legend: B batch, C channels, H W latent rows and columns, S diffusion timesteps.
Ho: "Denoising Diffusion Probabilistic Models" (2006.11239). Salimans: "Progressive Distillation" (2202.00512).
Lin: "Common Diffusion Noise Schedules and Sample Steps Are Flawed" (2305.08891).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from library.errors import InputError

TRAIN_TIMESTEPS = 1000
BETA_START, BETA_END = 0.00085, 0.012  # Stable Diffusion's schedule, "scaled_linear"


def betas(kind: str, start: float, end: float, timesteps: int) -> Tensor:
    """The variance added at each timestep, (S,) float64. `kind`: linear, or scaled_linear (linear in the root)."""
    if kind == "linear":
        return torch.linspace(start, end, timesteps, dtype=torch.float64)
    if kind == "scaled_linear":
        return torch.linspace(start**0.5, end**0.5, timesteps, dtype=torch.float64) ** 2
    raise InputError(f"scheduler_config.json: beta_schedule {kind!r} is not known; linear and scaled_linear are")


def rescale_zero_terminal_snr(alphas_cumprod_S: Tensor) -> Tensor:
    """Shift and scale sqrt(alpha_bar) so that it is 0 at the last timestep (Lin, algorithm 1)."""
    root = alphas_cumprod_S.sqrt()
    first, last = root[0].clone(), root[-1].clone()
    return ((root - last) * first / (first - last)) ** 2


@dataclass(frozen=True)
class NoiseSchedule:
    """The share of signal at each timestep: alpha_bar of Ho, equation 4."""

    alphas_cumprod_S: Tensor  # float32

    @classmethod
    def from_config(cls, config: Mapping[str, Any], zero_terminal_snr: bool = False) -> "NoiseSchedule":
        """The schedule of a diffusers scheduler's settings; missing settings have Stable Diffusion's values."""
        trained = config.get("trained_betas")
        beta_S = (
            torch.tensor(trained, dtype=torch.float64)
            if trained is not None
            else betas(
                config.get("beta_schedule", "scaled_linear"),
                config.get("beta_start", BETA_START),
                config.get("beta_end", BETA_END),
                config.get("num_train_timesteps", TRAIN_TIMESTEPS),
            )
        )
        alphas_cumprod_S = torch.cumprod(1 - beta_S, dim=0)
        if zero_terminal_snr or config.get("rescale_betas_zero_snr", False):
            alphas_cumprod_S = rescale_zero_terminal_snr(alphas_cumprod_S)
        return cls(alphas_cumprod_S.float())

    def to(self, device: torch.device) -> "NoiseSchedule":
        """The same schedule with its table on the device."""
        return NoiseSchedule(self.alphas_cumprod_S.to(device))

    @property
    def timesteps(self) -> int:
        """S, the number of timesteps."""
        return len(self.alphas_cumprod_S)

    @property
    def ends_in_pure_noise(self) -> bool:
        """True if alpha_bar is 0 at the last timestep: a zero terminal SNR."""
        return float(self.alphas_cumprod_S[-1]) == 0.0

    def signal_and_noise(self, t_B: Tensor) -> tuple[Tensor, Tensor]:
        """sqrt(alpha_bar) and sqrt(1 - alpha_bar) at the timesteps, each (B, 1, 1, 1)."""
        alpha_bar_B111 = self.alphas_cumprod_S[t_B][:, None, None, None]
        return alpha_bar_B111.sqrt(), (1 - alpha_bar_B111).sqrt()

    def add_noise(self, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """The noised latents x_t (Ho, equation 4)."""
        signal, noise = self.signal_and_noise(t_B)
        return signal * x0_BCHW + noise * noise_BCHW


@dataclass(frozen=True)
class Epsilon:
    """The network predicts the noise (Ho, equation 14)."""

    name: str = "epsilon"

    def target(self, schedule: NoiseSchedule, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the prediction is compared with."""
        return noise_BCHW

    def clean_and_noise(
        self, signal: float, noise: float, noisy_BCHW: Tensor, predicted_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The clean latents and the noise that a prediction takes noised latents apart into.

        Args:
            signal, noise: their shares in the noised latents, sqrt(alpha_bar) and sqrt(1 - alpha_bar).
        """
        return (noisy_BCHW - noise * predicted_BCHW) / signal, predicted_BCHW


@dataclass(frozen=True)
class VPrediction:
    """The network predicts the velocity sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 (Salimans, appendix D)."""

    name: str = "v_prediction"

    def target(self, schedule: NoiseSchedule, x0_BCHW: Tensor, noise_BCHW: Tensor, t_B: Tensor) -> Tensor:
        """What the prediction is compared with."""
        signal, noise = schedule.signal_and_noise(t_B)
        return signal * noise_BCHW - noise * x0_BCHW

    def clean_and_noise(
        self, signal: float, noise: float, noisy_BCHW: Tensor, predicted_BCHW: Tensor
    ) -> tuple[Tensor, Tensor]:
        """As Epsilon's; it holds where no signal is left, too, for signal² + noise² = 1."""
        return signal * noisy_BCHW - noise * predicted_BCHW, noise * noisy_BCHW + signal * predicted_BCHW


Prediction = Epsilon | VPrediction


def prediction_type(name: str) -> Prediction:
    """The prediction type of a scheduler's settings, by its diffusers name."""
    kinds: dict[str, Prediction] = {kind.name: kind for kind in (Epsilon(), VPrediction())}
    if name not in kinds:
        raise InputError(f"scheduler_config.json: prediction_type {name!r} is not known; {', '.join(kinds)} are")
    return kinds[name]
