"""Where each picture is scaled and cut: pure functions of its size, its digest and the section's fields.

A picture is first scaled, with its own aspect, to the smallest size that covers its target, and then cut to the
target; it is never enlarged beyond that. Sizes are (width, height) in pixels of the upright picture.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

Size = tuple[int, int]
Unit = Literal["area", "pixel", "pixel_area"]


class RefusedError(Exception):
    """A picture cannot or may not be used; the text is the reason, for people."""


@dataclass(frozen=True)
class Rules:
    """The fields of the `bucket` section that decide the geometry (see there), with the alignment known."""

    resolution: float
    resolution_type: Unit
    crop: bool
    crop_aspect: Literal["square", "preserve"]
    crop_style: Literal["center", "random", "corner"]
    minimum_image_size: float
    maximum_image_size: float | None
    target_downsample_size: float | None
    maximum_aspect: float
    alignment: int


@dataclass(frozen=True)
class Placement:
    """What is done to one picture: scaled from `original` to `resized`, then cut at (left, top) to `bucket`."""

    original: Size
    resized: Size
    left: int
    top: int
    bucket: Size

    @property
    def enlarged(self) -> bool:
        return self.resized[0] > self.original[0] or self.resized[1] > self.original[1]

    def record(self) -> dict[str, Any]:
        """As JSON: how a shard keeps it."""
        return {
            "original_size": list(self.original),
            "resized_size": list(self.resized),
            "crop": [self.left, self.top, *self.bucket],
            "bucket": list(self.bucket),
        }


def place(rules: Rules, original: Size, image_sha256: str) -> Placement:
    """Scale and cut of one picture.

    Raises:
        RefusedError: it is smaller than `minimum_image_size` or longer than `maximum_aspect`.
    """
    refuse_unfit(rules, original)
    bucket = target_size(rules, original)
    resized = resized_size(rules, original, bucket)
    room = (resized[0] - bucket[0], resized[1] - bucket[1])
    left, top = offset(rules.crop_style if rules.crop else "center", room, image_sha256)
    return Placement(original, resized, left, top, bucket)


def measure(size: Size, unit: Unit) -> float:
    """A picture's size in a unit: megapixels, pixels of the shorter edge, or the edge of a square of its area."""
    width, height = size
    if unit == "area":
        return width * height / 1e6
    if unit == "pixel":
        return float(min(width, height))
    return math.sqrt(width * height)


def refuse_unfit(rules: Rules, original: Size) -> None:
    """Refuses by size and by aspect, both taken from the real size in pixels.

    Raises:
        RefusedError
    """
    width, height = original
    long, short = max(original), min(original)
    if short < 1:
        raise RefusedError(f"{width}x{height}: an empty picture")
    if long > rules.maximum_aspect * short:
        raise RefusedError(
            f"{width}x{height}: an aspect of {long / short:.2f}, more than maximum_aspect {rules.maximum_aspect:g}"
        )
    size = measure(original, rules.resolution_type)
    if size < rules.minimum_image_size:
        raise RefusedError(
            f"{width}x{height}: {size_in_words(size, rules.resolution_type)}, "
            f"less than minimum_image_size {size_in_words(rules.minimum_image_size, rules.resolution_type)}"
        )


def size_in_words(size: float, unit: Unit) -> str:
    """'0.25 MP', '512 px short edge', '512 px square edge'."""
    words = {"area": "MP", "pixel": "px short edge", "pixel_area": "px square edge"}
    return f"{size:.4g} {words[unit]}"


def aligned(edge: float, alignment: int) -> int:
    """The multiple of the alignment that is nearest to an edge; at least one alignment."""
    return max(math.floor(edge / alignment + 0.5), 1) * alignment


def target_area(rules: Rules) -> float:
    """Pixels that a crop has, where the resolution is an area: before rounding to the alignment."""
    return rules.resolution * 1e6 if rules.resolution_type == "area" else rules.resolution**2


def square_edge(rules: Rules) -> int:
    """Edge of the square crop."""
    if rules.resolution_type == "pixel":
        return aligned(rules.resolution, rules.alignment)
    return aligned(math.sqrt(target_area(rules)), rules.alignment)


