"""train: a LoRA on a quantised, frozen Stable Diffusion 3, from cached latents and embeddings."""
