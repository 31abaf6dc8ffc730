"""Random numbers without a state: every draw is a function of the run's seed and of what it is for.

So a resumed run draws what the interrupted one would have drawn, no generator has to be saved, and the numbers are the
same on every device, because they are always drawn on the CPU.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor


def seed_for(*parts: int | str) -> int:
    """A seed of 63 bits made of what the draw is for: `seed_for(config.seed, 'noise', step)`."""
    text = "/".join(str(part) for part in parts)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def numbers(*parts: int | str) -> np.random.Generator:
    """A NumPy generator for that purpose."""
    return np.random.Generator(np.random.PCG64(seed_for(*parts)))


def noise(shape: Sequence[int], *parts: int | str) -> Tensor:
    """Standard normal numbers in fp32, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(seed_for(*parts))
    return torch.randn(tuple(shape), generator=generator, dtype=torch.float32)


def chance(probability: float, *parts: int | str) -> bool:
    """True with that probability."""
    return seed_for(*parts) < probability * 2.0**63
