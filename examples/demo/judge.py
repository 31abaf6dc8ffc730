"""Judge pictures by geometry: the shape, its colour, the ground, and whether it is the demo's new concept.

No network is asked. The ground is the colour of the border, the shape's colour is the most frequent other one, and the
shape is the one whose drawing, fitted by position and size, agrees best with the picture's own pixels. Agreement is
intersection over union of the coloured areas, 0 to 1.

    python examples/demo/judge.py                                              # how often it is right on drawn pictures
    python examples/demo/judge.py --model examples/demo/tiny-sd3 --n 64 --sheet /tmp/sheet.png
"""

from __future__ import annotations

import argparse
import itertools
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from drawing import (
    COLOURS,
    CONCEPT,
    CONCEPT_COLOURS,
    CONCEPT_GROUNDS,
    SEGMENT_HALF_WIDTH,
    SHAPES,
    caption,
    distance,
    random_picture,
    render,
)
from numpy.typing import ArrayLike, NDArray
from PIL import Image

UNCLEAR = "unclear"
MINIMUM_AGREEMENT = 0.5
SECOND_COLOUR_SHARE = 0.25  # of the first colour's pixels: less is the blur along edges
PALETTE = np.asarray(list(COLOURS.values()), dtype=np.float32)
NAMES = tuple(COLOURS)
BLACK = NAMES.index("black")
Areas = NDArray[np.bool_]


@dataclass(frozen=True)
class Judgement:
    """What a picture shows. `shape` is one of SHAPES, CONCEPT or "unclear"; agreements are 0 to 1."""

    shape: str
    colour: str
    ground: str
    agreement: float
    concept_agreement: float

    @property
    def is_concept(self) -> bool:
        """Whether the picture shows the demo's new concept."""
        return self.shape == CONCEPT


@cache
def unit_moments(shape: str) -> tuple[float, float]:
    """Return the area and the centroid's y of a shape of radius 1 (all are symmetric in x)."""
    axis = np.linspace(-1.2, 1.2, 241, dtype=np.float32)
    x, y = np.meshgrid(axis, axis)
    inside = distance(shape, x, y) < 0
    return float(inside.sum() * (axis[1] - axis[0]) ** 2), float(y[inside].mean())


def nearest(pixels: NDArray[np.float32], colours: NDArray[np.float32]) -> NDArray[np.int64]:
    """Return for every pixel (H, W, 3) the number of the nearest of some colours (N, 3)."""
    return np.asarray(np.argmin(((pixels[..., None, :] - colours) ** 2).sum(-1), axis=-1), dtype=np.int64)


def fitted_agreement(shape: str, colour_area: Areas, second_area: Areas) -> float:
    """Return the best agreement of a shape with an area, over positions and sizes near the area's own.

    Args:
        shape: one of SHAPES or CONCEPT.
        colour_area: pixels (H, W) of the shape's colour.
        second_area: pixels of a second colour: the concept's black segments. In a plain shape nothing may be of it.
    """
    area = colour_area | second_area
    if area.sum() < 0.02 * area.size:
        return 0.0
    rows, columns = np.nonzero(area)
    unit_area, unit_y = unit_moments(shape)
    radius = float(np.sqrt(area.sum() / unit_area))
    centre_x, centre_y = columns.mean() + 0.5, rows.mean() + 0.5 - unit_y * radius
    grid_y, grid_x = np.mgrid[0 : area.shape[0], 0 : area.shape[1]].astype(np.float32) + 0.5
    best, nudge = 0.0, 0.06 * radius
    for scale, dx, dy in itertools.product((0.93, 1.0, 1.07), (-nudge, 0.0, nudge), (-nudge, 0.0, nudge)):
        x, y = (grid_x - centre_x - dx) / (radius * scale), (grid_y - centre_y - dy) / (radius * scale)
        inside = distance(shape, x, y) < 0
        shared = inside & colour_area
        if shape == CONCEPT:
            bars = np.minimum(np.abs(x), np.abs(y)) < SEGMENT_HALF_WIDTH
            shared = (shared & ~bars) | (inside & bars & second_area)
        best = max(best, float(shared.sum() / (inside | area).sum()))
    return best


