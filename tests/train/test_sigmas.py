"""Noise levels against closed forms."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from diffusers.training_utils import compute_density_for_timestep_sampling

from stages.train.config import SigmaSection
from stages.train.sigmas import draw_sigmas, even_sigmas, mode_of, shift_for, shifted

COUNT = 200_000


def drawn(**settings: object) -> np.ndarray:
    section = SigmaSection.model_validate(settings)
    sigmas = draw_sigmas(section, COUNT, np.random.Generator(np.random.PCG64(0)))
    assert sigmas.dtype == torch.float32
    assert float(sigmas.min()) > 0
    assert float(sigmas.max()) <= 1
    return sigmas.double().numpy()


def distance(sample: np.ndarray, distribution: np.ndarray) -> float:
    """Kolmogorov-Smirnov: the largest distance of the sample's distribution function from the exact one, which is given
    at the sorted sample."""
    places = np.arange(1, len(sample) + 1) / len(sample)
    return float(np.abs(places - distribution).max())


LIMIT = 1.95 / math.sqrt(COUNT)  # exceeded by chance once in a thousand


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (-0.5, 0.7)])
def test_logit_normal(mean: float, std: float) -> None:
    sample = np.sort(drawn(sampling="logit_normal", logit_mean=mean, logit_std=std))
    z = (np.log(sample / (1 - sample)) - mean) / std
    assert distance(sample, 0.5 * (1 + np.vectorize(math.erf)(z / math.sqrt(2)))) < LIMIT


def test_uniform() -> None:
    sample = np.sort(drawn(sampling="uniform"))
    assert distance(sample, sample) < LIMIT


def test_beta_2_2() -> None:
    sample = np.sort(drawn(sampling="beta"))
    assert distance(sample, 3 * sample**2 - 2 * sample**3) < LIMIT


def test_mode_is_diffusers_own() -> None:
    theirs = compute_density_for_timestep_sampling(
        "mode", 1000, mode_scale=1.29, generator=torch.Generator().manual_seed(0)
    )
    uniform = torch.rand(1000, generator=torch.Generator().manual_seed(0)).double().numpy()
    np.testing.assert_allclose(mode_of(uniform, 1.29), theirs.numpy(), atol=1e-6)
    sample = drawn(sampling="mode")
    # E = 1/2, and the mass between 0.25 and 0.75 is the part of [0, 1] that the map sends there, by bisection.
    low, high = (_inverse(level) for level in (0.75, 0.25))
    assert sample.mean() == pytest.approx(0.5, abs=4e-3)
    assert ((sample > 0.25) & (sample < 0.75)).mean() == pytest.approx(high - low, abs=4e-3)


def _inverse(level: float) -> float:
    low, high = 0.0, 1.0
    for _ in range(60):
        middle = (low + high) / 2
        if float(mode_of(np.array([middle]), 1.29)[0]) > level:
            low = middle
        else:
            high = middle
    return low


def test_shift_is_the_schedulers() -> None:
    scheduler = FlowMatchEulerDiscreteScheduler(shift=3.0)
    plain = FlowMatchEulerDiscreteScheduler(shift=1.0)
    torch.testing.assert_close(shifted(plain.sigmas, 3.0), scheduler.sigmas, atol=1e-6, rtol=1e-6)
    assert float(shifted(torch.tensor(1.0), 3.0)) == 1.0


@pytest.mark.parametrize(("pixels", "expected"), [(512, 1.878), (1024, 3.158)])
def test_auto_shift_grows_with_the_picture(pixels: int, expected: float) -> None:
    assert shift_for(SigmaSection(shift="auto"), (pixels // 16) ** 2) == pytest.approx(expected, abs=1e-3)
    assert shift_for(SigmaSection(shift=1.5), 4096) == 1.5


def test_even_sigmas_are_the_middles() -> None:
    torch.testing.assert_close(even_sigmas(4), torch.tensor([0.125, 0.375, 0.625, 0.875]))


def test_timesteps_keep_fp32() -> None:
    """In bf16, 999 becomes 1000 and 517 becomes 516."""
    sigmas = draw_sigmas(SigmaSection(), 1000, np.random.Generator(np.random.PCG64(0)))
    assert len(set((sigmas * 1000).tolist())) > 990
