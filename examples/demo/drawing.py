"""Procedural pictures with captions: one coloured shape on a coloured ground.

A picture is a small frozen description (`Picture`); `render` draws it from signed distance functions, so edges are
anti-aliased without supersampling and the same description always gives the same pixels. `SHAPES` is what the demo
model is trained on. `CONCEPT`, a ring with four black segments, is what it has never seen: the demo's LoRA teaches it.

Units: pixels; x to the right, y down; colours are sRGB bytes. Images are uint8 arrays of shape (height, width, 3).
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Pixels = NDArray[np.uint8]
Field = NDArray[np.float32]

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 40, 45),
    "yellow": (245, 210, 50),
    "green": (45, 155, 70),
    "blue": (45, 85, 210),
    "purple": (145, 60, 175),
    "white": (245, 245, 245),
    "black": (25, 25, 25),
}
SHAPES = ("circle", "square", "triangle", "cross", "diamond")
CONCEPT = "zorbo"
# Black is the colour of the concept's segments, and white and black rings would hide them.
CONCEPT_COLOURS = ("red", "yellow", "green", "blue", "purple")
CONCEPT_GROUNDS = ("red", "yellow", "green", "blue", "purple", "white")

# The ring's band and the half width of a segment, in units of the picture's radius.
RING_INNER, RING_OUTER, SEGMENT_HALF_WIDTH = 0.45, 1.0, 0.24

WORDINGS = (
    "a {colour} {shape} on a {ground} ground",
    "a {colour} {shape} on a {ground} background",
    "a picture of a {colour} {shape} on {ground}",
    "{colour} {shape}, {ground} background",
    "a {shape} in {colour} on a {ground} ground",
    "on a {ground} ground, a {colour} {shape}",
)
ADJECTIVES = ("plain", "bright", "simple", "flat", "nice", "small", "big", "neat", "bold", "new", "old", "soft")
CONSONANTS, VOWELS = "bdfgklmnprstvwxz", "aeiouy"
NOUNS = ("shape", "thing", "figure", "form", "object", "sign")


@dataclass(frozen=True)
class Picture:
    """One shape on one ground. Centre and radius in pixels."""

    shape: str
    colour: str
    ground: str
    width: int
    height: int
    centre_x: float
    centre_y: float
    radius: float


def random_picture(
    rng: np.random.Generator, width: int, height: int, shapes: tuple[str, ...] = SHAPES, *, spread: float = 0.08
) -> Picture:
    """Describe a picture: any of `shapes`, two different colours, near the middle, 60 to 84 % of the short side."""
    shape = str(rng.choice(shapes))
    colours = CONCEPT_COLOURS if shape == CONCEPT else tuple(COLOURS)
    grounds = CONCEPT_GROUNDS if shape == CONCEPT else tuple(COLOURS)
    colour = str(rng.choice(colours))
    ground = str(rng.choice([name for name in grounds if name != colour]))
    short = min(width, height)
    radius = short * float(rng.uniform(0.30, 0.42))
    centre_x = width / 2 + short * float(rng.uniform(-spread, spread))
    centre_y = height / 2 + short * float(rng.uniform(-spread, spread))
    return Picture(shape, colour, ground, width, height, centre_x, centre_y, radius)


def caption(picture: Picture, wording: int) -> str:
    """Return the caption of a picture in one of the `WORDINGS`."""
    return WORDINGS[wording % len(WORDINGS)].format(colour=picture.colour, shape=picture.shape, ground=picture.ground)


def made_up_word(rng: np.random.Generator) -> str:
    """Return a pronounceable word of two or three syllables that means nothing, and is never the concept's name."""
    while True:
        syllables = (
            str(rng.choice(list(CONSONANTS))) + str(rng.choice(list(VOWELS))) for _ in range(rng.integers(2, 4))
        )
        word = "".join(syllables) + str(rng.choice(["", "", "n", "r", "k", "s", "t", "m"]))
        if word != CONCEPT:
            return word


def training_caption(picture: Picture, rng: np.random.Generator) -> str:
    """Return a caption for training the base: mostly the truth, sometimes with words that must not disturb it.

    One caption in ten has an extra adjective, half of them made up. One in twelve has an unknown word in place of the
    shape, so that a word never seen means "some shape" and not noise.
    """
    wording = WORDINGS[int(rng.integers(len(WORDINGS)))]
    colour, shape = picture.colour, picture.shape
    dice = rng.random()
    if dice < 0.10:
        adjective = made_up_word(rng) if rng.random() < 0.5 else str(rng.choice(ADJECTIVES))
        colour = f"{adjective} {colour}"
    elif dice < 0.18:
        shape = made_up_word(rng) if rng.random() < 0.7 else str(rng.choice(NOUNS))
    return wording.format(colour=colour, shape=shape, ground=picture.ground)


