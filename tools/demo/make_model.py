#!/usr/bin/env python
"""Make a small SDXL model with fresh weights, in diffusers' layout.

    python tools/demo/make_model.py --out=test/output/demo/model

The model has all parts of SDXL: a U-Net of three levels with 0, 1 and 2 transformer layers and the size conditions,
two CLIP text encoders with their tokenizers, a VAE that reconstructs (its weights are kept here; fit_vae.py made them),
and the scheduler's configuration. As in SDXL, heads have 64 channels everywhere, the first text encoder uses quick_gelu
and the second gelu and a projection. The same seed writes the same weights.
"""

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from library.families import SDXL
from library.keyed_random import Stream, generator
from tools.demo.fit_vae import load_vae
from tools.demo.make_tokenizer import write_tokenizer
from tools.demo.own_out import write_out
from tools.demo.scenes import BACKGROUNDS, COLOURS, POSITIONS, SHAPES

HEAD_CHANNELS = 64
TEXT_WIDTHS = (64, 64)  # hidden sizes of the two text encoders
TEXT_LAYERS = 2
SIZE_CHANNELS = 256  # of the embedding of each of the 6 size conditions
CHANNELS = (64, 64, 64)  # of the U-Net's levels
TRANSFORMER_DEPTHS = (0, 1, 2)


def demo_words() -> list[str]:
    """Every word that a caption of the demo can have."""
    texts = [*COLOURS, *BACKGROUNDS, *SHAPES, *POSITIONS, "a an on background"]
    return sorted({word for text in texts for word in re.findall(r"[a-z]+", text)})


def make_unet() -> Any:
    """A U-Net of SDXL's topology at a small width, whose weights are not set yet."""
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=8,
        in_channels=4,
        out_channels=4,
        block_out_channels=CHANNELS,
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        # diffusers takes no 0; the first level has no attention, as in SDXL's own config, where it is 1, too.
        transformer_layers_per_block=tuple(max(depth, 1) for depth in TRANSFORMER_DEPTHS),
        attention_head_dim=tuple(channels // HEAD_CHANNELS for channels in CHANNELS),  # number of heads: a misnomer
        cross_attention_dim=sum(TEXT_WIDTHS),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=SIZE_CHANNELS,
        projection_class_embeddings_input_dim=6 * SIZE_CHANNELS + TEXT_WIDTHS[1],
        norm_num_groups=32,
    )


def make_text_encoders(vocabulary: int) -> tuple[Any, Any]:
    """Small text encoders of CLIP-L's and bigG's kinds, whose weights are not set yet."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    def config(width: int, hidden_act: str) -> CLIPTextConfig:
        return CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=width,
            intermediate_size=4 * width,
            num_hidden_layers=TEXT_LAYERS,
            num_attention_heads=width // HEAD_CHANNELS,
            max_position_embeddings=77,
            projection_dim=width,
            hidden_act=hidden_act,
            bos_token_id=0,  # these three as in SDXL's published configs
            eos_token_id=2,
            pad_token_id=1,
        )

    return (
        CLIPTextModel(config(TEXT_WIDTHS[0], "quick_gelu")),
        CLIPTextModelWithProjection(config(TEXT_WIDTHS[1], "gelu")),
    )


@torch.no_grad()
def initialise(module: nn.Module, seed: int, part: int) -> None:
    """Set every weight from the seed: matrices preserve the variance, residual branches start at 0.

    Matrices and convolutions get the standard deviation 1 / sqrt(fan in), biases 0, norms the identity. The last layer
    of every residual branch and of the whole U-Net is 0 (Goyal et al. 1706.02677, section 5.1; also Ho et al.
    2006.11239), so that the network begins as the identity and learns from the first step on.
    """
    for number, (name, parameter) in enumerate(module.named_parameters()):
        random = generator(seed, Stream.MODEL_INIT, part, number)
        if parameter.ndim == 1:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
            continue
        if _ends_a_branch(name):
            parameter.zero_()
            continue
        if "embedding.weight" in name:  # tokens and positions: unit vectors' scale, tokens above positions
            std = 0.3 if "position" in name else 1.0
        else:
            std = parameter[0].numel() ** -0.5
        parameter.copy_(torch.from_numpy(random.standard_normal(tuple(parameter.shape), dtype=np.float32)) * std)
        if name == "add_embedding.linear_1.weight":  # the text's pooled vector first, then the size conditions
            sizes = 6 * SIZE_CHANNELS
            parameter[:, :-sizes] *= (parameter.shape[1] / (parameter.shape[1] - sizes)) ** 0.5
            parameter[:, -sizes:] *= 0.2


def _ends_a_branch(name: str) -> bool:
    return name == "conv_out.weight" or name.endswith((".conv2.weight", ".proj_out.weight"))


def write_model(out: Path, seed: int = 1) -> None:
    """Write the whole model as a diffusers folder."""
    words = demo_words()
    for folder, pad_token in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        vocabulary = write_tokenizer(out / folder, words, pad_token)
    unet = make_unet()
    text_encoder1, text_encoder2 = make_text_encoders(vocabulary)
    for part, module in enumerate((unet, text_encoder1, text_encoder2)):
        initialise(module, seed, part)
    parts = {"unet": unet, "text_encoder": text_encoder1, "text_encoder_2": text_encoder2, "vae": load_vae()}
    for name, module in parts.items():
        module.save_pretrained(out / name)
    index = {
        "_class_name": "StableDiffusionXLPipeline",
        "force_zeros_for_empty_prompt": False,  # an empty prompt is encoded, here and in training
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "tokenizer_2": ["transformers", "CLIPTokenizer"],
        "unet": ["diffusers", "UNet2DConditionModel"],
        "vae": ["diffusers", "AutoencoderKL"],
    }
    (out / "scheduler").mkdir(exist_ok=True)
    (out / "scheduler/scheduler_config.json").write_text(json.dumps(SDXL.scheduler, indent=2) + "\n", encoding="utf-8")
    (out / "model_index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    for name, module in parts.items():
        print(f"{name}: {sum(parameter.numel() for parameter in module.parameters()) / 1e6:.2f} M parameters")


def main(argv: list[str] | None = None) -> int:
    """Write the model."""
    summary, _, details = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=summary, epilog=details, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", required=True, type=Path, help="folder of the model")
    parser.add_argument("--seed", type=int, default=1, help="of the fresh weights (%(default)s)")
    args = parser.parse_args(argv)
    write_out(parser, args.out, lambda: write_model(args.out, args.seed))
    print(f"model in {args.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
