"""The alignment of crops, read off the model's own configuration files."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stages.core.errors import ConfigError

FULL_SIZE = 512
"""Pixels: a model made for pictures of this edge or more is cropped to the coarse grid."""
COARSE = 4
"""The convention for Stable Diffusion 3: a multiple of four patches, so that few, well filled buckets come out."""


def model_alignment(vae: Mapping[str, Any], transformer: Mapping[str, Any]) -> int:
    """Pixels that the edges of crops are multiples of.

    What a model can take at all is a multiple of its patch in pixels: the autoencoder's scale (one halving for each
    block after the first) times the transformer's patch, 8 x 2 = 16 for Stable Diffusion 3. A model whose native edge
    (`sample_size` latents) is 512 px or more is cropped to four times that, 64 px, the convention for Stable
    Diffusion 3; on a smaller one so coarse a grid would leave hardly any aspect to choose from.

    Args:
        vae: vae/config.json.
        transformer: transformer/config.json.
    Raises:
        ConfigError: a number is missing there.
    """
    try:
        scale = 1 << (len(vae["block_out_channels"]) - 1)
        patch, native = int(transformer["patch_size"]), int(transformer["sample_size"])
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(
            f"model.pretrained_model_name_or_path: its vae and transformer config.json do not tell the alignment "
            f"({error} is missing or no number): set bucket.alignment (64 for Stable Diffusion 3)"
        ) from error
    return scale * patch * (COARSE if native * scale >= FULL_SIZE else 1)