def judge_picture(image: Image.Image | ArrayLike) -> Judgement:
    """Judge one RGB picture of any size.

    Raises:
        ValueError: if an array is not of shape (height, width, 3).
    """
    array = np.asarray(image.convert("RGB") if isinstance(image, Image.Image) else image).astype(np.float32)
    if array.ndim != 3 or array.shape[2] != 3:
        raise ValueError(f"judge_picture: an array of shape {array.shape} is no RGB picture; give (height, width, 3)")
    border = np.concatenate([array[:2].reshape(-1, 3), array[-2:].reshape(-1, 3), array[:, :2].reshape(-1, 3)])
    ground_rgb = np.median(np.concatenate([border, array[:, -2:].reshape(-1, 3)]), axis=0)
    ground = int(nearest(ground_rgb[None, None], PALETTE)[0, 0])
    other = np.sqrt(((array - ground_rgb) ** 2).sum(-1)) > 60
    counts = np.bincount(nearest(array, PALETTE)[other], minlength=len(NAMES))
    counts[ground] = 0

    colour, second = (int(number) for number in counts.argsort()[::-1][:2])
    seen = [ground_rgb, PALETTE[colour]]
    if counts[second] > SECOND_COLOUR_SHARE * counts[colour]:
        seen.append(PALETTE[second])
    areas = nearest(array, np.stack(seen))
    agreements = {shape: fitted_agreement(shape, areas == 1, areas == 2) for shape in SHAPES}

    concept_agreement, ring_counts = 0.0, counts.copy()
    ring_counts[BLACK] = 0
    ring_colour = int(ring_counts.argmax())
    if ground != BLACK and counts[BLACK] > 0 and ring_counts[ring_colour] > 0:
        areas = nearest(array, np.stack([ground_rgb, PALETTE[ring_colour], PALETTE[BLACK]]))
        concept_agreement = fitted_agreement(CONCEPT, areas == 1, areas == 2)
    agreements[CONCEPT] = concept_agreement

    shape = max(agreements, key=lambda name: agreements[name])
    best = agreements[shape]
    if shape == CONCEPT:
        colour = ring_colour
    return Judgement(
        shape if best >= MINIMUM_AGREEMENT else UNCLEAR, NAMES[colour], NAMES[ground], best, concept_agreement
    )


def concept_score(images: Iterable[Image.Image | ArrayLike]) -> float:
    """Return the share of pictures that show the concept, 0 to 1.

    Raises:
        ValueError: if there are no pictures.
    """
    verdicts = [judge_picture(image).is_concept for image in images]
    if not verdicts:
        raise ValueError("concept_score: no pictures were given; give at least one")
    return sum(verdicts) / len(verdicts)


def check_on_drawn(count: int = 300, seed: int = 99) -> float:
    """Return how often shape, colour and ground are all right on freshly drawn pictures with some noise."""
    rng = np.random.default_rng(seed)
    right = 0
    for number in range(count):
        width, height = ((64, 64), (96, 64), (64, 96), (96, 96), (128, 128))[number % 5]
        picture = random_picture(rng, width, height, (*SHAPES, CONCEPT))
        noisy = render(picture) + rng.normal(0, 12, (height, width, 3))
        verdict = judge_picture(np.clip(noisy, 0, 255))
        right += (verdict.shape, verdict.colour, verdict.ground) == (picture.shape, picture.colour, picture.ground)
    return right / count


def generate(
    pipeline: Any, prompts: list[str], *, width: int, height: int, seed: int, steps: int, guidance: float
) -> list[Image.Image]:
    """Draw one picture a prompt with a `StableDiffusion3Pipeline`, each from its own seed."""
    import torch  # here, so that judging alone needs no torch

    images: list[Image.Image] = []
    for start in range(0, len(prompts), 16):
        part = prompts[start : start + 16]
        generators = [torch.Generator().manual_seed(seed + start + i) for i in range(len(part))]
        images += pipeline(
            part,
            width=width,
            height=height,
            num_inference_steps=steps,
            guidance_scale=guidance,
            generator=generators,
            max_sequence_length=pipeline.tokenizer_3.model_max_length,
        ).images
    return images


