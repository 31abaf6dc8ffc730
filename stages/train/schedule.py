"""The learning rate as a function of the step: nothing to save, nothing to resume."""

from __future__ import annotations

import math

from stages.train.config import TrainSection

POLYNOMIAL_END = 1e-7
"""Where the polynomial (of power 1) ends."""


def learning_rate(section: TrainSection, step: int) -> float:
    """The learning rate of an optimiser step.

    Args:
        section: the schedule, its warm-up and its length.
        step: steps done before it: 0 for the first. In a warm-up of w steps, step i runs at i / w of the full rate.
    """
    full, warmup, total = section.learning_rate, section.lr_warmup_steps, section.steps
    kind = section.lr_scheduler
    if kind == "constant":
        return full
    if step < warmup:
        return full * step / warmup
    if kind == "constant_with_warmup":
        return full
    progress = (step - warmup) / max(1, total - warmup)
    if kind == "linear":
        return full * max(0.0, 1 - progress)
    if kind == "cosine":
        return full * max(0.0, 0.5 * (1 + math.cos(math.pi * progress)))
    return POLYNOMIAL_END + (full - POLYNOMIAL_END) * max(0.0, 1 - progress)
