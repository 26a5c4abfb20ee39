"""Pictures.

guidance            classifier-free guidance around a denoiser
pipeline            from noise to latents: a sampler's steps
"""
