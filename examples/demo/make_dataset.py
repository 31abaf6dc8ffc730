"""Draw the demo data set: captioned pictures of a concept that the demo model has never seen.

    python examples/demo/make_dataset.py OUT [--count N] [--seed S]

Each picture lies beside a .txt with its caption. Sizes and aspect ratios vary; the files are PNG, JPEG and WebP; some
JPEGs are stored turned, with the EXIF orientation that turns them back; several captions are the same; and two files
are broken on purpose (a JPEG that was cut off, and a web page named .jpg). The same seed gives the same bytes.
"""

from __future__ import annotations

import argparse
import io
from pathlib import Path

import numpy as np
from drawing import CONCEPT, WORDINGS, caption, random_picture, render
from PIL import Image

# EXIF orientation -> what turns an upright picture into the one that is stored.
STORED_TURNED = {
    3: Image.Transpose.ROTATE_180,
    6: Image.Transpose.ROTATE_90,
    8: Image.Transpose.ROTATE_270,
    2: Image.Transpose.FLIP_LEFT_RIGHT,
}
ORIENTATION_TAG = 0x0112
SHORTEST, LONGEST = 90, 260
WEB_PAGE = "<!DOCTYPE html>\n<html><head><title>404</title></head><body><p>This picture has moved.</p></body></html>\n"


def picture_size(rng: np.random.Generator) -> tuple[int, int]:
    """Return (width, height) in pixels, each from 90 to 260: squares, and up to 3:2 either way."""
    short = int(rng.integers(SHORTEST, 174))
    long = min(LONGEST, round(short * float(rng.choice([1.0, 1.0, 1.25, 1.5]))) + int(rng.integers(0, 6)))
    return (long, short) if rng.random() < 0.5 else (short, long)


def encode(image: Image.Image, number: int) -> tuple[str, bytes]:
    """Return (suffix, file bytes): of ten pictures five are PNG, three JPEG (one stored turned) and two WebP."""
    buffer = io.BytesIO()
    kind = number % 10
    if kind < 5:
        image.save(buffer, "PNG")
        return ".png", buffer.getvalue()
    if kind < 7:
        image.save(buffer, "WEBP", quality=92, method=4)
        return ".webp", buffer.getvalue()
    exif = Image.Exif()
    if kind == 9:
        orientation = list(STORED_TURNED)[number // 10 % len(STORED_TURNED)]
        exif[ORIENTATION_TAG] = orientation
        image = image.transpose(STORED_TURNED[orientation])
    image.save(buffer, "JPEG", quality=93, subsampling=0, exif=exif)
    return ".jpg", buffer.getvalue()


def make_dataset(out: Path, count: int = 240, seed: int = 7) -> int:
    """Write `count` captioned pictures, and two broken ones, into a folder. Returns the number of picture files.

    Raises:
        ValueError: if count is below 1.
        FileExistsError: if the folder holds anything already.
    """
    if count < 1:
        raise ValueError(f"make_dataset: count is {count}; give at least 1")
    if out.exists() and any(out.iterdir()):
        raise FileExistsError(f"make_dataset: {out} is not empty; give a new folder, or remove this one")
    out.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(seed)
    for number in range(count):
        picture = random_picture(rng, *picture_size(rng), (CONCEPT,), spread=0.06)
        suffix, content = encode(Image.fromarray(render(picture)), number)
        stem = f"{CONCEPT}_{number:04d}"
        (out / f"{stem}{suffix}").write_bytes(content)
        (out / f"{stem}.txt").write_text(caption(picture, int(rng.integers(len(WORDINGS)))) + "\n", encoding="utf-8")

    buffer = io.BytesIO()
    last = Image.fromarray(render(random_picture(rng, 160, 120, (CONCEPT,))))
    last.save(buffer, "JPEG", quality=93)
    (out / "broken_cut_off.jpg").write_bytes(buffer.getvalue()[: len(buffer.getvalue()) // 3])
    (out / "broken_cut_off.txt").write_text(f"a {CONCEPT} that was cut off\n", encoding="utf-8")
    (out / "broken_web_page.jpg").write_text(WEB_PAGE, encoding="utf-8")
    (out / "broken_web_page.txt").write_text(f"a {CONCEPT} that is a web page\n", encoding="utf-8")
    return count + 2


def main() -> None:
    """Parse the command line and draw."""
    parser = argparse.ArgumentParser(description="Draw the demo data set into a new folder.")
    parser.add_argument("out", type=Path, help="a new or empty folder")
    parser.add_argument("--count", type=int, default=240, help="pictures that are not broken")
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    try:
        written = make_dataset(options.out, options.count, options.seed)
    except (ValueError, FileExistsError) as error:
        raise SystemExit(str(error)) from None
    print(f"{written} picture files with captions in {options.out}, two of them broken on purpose")


if __name__ == "__main__":
    main()
