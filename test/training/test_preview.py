"""Sample pictures against diffusers' own pipeline: same weights, same noise, same sampler, same picture."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import StableDiffusionXLPipeline
from PIL import Image

import sdxl_pretrain
from library.diffusion.samplers import make_sampler
from library.diffusion.schedule import Epsilon, NoiseSchedule
from library.keyed_random import Stream, generator

WIDTH, HEIGHT, STEPS, SEED = 24, 32, 3, 7
GUIDANCE = 80.0


def sampled_by_us(model_folder, out, options):
    """What the trainer samples before its first step."""
    image_folder = out / "1_red picture"
    image_folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), (220, 40, 40)).save(image_folder / "red.png")
    prompt = f"a red cat --n dog --w {WIDTH} --h {HEIGHT} --s {STEPS} --d {SEED} {options}"
    (out / "prompts.txt").write_text(prompt)
    AcceleratorState._reset_state(reset_partial_state=True)
    status = sdxl_pretrain.main(
        [
            f"--pretrained_model_name_or_path={model_folder}", f"--train_data_dir={out}", f"--output_dir={out / 'run'}",
            "--resolution=32,32", "--bucket_reso_steps=8", "--max_train_steps=1", "--max_data_loader_n_workers=0",
            f"--sample_prompts={out / 'prompts.txt'}", "--sample_at_first",
        ]
    )  # fmt: skip
    assert status == 0
    (picture,) = (out / "run" / "sample").glob("*.png")
    return np.asarray(Image.open(picture)).astype(int)


def sampled_by_diffusers(model_folder, sampler, guidance):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model_folder)
    pipeline.scheduler = make_sampler(sampler, NoiseSchedule.from_config({}), Epsilon())
    pipeline.set_progress_bar_config(disable=True)
    factor = pipeline.vae_scale_factor
    random = generator(SEED, Stream.PREVIEW)
    random.integers(2**63)  # the seed of samplers that draw noise of their own
    noise = random.standard_normal((1, 4, HEIGHT // factor, WIDTH // factor), dtype=np.float32)
    picture = pipeline(
        "a red cat", negative_prompt="dog", width=WIDTH, height=HEIGHT, num_inference_steps=STEPS,
        guidance_scale=guidance, latents=torch.from_numpy(noise), output_type="np",
    ).images[0]  # fmt: skip
    return (picture * 255).round().astype(int)


@pytest.mark.parametrize(("sampler", "guidance"), [("ddim", GUIDANCE), ("euler", GUIDANCE), ("euler", 1.0)])
def test_a_sample_is_the_picture_of_diffusers_pipeline(tiny_sdxl_folder, tmp_path, sampler, guidance):
    ours = sampled_by_us(tiny_sdxl_folder, tmp_path, f"--ss {sampler} --l {guidance}")
    theirs = sampled_by_diffusers(tiny_sdxl_folder, sampler, guidance)
    assert ours.shape == theirs.shape == (HEIGHT, WIDTH, 3)
    assert np.ptp(ours) > 20  # not a plain surface, which would show nothing
    assert np.abs(ours - theirs).max() <= 1  # rounding to 8 bits


def test_guidance_is_in_the_picture(tiny_sdxl_folder, tmp_path):
    """Random weights hardly listen to their text: without a large scale the test above would show nothing."""
    plain, guided = (
        sampled_by_us(tiny_sdxl_folder, tmp_path / str(scale), f"--ss euler --l {scale}") for scale in (1, GUIDANCE)
    )
    assert np.abs(plain - guided).max() > 10
