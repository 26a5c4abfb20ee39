"""Sample pictures against diffusers' own pipeline: same weights, same noise, same sampler, same picture."""

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState
from diffusers import DDIMScheduler, EulerDiscreteScheduler, StableDiffusionXLPipeline
from PIL import Image

import sdxl_pretrain
from library.keyed_random import Stream, generator
from library.training import preview

WIDTH, HEIGHT, STEPS, SEED = 24, 32, 4, 7
GUIDANCE = 80.0


def sampled_by_us(model_folder, out, options, prompt="a red cat"):
    """What the trainer samples before its first step."""
    image_folder = out / "1_red picture"
    image_folder.mkdir(parents=True)
    Image.new("RGB", (32, 32), (220, 40, 40)).save(image_folder / "red.png")
    prompt = f"{prompt} --n dog --w {WIDTH} --h {HEIGHT} --s {STEPS} --d {SEED} {options}"
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


def in_chunks(pipeline, *chunks):
    """A prompt's states and pooled vector, each chunk's by diffusers, joined as our chunks are."""
    encoded = [pipeline.encode_prompt(chunk, do_classifier_free_guidance=False) for chunk in chunks]
    states = [one[0] for one in encoded]
    joined = [states[0][:, :1], *(one[:, 1:-1] for one in states), states[-1][:, -1:]]
    return torch.cat(joined, dim=1), encoded[0][2]


def sampled_by_diffusers(model_folder, sampler, guidance, chunks=("a red cat",)):
    pipeline = StableDiffusionXLPipeline.from_pretrained(model_folder)
    settings = {"clip_sample": False, "set_alpha_to_one": True} if sampler == "ddim" else {}
    kind = {"ddim": DDIMScheduler, "euler": EulerDiscreteScheduler}[sampler]
    pipeline.scheduler = kind.from_config(pipeline.scheduler.config, timestep_spacing="trailing", **settings)
    pipeline.set_progress_bar_config(disable=True)
    factor = pipeline.vae_scale_factor
    random = generator(SEED, Stream.PREVIEW)
    random.integers(2**63)  # the seed of samplers that draw noise of their own
    noise = random.standard_normal((1, 4, HEIGHT // factor, WIDTH // factor), dtype=np.float32)
    states, pooled = in_chunks(pipeline, *chunks)
    negative_states, negative_pooled = in_chunks(pipeline, "dog", *[""] * (len(chunks) - 1))
    texts = {"prompt": "a red cat", "negative_prompt": "dog"}
    if len(chunks) > 1:
        texts = {
            "prompt_embeds": states, "pooled_prompt_embeds": pooled, "negative_prompt_embeds": negative_states,
            "negative_pooled_prompt_embeds": negative_pooled,
        }  # fmt: skip
    picture = pipeline(
        **texts, width=WIDTH, height=HEIGHT, num_inference_steps=STEPS, guidance_scale=guidance,
        latents=torch.from_numpy(noise), output_type="np",
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


def test_pictures_of_nan_are_said_to_be_that(tiny_sdxl_folder, tmp_path, capsys, monkeypatch):
    """A U-Net that has diverged: the picture is black, and nothing said why."""
    exact = preview.sample_latents
    monkeypatch.setattr(preview, "sample_latents", lambda *given: exact(*given) * float("nan"))
    assert not sampled_by_us(tiny_sdxl_folder, tmp_path, "--ss euler").any()
    said = capsys.readouterr().err
    assert "sample picture of 'a red cat' at step 0: its latents are NaN or infinite" in said
    assert "the VAE decodes latents to numbers that are NaN or infinite: such a picture is black" in said


def test_a_long_prompt_is_drawn_by_all_of_it(tiny_sdxl_folder, tmp_path, capsys):
    """What stands behind token 75 is drawn as well as what stands before it, and the log says which prompt is long."""
    chunks = ["a red cat " * 25, "blue dog"]
    ours = sampled_by_us(tiny_sdxl_folder, tmp_path, f"--ss euler --l {GUIDANCE}", prompt="".join(chunks))
    printed = capsys.readouterr()
    assert "sample prompt 1 has 77 tokens: it is drawn by all of them" in printed.err
    begun = [
        "loading torch",
        "loading image sizes",
        "loading the model",
        "running training",
        "drawing 1 sample pictures",
    ]
    places = [printed.err.index(line) for line in begun]
    assert places == sorted(places)  # each before what takes its time, in the order of a run
    assert printed.out.index("writing the weights of last") < printed.out.index("saving checkpoint: ")
    theirs = sampled_by_diffusers(tiny_sdxl_folder, "euler", GUIDANCE, chunks)
    cut = sampled_by_diffusers(tiny_sdxl_folder, "euler", GUIDANCE, chunks[:1])
    assert np.abs(ours - theirs).max() <= 1
    assert np.abs(ours - cut).max() > 10
