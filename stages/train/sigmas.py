"""How noise levels are drawn, and how they are shifted. Pure functions; fp32 out.

sigma in (0, 1] is the share of noise: 1 is noise alone. Sources: Esser et al., "Scaling Rectified Flow Transformers for
High-Resolution Image Synthesis" (2024), section 3.1 for the logit-normal and mode samplings, 5.3.2 for the shift.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from stages.train.config import SigmaSection

if TYPE_CHECKING:
    from numpy.typing import NDArray

# Where a resolution-dependent shift is anchored: image tokens and mu, shift = exp(mu), linear in between and beyond.
AUTO_TOKENS = (256, 4096)
AUTO_MU = (0.5, 1.15)

TIMESTEPS = 1000.0
"""The model is told t = 1000 sigma."""


def draw_sigmas(section: SigmaSection, count: int, generator: np.random.Generator) -> Tensor:
    """Noise levels (count,) before the shift.

    - logit_normal: sigmoid(mean + std n), n standard normal.
    - uniform: u in (0, 1].
    - mode: 1 - u - scale (cos^2(pi u / 2) - 1 + u): heavier in the middle for scale > 0, at the ends below 0.
    - beta: Beta(alpha, beta).
    """
    if section.sampling == "logit_normal":
        sigmas = 1 / (1 + np.exp(-generator.normal(section.logit_mean, section.logit_std, count)))
    elif section.sampling == "beta":
        sigmas = generator.beta(section.beta_alpha, section.beta_beta, count)
    else:
        sigmas = 1 - generator.random(count)
        if section.sampling == "mode":
            sigmas = mode_of(1 - sigmas, section.mode_scale)
    # No draw is exactly 0: there would be nothing to learn from a picture without noise.
    return torch.from_numpy(np.clip(sigmas, 1e-6, 1.0)).float()


def mode_of(uniform: NDArray[np.float64], scale: float) -> NDArray[np.float64]:
    """The mode sampling's map of uniform numbers to noise levels."""
    return 1 - uniform - scale * (np.cos(np.pi / 2 * uniform) ** 2 - 1 + uniform)


def even_sigmas(count: int) -> Tensor:
    """Noise levels (count,) spread evenly over (0, 1), before the shift: the middles of `count` equal parts."""
    return (torch.arange(count, dtype=torch.float32) + 0.5) / count


def shift_for(section: SigmaSection, tokens: int) -> float:
    """The shift s for pictures of so many image tokens (latent height x width / patch size^2)."""
    if section.shift != "auto":
        return float(section.shift)
    slope = (AUTO_MU[1] - AUTO_MU[0]) / (AUTO_TOKENS[1] - AUTO_TOKENS[0])
    return math.exp(AUTO_MU[0] + slope * (tokens - AUTO_TOKENS[0]))


def shifted(sigmas_B: Tensor, shift: float) -> Tensor:
    """sigma' = s sigma / (1 + (s - 1) sigma): larger pictures need more noise to lose as much."""
    return shift * sigmas_B / (1 + (shift - 1) * sigmas_B)
