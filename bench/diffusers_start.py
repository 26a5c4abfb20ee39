"""What a training script on diffusers' own classes does from its start to the end of its first optimizer step.

    python bench/diffusers_start.py MODEL PICTURES

The counterpart in bench/end_to_end.py: the imports and the order of diffusers' SDXL example (train_text_to_image_sdxl),
with pictures and captions (.jpg, .txt) from a folder. It is given less to do than the example: no `datasets`, no
argument parser, no tracker, and it encodes its first batch, not the whole set.
"""

import sys
import time
from pathlib import Path

import accelerate  # noqa: F401
import numpy as np  # noqa: F401
import torch
import torch.nn.functional as F
import torch.utils.checkpoint
import transformers  # noqa: F401
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, set_seed  # noqa: F401
from diffusers import AutoencoderKL, DDPMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel  # noqa: F401
from diffusers.optimization import get_scheduler
from diffusers.training_utils import EMAModel, compute_snr  # noqa: F401
from PIL import Image
from torchvision import transforms
from transformers import AutoTokenizer, CLIPTextModel, CLIPTextModelWithProjection

SIDE_PX, BATCH = 64, 2


def main(model: str, folder: Path) -> None:
    """Load, take one step."""
    accelerator = Accelerator()
    tokenizers = [AutoTokenizer.from_pretrained(model, subfolder=name) for name in ("tokenizer", "tokenizer_2")]
    noise_scheduler = DDPMScheduler.from_pretrained(model, subfolder="scheduler")
    encoders = (
        CLIPTextModel.from_pretrained(model, subfolder="text_encoder"),
        CLIPTextModelWithProjection.from_pretrained(model, subfolder="text_encoder_2"),
    )
    vae = AutoencoderKL.from_pretrained(model, subfolder="vae")
    unet = UNet2DConditionModel.from_pretrained(model, subfolder="unet")
    for frozen in (vae, *encoders):
        frozen.requires_grad_(False)
        frozen.to(accelerator.device)
    unet.train()
    optimizer = torch.optim.AdamW(unet.parameters(), lr=1e-4)
    schedule = get_scheduler("constant", optimizer=optimizer, num_warmup_steps=0, num_training_steps=1)
    prepare = transforms.Compose(
        [
            transforms.Resize(SIDE_PX),
            transforms.CenterCrop(SIDE_PX),
            transforms.ToTensor(),
            transforms.Normalize([0.5], [0.5]),
        ]
    )
    paths = sorted(folder.glob("*.jpg"))

    def collate(batch: list[Path]) -> tuple[torch.Tensor, list[str]]:
        pictures = [prepare(Image.open(path).convert("RGB")) for path in batch]
        return torch.stack(pictures), [path.with_suffix(".txt").read_text() for path in batch]

    loader = torch.utils.data.DataLoader(paths, batch_size=BATCH, shuffle=True, collate_fn=collate)
    unet, optimizer, loader, schedule = accelerator.prepare(unet, optimizer, loader, schedule)
    pixels_BCHW, captions = next(iter(loader))
    with torch.no_grad():
        latents_BCHW = vae.encode(pixels_BCHW).latent_dist.sample() * vae.config.scaling_factor
        states, pooled_BD = [], None
        for tokenizer, encoder in zip(tokenizers, encoders, strict=True):
            ids_BT = tokenizer(captions, padding="max_length", max_length=77, truncation=True, return_tensors="pt")
            out = encoder(ids_BT.input_ids, output_hidden_states=True)
            pooled_BD = out[0]
            states.append(out.hidden_states[-2])
    noise_BCHW = torch.randn_like(latents_BCHW)
    t_B = torch.randint(0, noise_scheduler.config.num_train_timesteps, (BATCH,))
    size_ids_B6 = torch.tensor([[SIDE_PX, SIDE_PX, 0, 0, SIDE_PX, SIDE_PX]] * BATCH, dtype=torch.float32)
    noisy_BCHW = noise_scheduler.add_noise(latents_BCHW, noise_BCHW, t_B)
    conditions = {"text_embeds": pooled_BD, "time_ids": size_ids_B6}
    predicted_BCHW = unet(noisy_BCHW, t_B, torch.cat(states, dim=-1), added_cond_kwargs=conditions).sample
    loss = F.mse_loss(predicted_BCHW.float(), noise_BCHW.float())
    accelerator.backward(loss)
    accelerator.clip_grad_norm_(unet.parameters(), 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
    print(f"loss {loss.item()} first step ends {time.time()} {time.process_time()}")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
