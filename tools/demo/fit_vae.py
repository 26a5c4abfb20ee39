#!/usr/bin/env python
"""Fit the demo's small VAE on rendered scenes and keep its weights in tools/demo/vae.safetensors.

    python tools/demo/fit_vae.py --minutes=15          # fit anew; done beforehand, the weights are in the repository
    python tools/demo/fit_vae.py --measure             # only measure the kept weights: PSNR, latents' mean and spread

The VAE is a diffusers AutoencoderKL, as SDXL's: 8 pixels a latent, 4 latent channels, 32 norm groups. After the fit
each latent channel is shifted and scaled, inside the weights, to mean 0 and standard deviation 1 / 0.13025 over the
scenes, so that SDXL's own scaling factor holds, also for readers of single files, which contain no scaling factor.

Shape legend: B batch, C channels, H W picture rows and columns, h w of the latents.
"""

import argparse
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.keyed_random import Stream, generator
from tools.demo.scenes import COLOURS, combinations, random_scene, render
from tools.demo.start_vae import set_start

WEIGHTS = Path(__file__).resolve().parent / "vae.safetensors"
SCALING_FACTOR = 0.13025  # SDXL's
SIZES = ((64, 64), (72, 56), (56, 72), (80, 48), (48, 80))  # the demo's buckets, width and height in px
_SILENT = "encoder.mid_block.attentions."
CONFIG: dict[str, Any] = {
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (64, 32, 32, 64),
    "down_block_types": ("DownEncoderBlock2D",) * 4,
    "up_block_types": ("UpDecoderBlock2D",) * 4,
    "layers_per_block": 1,
    "latent_channels": 4,
    "norm_num_groups": 32,
    "sample_size": 64,
    "scaling_factor": SCALING_FACTOR,
    "force_upcast": True,
}


def scene_batch(seed: int, numbers: range, size: tuple[int, int], free_colours: float = 0.0) -> Tensor:
    """Rendered scenes in -1 .. 1.

    Args:
        numbers: the scenes' numbers; seed, number and size determine a scene's picture.
        size: width and height in px.
        free_colours: share of scenes whose shape has any colour, so that the VAE learns more than the demo's colours.
    """
    pictures = []
    known = combinations()
    for number in numbers:
        random = generator(seed, Stream.AUGMENTATION, number, 1)
        scene = random_scene(random, known[random.integers(len(known))])
        if random.random() < free_colours:
            red, green, blue = (int(random.integers(256)) - channel for channel in COLOURS[scene.colour])
            scene = replace(scene, colour_shift=(red, green, blue))
        pictures.append(np.asarray(render(scene, *size)))
    return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1


