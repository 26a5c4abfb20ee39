"""U-Net, text encoders, VAE, and the files they come from and go to."""
