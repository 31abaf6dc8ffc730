"""Which library decodes, scales and writes pictures fastest, and how exactly: the candidates of the `bucket` stage.

    python -m benchmarks.decode [--rounds 5] [--json result.json]

Candidates that are not installed are left out. What is measured, on one thread, for photo-like JPEGs of 2 and 12
megapixels brought to a 1024x1024 crop:

- crop: decode and scale, with the PSNR against Pillow's full decode and Lanczos (the reference);
- write: the lossless file, with its size.

Every number is also given as a ratio to plain Pillow in the same round, which a busy machine does not change much.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import time
from collections.abc import Callable
from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("VIPS_CONCURRENCY", "1")

import numpy as np
from PIL import Image

from stages.bucket.png import encode_png

EDGE = 1024


def photo(width: int, height: int, seed: int = 0) -> Image.Image:
    """A photo-like picture: smooth regions, edges, texture at every scale, sensor noise."""
    rng = np.random.default_rng(seed)
    image_HWC = np.zeros((height, width, 3), np.float32)
    for octave in range(2, 9):
        small = rng.normal(0, 1, (2**octave, 2**octave, 3)).astype(np.float32)
        for channel in range(3):
            layer = Image.fromarray(small[..., channel]).resize((width, height), Image.Resampling.BICUBIC)
            image_HWC[..., channel] += np.asarray(layer) * 55 / 2 ** (octave * 0.6)
    y_H1, x_1W = np.ogrid[0:height, 0:width]
    for _ in range(12):
        centre_x, centre_y, radius = rng.integers(width), rng.integers(height), rng.integers(height // 12, height // 4)
        inside_HW = (x_1W - centre_x) ** 2 + (y_H1 - centre_y) ** 2 < radius**2
        image_HWC[inside_HW] += rng.normal(0, 45, 3).astype(np.float32)
    image_HWC += 128 + rng.normal(0, 4, (height, width, 1)).astype(np.float32)
    return Image.fromarray(image_HWC.clip(0, 255).astype(np.uint8))


def jpeg(width: int, height: int, seed: int = 0, quality: int = 92) -> bytes:
    buffer = BytesIO()
    photo(width, height, seed).save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def covering(width: int, height: int) -> tuple[int, int]:
    scale = EDGE / min(width, height)
    return round(width * scale), round(height * scale)


def pillow_crop(data: bytes, margin: float | None = None, gap: float | None = None) -> np.ndarray[Any, Any]:
    image = Image.open(BytesIO(data))
    width, height = covering(*image.size)
    if margin is not None:
        image.draft(None, (int(width * margin), int(height * margin)))
    resized = image.resize((width, height), Image.Resampling.LANCZOS, reducing_gap=gap)
    left, top = (width - EDGE) // 2, (height - EDGE) // 2
    return np.asarray(resized.crop((left, top, left + EDGE, top + EDGE)))


def cut(pixels_HWC: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    height, width = pixels_HWC.shape[:2]
    left, top = (width - EDGE) // 2, (height - EDGE) // 2
    return np.ascontiguousarray(pixels_HWC[top : top + EDGE, left : left + EDGE])


def crop_candidates() -> dict[str, Callable[[bytes], np.ndarray[Any, Any]]]:
    candidates: dict[str, Callable[[bytes], np.ndarray[Any, Any]]] = {
        "pillow": pillow_crop,
        "pillow draft 2.0": lambda data: pillow_crop(data, 2.0),
        "pillow draft 1.3": lambda data: pillow_crop(data, 1.3),
        "pillow draft 1.0": lambda data: pillow_crop(data, 1.0),
        "pillow reducing_gap 2": lambda data: pillow_crop(data, None, 2.0),
    }
    if simplejpeg := _optional("simplejpeg"):

        def with_simplejpeg(data: bytes) -> np.ndarray[Any, Any]:
            image = Image.fromarray(simplejpeg.decode_jpeg(data))
            return cut(np.asarray(image.resize(covering(*image.size), Image.Resampling.LANCZOS)))

        candidates["simplejpeg + pillow lanczos"] = with_simplejpeg
    if cv2 := _optional("cv2"):
        cv2.setNumThreads(1)

        def with_cv2(data: bytes, how: int) -> np.ndarray[Any, Any]:
            pixels_HWC = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR_RGB)
            return cut(cv2.resize(pixels_HWC, covering(pixels_HWC.shape[1], pixels_HWC.shape[0]), interpolation=how))

        candidates["opencv area"] = lambda data: with_cv2(data, cv2.INTER_AREA)
        candidates["opencv lanczos4 (aliases)"] = lambda data: with_cv2(data, cv2.INTER_LANCZOS4)
    if pyvips := _optional("pyvips"):

        def with_vips(data: bytes) -> np.ndarray[Any, Any]:
            image = pyvips.Image.new_from_buffer(data, "", access="sequential")
            width, height = covering(image.width, image.height)
            resized = image.resize(width / image.width, vscale=height / image.height, kernel="lanczos3")
            left, top = (width - EDGE) // 2, (height - EDGE) // 2
            return resized.crop(left, top, EDGE, EDGE).numpy()  # type: ignore[no-any-return]

        def vips_thumbnail(data: bytes) -> np.ndarray[Any, Any]:
            image = pyvips.Image.thumbnail_buffer(data, EDGE, height=EDGE, crop="centre")
            return image.numpy()  # type: ignore[no-any-return]

        def pillow_and_vips(data: bytes) -> np.ndarray[Any, Any]:
            image = Image.open(BytesIO(data))
            width, height = covering(*image.size)
            image.draft(None, (int(width * 1.3), int(height * 1.3)))
            pixels_HWC = np.asarray(image)
            source = pyvips.Image.new_from_memory(pixels_HWC.data, image.width, image.height, 3, "uchar")
            scaled = source.resize(width / image.width, vscale=height / image.height, kernel="lanczos3")
            left, top = (width - EDGE) // 2, (height - EDGE) // 2
            return scaled.crop(left, top, EDGE, EDGE).numpy()  # type: ignore[no-any-return]

        candidates["pillow draft 1.3 + libvips (ours)"] = pillow_and_vips
        candidates["pyvips lanczos3"] = with_vips
        candidates["pyvips thumbnail"] = vips_thumbnail
    return candidates


def write_candidates(image: Image.Image) -> dict[str, Callable[[], bytes]]:
    pixels_HWC = np.asarray(image)

    def pillow(kind: str, **options: Any) -> bytes:
        buffer = BytesIO()
        image.save(buffer, kind, **options)
        return buffer.getvalue()

    def npy() -> bytes:
        buffer = BytesIO()
        np.save(buffer, pixels_HWC)
        return buffer.getvalue()

    candidates: dict[str, Callable[[], bytes]] = {
        "png level 6 (Pillow's default)": lambda: pillow("PNG"),
        "png level 1": lambda: pillow("PNG", compress_level=1),
        "png level 1, run lengths": lambda: pillow("PNG", compress_level=1, compress_type=3),
        "png level 1, huffman only": lambda: pillow("PNG", compress_level=1, compress_type=2),
        "png level 0": lambda: pillow("PNG", compress_level=0),
        "webp lossless, method 0": lambda: pillow("WEBP", lossless=True, method=0, quality=0),
        "raw npy": npy,
        "average filter + isa-l (ours)": lambda: encode_png(pixels_HWC),
    }
    if fpng := _optional("fpng_py"):
        candidates["fpng"] = lambda: fpng.fpng_encode_image_to_memory(pixels_HWC.tobytes(), *image.size)
    if imagecodecs := _optional("imagecodecs"):
        candidates["imagecodecs spng 1"] = lambda: bytes(imagecodecs.spng_encode(pixels_HWC, level=1))
        candidates["imagecodecs qoi"] = lambda: bytes(imagecodecs.qoi_encode(pixels_HWC))
    if cv2 := _optional("cv2"):
        flags = [cv2.IMWRITE_PNG_COMPRESSION, 1]
        candidates["opencv png 1"] = lambda: cv2.imencode(".png", pixels_HWC[..., ::-1], flags)[1].tobytes()
    return candidates


def _optional(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError:
        return None


def psnr(first: np.ndarray[Any, Any], second: np.ndarray[Any, Any]) -> float:
    error = float(np.mean((first.astype(np.float32) - second.astype(np.float32)) ** 2))
    return float("inf") if error == 0 else 10 * float(np.log10(255**2 / error))


def timed(functions: dict[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """CPU seconds of each function in each round; one round takes every candidate once."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(rounds):
        for name, function in functions.items():
            start = time.process_time()
            function()
            seconds[name].append(time.process_time() - start)
    return seconds


