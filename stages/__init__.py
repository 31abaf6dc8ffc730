"""loraline's stages: captioned images in, a published Stable Diffusion 3 LoRA out.

Nothing in here knows of Prefect; every stage runs alone from the command line (`loraline stage NAME`).
"""
