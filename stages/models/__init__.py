"""Stable Diffusion 3's parts: where they come from, what identifies them, loading and quantising them."""