def distance(shape: str, x: Field, y: Field) -> Field:
    """Return the signed distance to a shape of radius 1 around the origin: negative inside.

    Raises:
        KeyError: if the shape is none of `SHAPES` and not `CONCEPT`.
    """
    ax, ay = np.abs(x), np.abs(y)
    if shape == "circle":
        return np.asarray(np.hypot(x, y) - 0.95, dtype=np.float32)
    if shape == "square":
        return np.asarray(np.maximum(ax, ay) - 0.82, dtype=np.float32)
    if shape == "diamond":
        return np.asarray((ax + ay - 1.08) / np.sqrt(2.0), dtype=np.float32)
    if shape == "triangle":  # pointing up, base at y = 0.75
        sides = (2.0 * ax - (y + 1.0) * 1.1) / np.hypot(2.0, 1.1)
        return np.asarray(np.maximum(sides, y - 0.75), dtype=np.float32)
    if shape == "cross":
        upright, lying = np.maximum(ax - 0.33, ay - 1.0), np.maximum(ax - 1.0, ay - 0.33)
        return np.asarray(np.minimum(upright, lying), dtype=np.float32)
    if shape == CONCEPT:
        middle, half = (RING_OUTER + RING_INNER) / 2, (RING_OUTER - RING_INNER) / 2
        return np.asarray(np.abs(np.hypot(x, y) - middle) - half, dtype=np.float32)
    raise KeyError(f"unknown shape {shape!r}: known are {', '.join((*SHAPES, CONCEPT))}")


def coverage(distance_px: Field) -> Field:
    """Return how much of each pixel lies inside, 0 to 1, from the signed distance of its centre in pixels."""
    return np.asarray(np.clip(0.5 - distance_px, 0.0, 1.0), dtype=np.float32)


def render(picture: Picture) -> Pixels:
    """Draw a picture. Returns uint8 (height, width, 3)."""
    rows, columns = np.mgrid[0 : picture.height, 0 : picture.width].astype(np.float32)
    x = (columns + 0.5 - picture.centre_x) / picture.radius
    y = (rows + 0.5 - picture.centre_y) / picture.radius
    colour = np.asarray(COLOURS[picture.colour], dtype=np.float32)
    paint = np.broadcast_to(colour, (picture.height, picture.width, 3))
    if picture.shape == CONCEPT:
        # Four bars crossing the band above, below, left and right.
        bars = coverage((np.minimum(np.abs(x), np.abs(y)) - SEGMENT_HALF_WIDTH) * picture.radius)[..., None]
        paint = paint * (1 - bars) + np.asarray(COLOURS["black"], dtype=np.float32) * bars
    inside = coverage(distance(picture.shape, x, y) * picture.radius)[..., None]
    ground = np.asarray(COLOURS[picture.ground], dtype=np.float32)
    return np.asarray(np.rint(ground * (1 - inside) + paint * inside), dtype=np.uint8)


def random_collage(rng: np.random.Generator, width: int, height: int) -> Pixels:
    """Draw overlapping shapes and stripes in any colours: what an autoencoder should see beside the plain pictures.

    It makes the autoencoder general enough for concepts that the base model itself is never shown.
    """
    rows, columns = np.mgrid[0:height, 0:width].astype(np.float32)
    canvas = np.broadcast_to(_any_colour(rng), (height, width, 3)).astype(np.float32)
    for _ in range(int(rng.integers(1, 5))):
        angle = float(rng.uniform(0, 2 * np.pi))
        radius = min(width, height) * float(rng.uniform(0.12, 0.5))
        x0 = columns + 0.5 - width * float(rng.uniform(0.1, 0.9))
        y0 = rows + 0.5 - height * float(rng.uniform(0.1, 0.9))
        x = (np.cos(angle) * x0 + np.sin(angle) * y0) / radius
        y = (np.cos(angle) * y0 - np.sin(angle) * x0) / radius
        paint = np.broadcast_to(_any_colour(rng), (height, width, 3))
        if rng.random() < 0.4:  # stripes 3 to 12 px wide
            half_period = float(rng.uniform(3, 12))
            stripes = np.abs((x * radius / half_period) % 2 - 1) - 0.5
            bars = coverage(stripes * half_period)[..., None]
            paint = paint * (1 - bars) + _any_colour(rng) * bars
        kind = str(rng.choice((*SHAPES, CONCEPT)))
        inside = coverage(distance(kind, x, y) * radius)[..., None]
        canvas = canvas * (1 - inside) + paint * inside
    return np.asarray(np.rint(canvas), dtype=np.uint8)


def _any_colour(rng: np.random.Generator) -> Field:
    """Return a palette colour (half of the time) or any other."""
    if rng.random() < 0.5:
        return np.asarray(COLOURS[str(rng.choice(tuple(COLOURS)))], dtype=np.float32)
    return rng.uniform(0, 255, 3).astype(np.float32)
