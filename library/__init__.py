"""What the training scripts share: devices, models, data, diffusion, training, options."""