def rows_of(seconds: dict[str, list[float]], extra: dict[str, dict[str, float]]) -> list[dict[str, Any]]:
    base = next(iter(seconds.values()))
    return [
        {
            "name": name,
            "ms": round(1000 * statistics.median(values), 2),
            "times_faster": round(statistics.median([b / v for b, v in zip(base, values, strict=True)]), 2),
            **extra[name],
        }
        for name, values in seconds.items()
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result: dict[str, Any] = {}
    for label, size in {"2 MP": (1720, 1152), "12 MP": (4000, 3000)}.items():
        data = jpeg(*size)
        reference_HWC = pillow_crop(data)
        functions = {name: partial(candidate, data) for name, candidate in crop_candidates().items()}
        extra = {name: {"psnr_db": round(psnr(function(), reference_HWC), 1)} for name, function in functions.items()}
        result[f"crop {label}"] = rows_of(timed(functions, arguments.rounds), extra)
    picture = Image.fromarray(pillow_crop(jpeg(4000, 3000)))
    writers = write_candidates(picture)
    sizes = {name: {"megabytes": round(len(function()) / 1e6, 2)} for name, function in writers.items()}
    result["write 1 MP"] = rows_of(timed(writers, arguments.rounds), sizes)
    for title, rows in result.items():
        print(f"\n{title}")
        for row in rows:
            print("  " + "  ".join(f"{row[key]!s:<34}" if key == "name" else f"{key} {row[key]:<8}" for key in row))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