def fit(vae: Any, minutes: float, seed: int, batch: int, rate: float, half: bool, first: int = 0) -> None:
    """Train the VAE in place on reconstruction, with a weak penalty for latents that differ from a unit normal."""
    trained = {name: parameter for name, parameter in vae.named_parameters() if not name.startswith(_SILENT)}
    parameters = [parameter.requires_grad_() for parameter in trained.values()]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.99), weight_decay=0.0)
    noise = torch.Generator().manual_seed(seed)
    started, step = time.perf_counter(), 0
    while (done := (time.perf_counter() - started) / (60 * minutes)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = rate * min(1, (step + 1) / 50) * (0.5 + 0.5 * math.cos(math.pi * done))
        numbers = range(first + step * batch, first + (step + 1) * batch)
        x_BCHW = scene_batch(seed, numbers, SIZES[step % len(SIZES)], free_colours=0.25)
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            posterior = vae.encode(x_BCHW).latent_dist
            mean_BChw, std_BChw = posterior.mean.float(), posterior.std.float()
            # More noise than the posterior has: the decoder has to bear a denoiser's small errors.
            spread_BChw = (std_BChw**2 + 0.1**2).sqrt()
            z_BChw = mean_BChw + spread_BChw * torch.randn(mean_BChw.shape, generator=noise)
            y_BCHW = vae.decode(z_BChw).sample.float()
        difference_BCHW = y_BCHW - x_BCHW
        kl = 0.5 * (mean_BChw**2 + std_BChw**2 - 1 - 2 * std_BChw.log()).mean()
        loss = difference_BCHW.pow(2).mean() + 0.1 * difference_BCHW.abs().mean() + 2e-4 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        step += 1
        if step % 25 == 0:
            psnr = 10 * math.log10(4 / difference_BCHW.pow(2).mean().item())
            print(f"step {step}, {100 * done:.0f} %: PSNR of the batch {psnr:.1f} dB, KL {kl.item():.2f}", flush=True)


@torch.no_grad()
def set_latent_statistics(vae: Any, pictures: Sequence[Tensor], std: float = 1 / SCALING_FACTOR) -> None:
    """Fold a shift and a scale per latent channel into the 1×1 convolutions around the latents.

    Afterwards the posterior's means over the pictures (batches x_BCHW of any sizes) have mean 0 and the given
    standard deviation per channel. Reconstructions are unchanged.
    """
    means_CN = torch.cat([vae.encode(x_BCHW).latent_dist.mean.transpose(0, 1).flatten(1) for x_BCHW in pictures], dim=1)
    shift_C = means_CN.mean(dim=1)
    scale_C = std / means_CN.std(dim=1)
    channels = len(scale_C)
    quant, post = vae.quant_conv, vae.post_quant_conv
    post.bias += post.weight[:, :, 0, 0] @ shift_C
    post.weight /= scale_C[None, :, None, None]
    quant.weight[:channels] *= scale_C[:, None, None, None]
    quant.bias[:channels] = (quant.bias[:channels] - shift_C) * scale_C
    quant.bias[channels:] += 2 * scale_C.log()  # the second half is the logarithm of the variance


@torch.no_grad()
def measure(vae: Any, seed: int = 7, count: int = 32) -> dict[str, Any]:
    """PSNR in dB (of the mean squared error over all pictures) and the scaled latents' statistics, on unseen scenes."""
    squared, latents = [], []
    for size in SIZES:
        x_BCHW = scene_batch(seed, range(count), size)
        posterior = vae.encode(x_BCHW).latent_dist
        y_BCHW = vae.decode(posterior.mean).sample.clamp(-1, 1)
        squared.append((y_BCHW - x_BCHW).pow(2).mean(dim=(1, 2, 3)))
        latents.append(posterior.mean.permute(1, 0, 2, 3).flatten(1) * vae.config.scaling_factor)
    latents_CN = torch.cat(latents, dim=1)
    squared_B = torch.cat(squared)
    return {
        "psnr_db": 10 * math.log10(4 / squared_B.mean().item()),
        "worst_psnr_db": 10 * math.log10(4 / squared_B.max().item()),
        "latents_mean": [round(v, 3) for v in latents_CN.mean(dim=1).tolist()],
        "latents_std": [round(v, 3) for v in latents_CN.std(dim=1).tolist()],
    }


def make_vae() -> Any:
    """An unfitted VAE whose encoder's attention is zero: scenes do not need it, and the file is smaller."""
    from diffusers import AutoencoderKL

    vae: Any = AutoencoderKL(**CONFIG)
    for parameter in vae.encoder.mid_block.attentions.parameters():
        parameter.data.zero_()
    return vae


def load_vae(weights: Path = WEIGHTS) -> Any:
    """The VAE with the kept weights, in fp32 (they are stored in fp16)."""
    from safetensors.torch import load_file

    vae = make_vae()
    kept = {name: tensor.float() for name, tensor in load_file(weights).items()}
    silent = {name: tensor for name, tensor in vae.state_dict().items() if name.startswith(_SILENT)}
    vae.load_state_dict({**kept, **silent})
    return vae.eval().requires_grad_(False)


def save_weights(vae: Any, weights: Path = WEIGHTS) -> None:
    """Keep the weights in fp16: half the size, no visible difference."""
    from safetensors.torch import save_file

    kept = {name: tensor for name, tensor in vae.state_dict().items() if not name.startswith(_SILENT)}
    save_file({name: tensor.half().contiguous() for name, tensor in kept.items()}, weights)


def main(argv: list[str] | None = None) -> int:
    """Fit or measure."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--measure", action="store_true", help="fit nothing")
    parser.add_argument("--out", type=Path, default=WEIGHTS, help="the weights' file (%(default)s)")
    parser.add_argument("--resume", action="store_true", help="start from the file's weights")
    parser.add_argument("--minutes", type=float, default=15.0, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=16, help="(%(default)s)")
    parser.add_argument("--learning_rate", type=float, default=2e-3, help="(%(default)s)")
    parser.add_argument("--no_bf16", action="store_true", help="for processors without fast bfloat16")
    parser.add_argument("--seed", type=int, default=1, help="(%(default)s)")
    args = parser.parse_args(argv)
    if not args.measure:
        torch.manual_seed(args.seed)
        vae = load_vae(args.out) if args.resume else make_vae()
        if not args.resume:
            set_start(vae)
        some = [scene_batch(args.seed, range(64), size) for size in SIZES]
        set_latent_statistics(vae, some, std=1.0)  # as the pull to a unit normal wants them
        fit(vae, args.minutes, args.seed, args.batch, args.learning_rate, half=not args.no_bf16)
        set_latent_statistics(vae, some)
        save_weights(vae, args.out)
    figures = measure(load_vae(args.out))
    print(
        ", ".join(
            f"{name} {value:.2f}" if isinstance(value, float) else f"{name} {value}" for name, value in figures.items()
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