@lru_cache(maxsize=64)
def aspect_buckets(rules: Rules) -> tuple[Size, ...]:
    """The sizes that 'preserve' chooses from, long edge first: each also stands for itself turned upright.

    From the square on, the long edge grows by one alignment a step up to `maximum_aspect`. The other edge is the
    multiple of the alignment that comes nearest to the area ('area', 'pixel_area'), or stays what it is ('pixel').
    """
    edge, step = square_edge(rules), rules.alignment
    buckets = [(edge, edge)]
    long = edge
    while True:
        short = edge if rules.resolution_type == "pixel" else aligned(target_area(rules) / long, step)
        if long > rules.maximum_aspect * short:
            return tuple(buckets)
        if short < long:
            buckets.append((long, short))
        long += step


def target_size(rules: Rules, original: Size) -> Size:
    """The bucket that a picture is cut to."""
    long, short = max(original), min(original)
    if not rules.crop:
        target = _own_aspect(rules, long, short)
    elif rules.crop_aspect == "square":
        target = (square_edge(rules), square_edge(rules))
    else:
        # Nearest in the ratio of the two aspects, so 2:1 is as far from 1:1 as 1:2 is.
        def distance(bucket: Size) -> tuple[float, int]:
            ratio = (bucket[0] * short) / (bucket[1] * long)
            return max(ratio, 1 / ratio), -bucket[0] * bucket[1]

        target = min(aspect_buckets(rules), key=distance)
    return target if original[0] >= original[1] else (target[1], target[0])


def _own_aspect(rules: Rules, long: int, short: int) -> Size:
    """The aligned size nearest to the picture's own aspect."""
    if rules.resolution_type == "pixel":
        return aligned(rules.resolution * long / short, rules.alignment), aligned(rules.resolution, rules.alignment)
    root = math.sqrt(target_area(rules))
    stretch = math.sqrt(long / short)
    return aligned(root * stretch, rules.alignment), aligned(root / stretch, rules.alignment)


def resized_size(rules: Rules, original: Size, bucket: Size) -> Size:
    """What a picture is scaled to before it is cut: its own aspect, covering the bucket.

    As small as covers it, so that a crop shows as much of the picture as it can. A picture above `maximum_image_size`
    is scaled to `target_downsample_size` instead where that is larger: the crop is then a part of it, at that scale.
    """
    cover = _cover(original, bucket)
    if not rules.crop or rules.maximum_image_size is None or rules.target_downsample_size is None:
        return cover
    size = measure(original, rules.resolution_type)
    if size <= rules.maximum_image_size:
        return cover
    factor = rules.target_downsample_size / size
    if rules.resolution_type == "area":
        factor = math.sqrt(factor)
    wanted = (math.floor(original[0] * factor + 0.5), math.floor(original[1] * factor + 0.5))
    return (max(cover[0], wanted[0]), max(cover[1], wanted[1]))


def _cover(original: Size, bucket: Size) -> Size:
    """The smallest size of the original's aspect that covers the bucket; in whole numbers, so exact."""
    (width, height), (target_width, target_height) = original, bucket
    if target_width * height >= target_height * width:
        return target_width, max(target_height, (2 * height * target_width + width) // (2 * width))
    return max(target_width, (2 * width * target_height + height) // (2 * height)), target_height


def offset(style: Literal["center", "random", "corner"], room: Size, image_sha256: str) -> tuple[int, int]:
    """Left and top of the cut, within `room` (what the resized picture has more than the bucket).

    'random' is drawn from the image's digest and nothing else: the same picture is always cut at the same place,
    on every machine and in every run, whatever else is in the data set.
    """
    if style == "corner":
        return 0, 0
    if style == "center":
        return room[0] // 2, room[1] // 2
    draw = hashlib.sha256(f"crop {image_sha256}".encode()).digest()
    across, down = int.from_bytes(draw[:8], "big"), int.from_bytes(draw[8:16], "big")
    return across % (room[0] + 1), down % (room[1] + 1)
