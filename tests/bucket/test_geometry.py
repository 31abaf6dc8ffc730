"""Geometry, held by properties over many sizes: pure functions, no files."""

from __future__ import annotations

import hashlib
import math
import random
from collections.abc import Iterator
from typing import Any

import pytest

from stages.bucket.alignment import model_alignment
from stages.bucket.geometry import (
    RefusedError,
    Rules,
    aligned,
    aspect_buckets,
    measure,
    place,
    resized_size,
    square_edge,
    target_area,
    target_size,
)
from stages.core.errors import ConfigError

SQUARE: dict[str, Any] = {
    "resolution": 1.0,
    "resolution_type": "area",
    "crop": True,
    "crop_aspect": "square",
    "crop_style": "center",
    "minimum_image_size": 0.0,
    "maximum_image_size": None,
    "target_downsample_size": None,
    "maximum_aspect": 4.0,
    "alignment": 64,
}


def rules(**changes: Any) -> Rules:
    return Rules(**{**SQUARE, **changes})


def digest(number: int) -> str:
    return hashlib.sha256(str(number).encode()).hexdigest()


ALL_RULES = [
    rules(**size, **shape)
    for size in (
        {"resolution": 1.0},
        {"resolution": 0.016, "alignment": 16},
        {"resolution": 1024, "resolution_type": "pixel_area"},
        {"resolution": 512, "resolution_type": "pixel"},
        {"resolution": 0.5, "alignment": 8, "maximum_image_size": 2.0, "target_downsample_size": 1.5},
        {"resolution": 256, "resolution_type": "pixel", "maximum_image_size": 600, "target_downsample_size": 400},
        {"resolution": 256, "resolution_type": "pixel_area", "maximum_image_size": 600, "target_downsample_size": 400},
    )
    for shape in (
        {"crop_aspect": "square"},
        {"crop_aspect": "preserve", "crop_style": "random"},
        {"crop_aspect": "preserve", "crop_style": "corner"},
        {"crop": False},
    )
]


def originals(count: int = 300) -> Iterator[tuple[int, int]]:
    draw = random.Random(5)
    yield from [(1, 1), (64, 64), (1024, 1024), (1023, 1025), (4000, 1000), (1000, 4000), (4032, 3024), (6000, 4000)]
    for _ in range(count):
        short = int(math.exp(draw.uniform(math.log(8), math.log(6000))))
        long = int(short * draw.uniform(1, 4))
        yield (long, short) if draw.random() < 0.5 else (short, long)


@pytest.mark.parametrize("given", ALL_RULES)
def test_every_crop_lies_inside_and_fits_the_grid(given: Rules) -> None:
    for number, original in enumerate(originals()):
        placement = place(given, original, digest(number))
        width, height = placement.bucket
        assert width % given.alignment == height % given.alignment == 0
        assert width >= given.alignment <= height
        assert placement.left >= 0
        assert placement.top >= 0
        assert placement.left + width <= placement.resized[0]
        assert placement.top + height <= placement.resized[1]


@pytest.mark.parametrize("given", ALL_RULES)
def test_a_picture_is_never_larger_than_it_has_to_be(given: Rules) -> None:
    for original in originals():
        bucket = target_size(given, original)
        resized = resized_size(given, original, bucket)
        covers_exactly = resized[0] == bucket[0] or resized[1] == bucket[1]
        above = given.maximum_image_size is not None and measure(original, given.resolution_type) > (
            given.maximum_image_size
        )
        if above and given.crop and not covers_exactly:
            assert given.target_downsample_size is not None
            scaled_to = measure(resized, given.resolution_type)
            assert scaled_to == pytest.approx(given.target_downsample_size, rel=0.01)
            assert resized[0] <= original[0]
        else:
            assert covers_exactly
        # The aspect is kept: the edges are those of a true scaling, rounded to whole pixels.
        assert abs(resized[0] * original[1] - resized[1] * original[0]) <= sum(original) / 2


@pytest.mark.parametrize("given", ALL_RULES)
def test_upright_and_lying_pictures_are_treated_alike(given: Rules) -> None:
    for width, height in originals():
        if width == height:
            continue
        lying, upright = target_size(given, (width, height)), target_size(given, (height, width))
        assert lying == upright[::-1]
        assert resized_size(given, (width, height), lying) == resized_size(given, (height, width), upright)[::-1]


@pytest.mark.parametrize("given", [given for given in ALL_RULES if given.resolution_type != "pixel"])
def test_the_area_is_the_resolution_up_to_the_grid(given: Rules) -> None:
    for original in originals():
        width, height = target_size(given, original)
        # Each edge is off by half a grid step at most; without a crop, both are.
        tolerance = given.alignment / 2 * (1 / width + 1 / height) * 1.2
        assert width * height == pytest.approx(target_area(given), rel=tolerance)


def test_square_edges_that_people_expect() -> None:
    assert square_edge(rules(resolution=1.0)) == 1024
    assert square_edge(rules(resolution=1024, resolution_type="pixel_area")) == 1024
    assert square_edge(rules(resolution=0.25)) == 512
    assert square_edge(rules(resolution=512, resolution_type="pixel")) == 512
    assert square_edge(rules(resolution=0.016, alignment=16)) == 128
    assert square_edge(rules(resolution=0.001, alignment=64)) == 64


