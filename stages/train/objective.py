"""Flow matching as Stable Diffusion 3 defines it, in fp32. Pure functions.

x are latents, eps standard normal noise, sigma the share of noise: x_sigma = (1 - sigma) x + sigma eps. The model
answers with a velocity v, which should be eps - x.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

Objective = Literal["velocity", "x0"]


def interpolate(latents_BCHW: Tensor, noise_BCHW: Tensor, sigmas_B: Tensor) -> Tensor:
    """x_sigma, on the straight line from the picture to noise."""
    sigmas_B111 = sigmas_B.view(-1, 1, 1, 1)
    return (1 - sigmas_B111) * latents_BCHW + sigmas_B111 * noise_BCHW


def losses(
    velocity_BCHW: Tensor, latents_BCHW: Tensor, noise_BCHW: Tensor, sigmas_B: Tensor, objective: Objective
) -> Tensor:
    """The loss of each sample (B,): mean over C, H and W of the squared error.

    - velocity: of v against eps - x.
    - x0: of the clean picture that follows from v, x_sigma - sigma v, against x: the same error times sigma. This is
      what diffusers' training script weighs by default.
    """
    errors_BCHW = velocity_BCHW.float() - (noise_BCHW - latents_BCHW)
    means_B = errors_BCHW.square().mean(dim=(1, 2, 3))
    return means_B * sigmas_B.square() if objective == "x0" else means_B
