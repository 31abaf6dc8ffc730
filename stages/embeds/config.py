"""The `embeds` section: encoding captions with CLIP-L, CLIP-G and T5."""

from __future__ import annotations

from typing import Literal

from pydantic import Field

from stages.core.config import Section


class EmbedsSection(Section):
    """Text encoding. Train with the T5 length that you will draw with: Stable Diffusion 3.5 medium is touchy there."""

    t5_length: int = Field(default=256, ge=1, le=512)
    """T5 tokens that a caption is padded or cut to; diffusers draws with 256 by default."""
    t5_padding: Literal["unmodified", "zero"] = "unmodified"
    """Keep T5's output at padding tokens, as diffusers does, or set it to zero."""
    dtype: Literal["fp32", "bf16"] = "bf16"
    """Precision of the encoders while they encode. Stored embeddings have the same precision."""
    batch_size: int = Field(default=16, ge=1)
    """Captions encoded at once. Does not change the output beyond rounding."""
    device: str = "auto"
    """'auto', 'cpu', 'cuda', 'cuda:1', ..."""
    workers: int = Field(default=1, ge=1)
    """Machines that share this stage, where each has a deployment of its own (`flow.executor: deployment`)."""
