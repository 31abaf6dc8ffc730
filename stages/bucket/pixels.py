"""Pixels: an image file's bytes in, the crop as PNG bytes out. Runs in the worker processes.

Decoded, turned upright, brought to RGB, scaled with Lanczos, cut, brought to sRGB, written as PNG. Pillow decodes (it
reads every odd kind of file); libvips scales, with the same filter as Pillow's and at several times its speed.
Large JPEGs are decoded at half, a quarter or an eighth of their size where that is still well above what they are
scaled to. `benchmarks/decode.py` has the numbers behind these choices.
"""

from __future__ import annotations

import warnings
from io import BytesIO
from typing import Any, NamedTuple

from PIL import Image

from stages.bucket.colour import flatten, to_srgb
from stages.bucket.geometry import Placement, RefusedError, Rules, place
from stages.bucket.png import encode_png

FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF", "AVIF", "JPEG2000", "PPM")
"""What is opened. Formats that start other programs (PostScript) or hold several pictures are left out on purpose."""
MAXIMUM_PIXELS = 1_000_000_000
"""Above this a file is a decompression bomb, whatever the download let through."""
DRAFT_MARGIN = 1.3
"""A JPEG is decoded at a fraction of its size only if that is this much larger than what it is scaled to."""
_ORIENTATION = 0x0112
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Crop(NamedTuple):
    """A finished crop: lossless bytes and how it came about."""

    png: bytes
    placement: Placement
    record: dict[str, Any]


def make_crop(data: bytes, rules: Rules, image_sha256: str) -> Crop:
    """One image file as its crop.

    Args:
        data: the file's bytes, in any of `FORMATS`.
        rules: the geometry.
        image_sha256: digest of the bytes; a random crop is drawn from it.
    Raises:
        RefusedError: it cannot be read, or is not to be used; says why.
    """
    import numpy as np  # late, as all heavy libraries: the command line starts without them

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # odd metadata is no news here; what matters raises
        try:
            image, placement, orientation, profile = _decode(data, rules, image_sha256)
        except (RefusedError, MemoryError):
            raise
        except Exception as error:  # decoders raise all kinds on damaged files: OSError, ValueError, SyntaxError, ...
            raise RefusedError(f"cannot be decoded: {_in_words(error)}") from error
    cut, colour = to_srgb(scale_and_cut(image, placement), profile)
    record = {
        "image_sha256": image_sha256,
        **placement.record(),
        "exif_orientation": orientation,
        "colour_profile": colour,
    }
    return Crop(encode_png(np.asarray(cut)), placement, record)


def scale_and_cut(image: Image.Image, placement: Placement) -> Image.Image:
    """The crop of an upright picture, in the same mode.

    Args:
        image: 'RGB', 'L' or 'CMYK'; the original, or a decoder's smaller version of the whole of it.
        placement: what is to become of it.
    """
    import numpy as np
    import pyvips  # type: ignore[import-untyped]

    (width, height), (left, top) = placement.bucket, (placement.left, placement.top)
    across, down = placement.resized[0] / image.width, placement.resized[1] / image.height
    if across >= 1 or down >= 1:
        # Not made smaller: nothing to do, or libvips would enlarge with another filter than Lanczos.
        if image.size != placement.resized:
            image = image.resize(placement.resized, Image.Resampling.LANCZOS)
        return image.crop((left, top, left + width, top + height))
    pixels = np.ascontiguousarray(np.asarray(image))
    source = pyvips.Image.new_from_memory(pixels.data, image.width, image.height, len(image.getbands()), "uchar")
    # Demand-driven: only the part that is cut out is computed.
    scaled = source.resize(across, vscale=down, kernel="lanczos3").crop(left, top, width, height)
    return Image.frombytes(image.mode, (width, height), bytes(scaled.write_to_memory()))


def _decode(data: bytes, rules: Rules, image_sha256: str) -> tuple[Image.Image, Placement, int, bytes | None]:
    """The upright picture in the file's own colours, where its crop is, its EXIF orientation and its ICC profile."""
    with Image.open(BytesIO(data), formats=FORMATS) as image:
        if image.format == "PNG":
            with Image.open(BytesIO(data), formats=("PNG",)) as checked:
                checked.verify()  # its checksums, which decoding does not look at: bits that turned are not learned
        if image.width * image.height > MAXIMUM_PIXELS:
            raise RefusedError(f"{image.width}x{image.height}: more than {MAXIMUM_PIXELS / 1e6:,.0f} megapixels")
        orientation = _orientation(image)
        turned = orientation >= 5
        original = (image.height, image.width) if turned else (image.width, image.height)
        placement = place(rules, original, image_sha256)
        if image.format in ("JPEG", "MPO"):
            _draft(image, placement.resized[::-1] if turned else placement.resized)
        image.load()
        profile = image.info.get("icc_profile")
        flat = flatten(image)
        return flat.transpose(_TURNS[orientation]) if orientation in _TURNS else flat, placement, orientation, profile


def _orientation(image: Image.Image) -> int:
    """EXIF orientation 1 to 8; 1 where there is none, or where the metadata is damaged."""
    try:
        value = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # as many kinds as there are ways to damage EXIF; the pixels may still be good
        return 1
    return value if value in _TURNS else 1


def _draft(image: Image.Image, resized: tuple[int, int]) -> None:
    """Asks the JPEG decoder for a fraction of the size where that is enough, and comes out in whole pixels (decoded
    sizes are rounded up: the last row or column would be less than a pixel, and everything a little displaced)."""
    for fraction in (8, 4, 2):
        width, height = image.width // fraction, image.height // fraction
        if image.width % fraction or image.height % fraction:
            continue
        if width >= resized[0] * DRAFT_MARGIN and height >= resized[1] * DRAFT_MARGIN:
            image.draft(None, (width, height))
            return


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    # Pillow names the in-memory buffer that it read from: of no use to anyone.
    return "no image file that is known here" if "cannot identify image file" in text else text[:200]
