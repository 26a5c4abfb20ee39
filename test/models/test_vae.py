"""Pictures to latents and back against diffusers' own encoding, processing and decoding."""

import copy

import pytest
import torch

from library.models.vae import decode_latents, downscale_factor, encode_images, latent_shape


@pytest.fixture
def images_BHWC():
    return torch.randint(0, 256, (5, 32, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(3))


def _posterior(vae, images_BHWC):
    from diffusers.image_processor import VaeImageProcessor

    processor = VaeImageProcessor(vae_scale_factor=2)
    pictures = processor.preprocess([image.numpy().astype("float32") / 255.0 for image in images_BHWC])
    with torch.no_grad():
        return vae.encode(pictures).latent_dist


def test_without_noise_the_latents_are_the_scaled_mean(vae, images_BHWC):
    latents = encode_images(vae, images_BHWC)
    assert tuple(latents.shape[1:]) == latent_shape(vae, 32, 48) == (4, 16, 24)
    torch.testing.assert_close(latents, _posterior(vae, images_BHWC).mean * 0.13025, rtol=1e-4, atol=1e-5)


def test_with_noise_they_are_the_sample_that_the_noise_decides(vae, images_BHWC):
    noise = torch.randn(5, 4, 16, 24, generator=torch.Generator().manual_seed(4))
    latents = encode_images(vae, images_BHWC, noise)
    posterior = _posterior(vae, images_BHWC)
    torch.testing.assert_close(latents, (posterior.mean + posterior.std * noise) * 0.13025, rtol=1e-4, atol=1e-5)
    assert torch.equal(latents, encode_images(vae, images_BHWC, noise))


@pytest.mark.parametrize("slice_size", [1, 2, 5, 9])
def test_slices_change_nothing(vae, images_BHWC, slice_size):
    noise = torch.randn(5, 4, 16, 24, generator=torch.Generator().manual_seed(4))
    whole = encode_images(vae, images_BHWC, noise)
    torch.testing.assert_close(encode_images(vae, images_BHWC, noise, slice_size=slice_size), whole)
    pictures = decode_latents(vae, whole, slice_size=slice_size).int() - decode_latents(vae, whole).int()
    assert pictures.abs().max() <= 1


def test_decoding_is_what_diffusers_pipeline_shows(vae, images_BHWC):
    from diffusers.image_processor import VaeImageProcessor

    latents = encode_images(vae, images_BHWC) * 3.0
    with torch.no_grad():
        decoded = vae.decode(latents / 0.13025).sample
    expected = VaeImageProcessor(vae_scale_factor=2).postprocess(decoded, output_type="np")
    pictures = decode_latents(vae, latents)
    assert pictures.dtype == torch.uint8
    assert pictures.shape == images_BHWC.shape
    assert (pictures.int() - torch.tensor(expected * 255).round().int()).abs().max() <= 1


def test_white_and_black_are_the_ends_of_the_range(vae):
    class Recorder(torch.nn.Module):
        """Stands for a VAE and keeps what it is given."""

        config, dtype = vae.config, torch.float32

        def encode(self, pictures):
            self.seen = pictures
            return vae.encode(pictures)

    recorder = Recorder()
    encode_images(recorder, torch.tensor([0, 255], dtype=torch.uint8).view(2, 1, 1, 1).expand(2, 32, 32, 3))
    assert recorder.seen[0].unique().tolist() == [-1.0]
    assert recorder.seen[1].unique().tolist() == [1.0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_any_dtype_of_the_vae_gives_fp32_latents(vae, images_BHWC, dtype):
    latents = encode_images(copy.deepcopy(vae).to(dtype), images_BHWC)
    assert latents.dtype == torch.float32
    tolerance = 0.05 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(latents, encode_images(vae, images_BHWC), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    "config", [{"shift_factor": 0.5}, {"latents_mean": [0.1, 0.2, 0.3, 0.4], "latents_std": [1.0, 2.0, 3.0, 4.0]}]
)
def test_shift_and_channel_statistics_are_undone_by_decoding(vae, images_BHWC, config):
    shifted = copy.deepcopy(vae)
    shifted.register_to_config(**config)
    latents = encode_images(shifted, images_BHWC)
    assert not torch.allclose(latents, encode_images(vae, images_BHWC), atol=1e-3)
    difference = decode_latents(shifted, latents).int() - decode_latents(vae, encode_images(vae, images_BHWC)).int()
    assert difference.abs().max() <= 1
    if "latents_std" in config:
        expected = (_posterior(vae, images_BHWC).mean[:, 3] - 0.4) * 0.13025 / 4.0
        torch.testing.assert_close(latents[:, 3], expected, rtol=1e-4, atol=1e-5)


def test_the_vae_gets_no_gradients(vae, images_BHWC):
    assert not encode_images(vae, images_BHWC).requires_grad
    assert downscale_factor(vae) == 2
