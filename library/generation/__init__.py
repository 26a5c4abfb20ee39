"""Pictures.

prompts             prompt files and their options
guidance            classifier-free guidance around a denoiser
pipeline            from noise to latents: a sampler's steps
"""
