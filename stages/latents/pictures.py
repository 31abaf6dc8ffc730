"""Cropped pictures out of a shard, in batches that are ready for the VAE."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Shard
from stages.core.errors import InputError
from stages.core.shard import read_shard

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Batch:
    """Some consecutive pictures of one shard: `rgb_BHWC` is uint8 (B, H, W, 3); `last` says that the shard ends."""

    keys: list[str]
    geometry: list[bytes]
    """Each picture's JSON as the shard holds it; it goes along with the latents unchanged."""
    seeds: list[int]
    rgb_BHWC: torch.Tensor
    last: bool


def batches(path: Path, shard: Shard, size: int) -> Iterator[Batch]:
    """The pictures of a cropped shard, `size` at a time; where batches are cut depends on nothing else.

    Raises:
        InputError: a picture is damaged, or is not of the shard's bucket.
        CorruptBlobError: the shard is damaged.
    """
    import numpy as np
    import torch

    waiting: list[tuple[str, bytes, int, Any]] = []
    seen = 0
    for key, members in read_shard(path):
        seen += 1
        where = f"sample {key} of cropped shard {shard.name}"
        waiting.append((key, members["json"], _seed(members["json"], where), _decode(members["png"], shard, where)))
        if len(waiting) == size or seen == shard.samples:
            rgb_BHWC = torch.from_numpy(np.stack([pixels for *_, pixels in waiting]))
            yield Batch(
                [key for key, *_ in waiting],
                [geometry for _, geometry, *_ in waiting],
                [seed for *_, seed, _ in waiting],
                rgb_BHWC,
                last=seen == shard.samples,
            )
            waiting = []
    if seen != shard.samples:
        raise InputError(f"cropped shard {shard.name} holds {seen} samples, its manifest says {shard.samples}")


def _seed(geometry: bytes, where: str) -> int:
    """The seed of a sample's noise: 63 bits of its picture's digest, so it follows the picture wherever it goes."""
    digest = json.loads(geometry).get("image_sha256")
    if not isinstance(digest, str):
        raise InputError(f"{where} has no image_sha256 in its JSON: run the bucket stage again with --force")
    return int(digest[:16], 16) >> 1


def _decode(png: bytes, shard: Shard, where: str) -> Any:
    import numpy as np
    from PIL import Image

    try:
        with Image.open(io.BytesIO(png), formats=["PNG"]) as picture:
            pixels_HWC = np.asarray(picture)
    except (OSError, ValueError, SyntaxError) as error:
        raise InputError(f"{where} cannot be decoded ({error}): run the bucket stage again with --force") from error
    width, height = shard.bucket or (pixels_HWC.shape[1], pixels_HWC.shape[0])
    if pixels_HWC.shape != (height, width, 3) or pixels_HWC.dtype != np.uint8:
        raise InputError(
            f"{where} is {pixels_HWC.shape} {pixels_HWC.dtype}, its bucket asks for 8-bit RGB of {width}x{height}: run "
            f"the bucket stage again with --force"
        )
    return pixels_HWC
