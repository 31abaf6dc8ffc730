"""The `model` section: which Stable Diffusion 3 to adapt."""

from __future__ import annotations

from pydantic import Field

from stages.core.config import Section

FIELD = "model.pretrained_model_name_or_path"
"""For messages: the field that names the model."""


class ModelSection(Section):
    """The base model: a diffusers-layout Stable Diffusion 3 / 3.5 folder or Hub repository."""

    pretrained_model_name_or_path: str = Field(min_length=1)
    """Hub repository ('stabilityai/stable-diffusion-3.5-large') or local folder in the diffusers layout."""
    revision: str | None = None
    """Hub revision: a branch, a tag or (best) a full commit. Ignored for a folder."""
    variant: str | None = None
    """Weight file variant, such as 'fp16' for 'model.fp16.safetensors'."""
