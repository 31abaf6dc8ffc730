"""The `latents` section: encoding pictures with the VAE."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.core.config import Section


class LatentsSection(Section):
    """VAE encoding."""

    dtype: Literal["fp32", "bf16"] = "fp32"
    """Precision of the VAE while it encodes. Stored latents have the same precision."""
    posterior: Literal["mode", "sample"] = "mode"
    """Take the posterior's mode, or one draw from it, seeded by the sample's digest."""
    batch_size: int = Field(default=4, ge=1)
    """Pictures encoded at once; halved by itself when the device's memory is too small. Changes last bits at most."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1', ..."""
    workers: int = Field(default=1, ge=1)
    """Machines that share this stage, where each has a deployment of its own (`flow.executor: deployment`)."""
