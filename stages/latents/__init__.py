"""latents: cropped pictures through the VAE, one latent shard for each cropped shard."""