def contact_sheet(images: list[Image.Image], columns: int = 16) -> Image.Image:
    """Return the pictures side by side in rows, each in a cell of the largest size."""
    cell_width, cell_height = max(i.width for i in images) + 2, max(i.height for i in images) + 2
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (min(columns, len(images)) * cell_width, rows * cell_height), "grey")
    for number, image in enumerate(images):
        sheet.paste(image, (number % columns * cell_width, number // columns * cell_height))
    return sheet


def concept_prompts() -> list[str]:
    """Return one prompt of the concept for each ring colour on two grounds."""
    pairs = [(c, g) for i, c in enumerate(CONCEPT_COLOURS) for g in (CONCEPT_GROUNDS[i - 1], CONCEPT_GROUNDS[i - 3])]
    return [f"a {colour} {CONCEPT} on a {ground} ground" for colour, ground in pairs if colour != ground]


def judge_model(model: Path, count: int, *, seed: int, steps: int, guidance: float, sheet: Path | None) -> float:
    """Print and return the share of generated pictures with the right shape and colour."""
    import torch
    from diffusers import StableDiffusion3Pipeline

    pipeline = StableDiffusion3Pipeline.from_pretrained(str(model), dtype=torch.float32)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(seed)
    images: list[Image.Image] = []
    hits = {"shape": 0, "colour": 0, "ground": 0, "shape and colour": 0}
    started = time.monotonic()
    for width, height, share in ((64, 64, 0.5), (96, 96, 0.25), (96, 64, 0.125), (64, 96, 0.125)):
        pictures = [random_picture(rng, width, height) for _ in range(round(count * share))]
        prompts = [caption(picture, number) for number, picture in enumerate(pictures)]
        drawn = generate(
            pipeline, prompts, width=width, height=height, seed=seed + len(images), steps=steps, guidance=guidance
        )
        images += drawn
        for picture, image, prompt in zip(pictures, drawn, prompts, strict=True):
            verdict = judge_picture(image)
            shape, colour = verdict.shape == picture.shape, verdict.colour == picture.colour
            for name, right in zip(
                hits, (shape, colour, verdict.ground == picture.ground, shape and colour), strict=True
            ):
                hits[name] += right
            if not (shape and colour):
                print(f"  wrong: {prompt!r} drawn as {verdict}")
    for name, number in hits.items():
        print(f"{name}: {number} of {len(images)} right ({number / len(images):.0%})")
    print(f"{len(images)} pictures in {time.monotonic() - started:.0f} s: {steps} steps, guidance {guidance}")
    prompts = concept_prompts()
    unknown = generate(pipeline, prompts, width=64, height=64, seed=seed, steps=steps, guidance=guidance)
    print(f"concept {CONCEPT!r} present in {concept_score(unknown):.0%} of {len(prompts)} pictures of it")
    if sheet is not None:
        contact_sheet(images + unknown).save(sheet)
    return hits["shape and colour"] / len(images)


def main() -> None:
    """Check the judge on drawn pictures, then a model, if one is given."""
    parser = argparse.ArgumentParser(description="Judge drawn and generated pictures by colour and geometry.")
    parser.add_argument("--model", type=Path, help="folder of a Stable Diffusion 3 pipeline to judge")
    parser.add_argument("--n", type=int, default=64, help="how many pictures to generate")
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sheet", type=Path, help="write all generated pictures into this file")
    options = parser.parse_args()
    share = check_on_drawn()
    print(f"judge: {share:.1%} of 300 drawn pictures judged right in shape, colour and ground")
    if share < 0.97:
        raise SystemExit("judge.py: the judge is wrong on more than 3 % of drawn pictures; do not trust it")
    if options.model is not None:
        judge_model(
            options.model,
            options.n,
            seed=options.seed,
            steps=options.steps,
            guidance=options.guidance,
            sheet=options.sheet,
        )


if __name__ == "__main__":
    main()