def test_megapixels_are_millions_and_pixel_area_is_the_edge_squared() -> None:
    assert measure((1000, 1000), "area") == 1.0
    assert measure((2048, 512), "pixel_area") == 1024.0
    assert measure((2048, 512), "pixel") == 512.0
    assert target_area(rules(resolution=1024, resolution_type="pixel_area")) == 1048576


def test_buckets_of_one_megapixel() -> None:
    buckets = aspect_buckets(rules(crop_aspect="preserve"))
    assert buckets[0] == (1024, 1024)
    assert {(1216, 832), (1152, 896), (1344, 768), (1536, 640)} <= set(buckets)
    assert len(set(buckets)) == len(buckets)
    assert all(long >= short and long <= 4 * short for long, short in buckets)
    assert all(abs(long * short / 1e6 - 1) < 0.08 for long, short in buckets)


def test_buckets_of_an_edge_keep_that_edge() -> None:
    buckets = aspect_buckets(rules(crop_aspect="preserve", resolution=512, resolution_type="pixel"))
    assert buckets[:2] == ((512, 512), (576, 512))
    assert buckets[-1] == (2048, 512)


@pytest.mark.parametrize("given", [given for given in ALL_RULES if given.crop and given.crop_aspect == "preserve"])
def test_preserve_takes_the_nearest_bucket(given: Rules) -> None:
    for width, height in originals():
        chosen = target_size(given, (width, height))

        def distance(bucket: tuple[int, int], size: tuple[int, int] = (width, height)) -> float:
            return abs(math.log(bucket[0] / bucket[1]) - math.log(size[0] / size[1]))

        every = [size for bucket in aspect_buckets(given) for size in (bucket, bucket[::-1])]
        assert distance(chosen) <= min(distance(size) for size in every) + 1e-12


def test_a_nearly_square_picture_is_not_forced_to_be_square() -> None:
    """Its aspect is taken from its real size: 1.04 is not 1, and 1.0 rounded from 1.004 does not shrink it."""
    given = rules(crop_aspect="preserve", alignment=8)
    assert target_size(given, (1040, 1000)) != target_size(given, (1000, 1000))
    width, height = target_size(rules(crop=False, alignment=8), (1012, 1000))
    assert width > height


def test_no_crop_keeps_the_aspect_to_the_grid() -> None:
    given = rules(crop=False, alignment=16)
    for original in originals():
        width, height = target_size(given, original)
        exact = math.sqrt(1e6 * original[0] / original[1]), math.sqrt(1e6 * original[1] / original[0])
        assert abs(width - exact[0]) <= 8
        assert abs(height - exact[1]) <= 8


def test_large_pictures_are_scaled_down_to_the_target_before_the_crop() -> None:
    given = rules(maximum_image_size=4.0, target_downsample_size=2.0)
    large = place(given, (6000, 4000), digest(0))
    assert large.resized == (1732, 1155)
    assert (large.left, large.top) == ((1732 - 1024) // 2, (1155 - 1024) // 2)
    # Up to the maximum, the crop shows all that it can.
    assert place(given, (2400, 1600), digest(0)).resized == (1536, 1024)


def test_a_target_as_large_as_the_resolution_changes_nothing() -> None:
    given = rules(maximum_image_size=1.0, target_downsample_size=1.0)
    for original in originals(50):
        assert place(given, original, digest(0)) == place(rules(), original, digest(0))


def test_small_and_long_pictures_are_refused_by_their_real_size() -> None:
    with pytest.raises(RefusedError, match=r"100x100: 0\.01 MP, less than minimum_image_size 0\.25 MP"):
        place(rules(minimum_image_size=0.25), (100, 100), digest(0))
    with pytest.raises(RefusedError, match="500 px short edge"):
        place(rules(resolution=512, resolution_type="pixel", minimum_image_size=512), (2000, 500), digest(0))
    place(rules(minimum_image_size=0.25), (500, 500), digest(0))
    with pytest.raises(RefusedError, match=r"aspect of 4\.01, more than maximum_aspect 4"):
        place(rules(), (401, 100), digest(0))
    place(rules(), (100, 400), digest(0))


def test_where_crops_are_taken() -> None:
    wide = (3000, 1000)
    assert place(rules(crop_style="corner"), wide, digest(0)).left == 0
    assert place(rules(crop_style="center"), wide, digest(0)).left == (3072 - 1024) // 2
    lefts = [place(rules(crop_style="random"), wide, digest(number)).left for number in range(400)]
    assert lefts == [place(rules(crop_style="random"), wide, digest(number)).left for number in range(400)]
    assert min(lefts) < 100
    assert max(lefts) > 2048 - 100
    assert abs(sum(lefts) / 400 - 1024) < 120  # uniform: four standard errors


def test_aligned_is_the_nearest_multiple_and_at_least_one() -> None:
    assert [aligned(edge, 16) for edge in (1, 23.9, 24, 40, 128)] == [16, 16, 32, 48, 128]


def test_alignment_comes_from_the_models_configuration() -> None:
    vae = {"block_out_channels": [128, 256, 512, 512]}
    assert model_alignment(vae, {"patch_size": 2, "sample_size": 128}) == 64
    assert model_alignment(vae, {"patch_size": 2, "sample_size": 64}) == 64
    assert model_alignment(vae, {"patch_size": 2, "sample_size": 12}) == 16
    with pytest.raises(ConfigError, match=r"bucket\.alignment"):
        model_alignment(vae, {"patch_size": 2})
