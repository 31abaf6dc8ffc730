"""Checking images: formats that must be taken as they are, and files that break readers."""

from __future__ import annotations

import io
import re
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from stages.download.checking import ImageChecker
from stages.download.images import Inspection, inspect
from tests.download.conftest import image_bytes
from tests.download.crashing import crash_or_inspect

PIXELS = 200_000_000


def look(data: bytes, minimum_edge: int = 16, maximum_pixels: int = PIXELS) -> Inspection:
    return inspect(data, minimum_edge, maximum_pixels)


def saved(image: Image.Image, kind: str, **options: object) -> bytes:
    data = io.BytesIO()
    image.save(data, kind, **options)
    return data.getvalue()


def png(width: int, height: int) -> bytes:
    """A PNG's header, and nothing of its pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


GREY = Image.fromarray(np.arange(0, 1200, dtype=np.uint16).reshape(30, 40) * 50)
RGB = Image.open(io.BytesIO(image_bytes(1)))


@pytest.mark.parametrize(
    ("data", "kind", "mode"),
    [
        (saved(RGB, "JPEG"), "JPEG", "RGB"),
        (saved(RGB.convert("CMYK"), "JPEG"), "JPEG", "CMYK"),
        (saved(RGB, "PNG"), "PNG", "RGB"),
        (saved(GREY, "PNG"), "PNG", "I;16"),
        (saved(RGB.convert("P"), "PNG", transparency=0), "PNG", "P"),
        (saved(RGB.convert("LA"), "PNG"), "PNG", "LA"),
        (saved(RGB.convert("1"), "PNG"), "PNG", "1"),
        (saved(Image.merge("RGBA", (*RGB.split(), RGB.getchannel(0))), "WEBP"), "WEBP", "RGBA"),
        (saved(RGB, "BMP"), "BMP", "RGB"),
        (saved(RGB, "TIFF"), "TIFF", "RGB"),
        (saved(RGB.convert("P"), "GIF", save_all=True, append_images=[RGB.rotate(90).convert("P")]), "GIF", "P"),
        (saved(RGB, "AVIF"), "AVIF", "RGB"),
    ],
)
def test_formats_are_taken(data: bytes, kind: str, mode: str) -> None:
    found = look(data)
    assert found.refused is None
    assert (found.format, found.mode) == (kind, mode)
    assert (found.width, found.height, found.bytes) == (40, 30, len(data))
    assert found.extension in ("jpg", "png", "webp", "bmp", "tif", "gif", "avif")


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP"])
def test_orientation_is_noted_and_nothing_turned(orientation: int, kind: str) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    found = look(saved(RGB, kind, exif=exif))
    assert (found.width, found.height, found.exif_orientation) == (40, 30, orientation)


def test_nonsense_orientation_and_damaged_metadata_do_not_refuse() -> None:
    exif = Image.Exif()
    exif[0x0112] = 77
    assert look(saved(RGB, "JPEG", exif=exif)).exif_orientation == 1
    found = look(saved(RGB, "JPEG", exif=b"Exif\x00\x00MM\x00*garbage"))
    assert (found.refused, found.exif_orientation) == (None, 1)
    assert look(saved(RGB, "PNG", icc_profile=b"garbage")).refused is None


def _text_bomb() -> bytes:
    info = PngImagePlugin.PngInfo()
    info.add_text("comment", "a" * (3 << 20), zip=True)
    return saved(RGB, "PNG", pnginfo=info)


def _bad_crc() -> bytes:
    data = bytearray(saved(RGB, "PNG"))
    data[29] ^= 1
    return bytes(data)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"<html><body>404</body></html>", "not an image"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 99 99\n", "not an image"),
        (image_bytes(2, (400, 300))[:9000], "cannot be decoded"),
        (saved(RGB, "JPEG")[:-2], "cannot be decoded"),
        (image_bytes(3, (200, 200), "JPEG")[:4000], "cannot be decoded"),
        (image_bytes(2)[:20], "not an image|cannot be decoded"),
        (_bad_crc(), "not an image|cannot be decoded"),
        (_text_bomb(), "cannot be decoded"),
        (png(20_000, 20_000), "too large: 20000x20000"),
        (png(60, 60), "cannot be decoded"),
        (image_bytes(4, (15, 900)), "too small: 15x900"),
    ],
)
def test_files_that_break_readers(data: bytes, reason: str) -> None:
    assert re.search(reason, str(look(data).refused))


def test_size_is_judged_before_anything_is_decoded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Image.Image, "load", lambda self: pytest.fail("decoded"))
    assert "too large" in str(look(png(3000, 3000), maximum_pixels=1_000_000).refused)


def test_a_large_but_allowed_image_is_no_bomb() -> None:
    data = saved(Image.new("L", (10_000, 9_500)), "PNG")  # Pillow itself warns above 89 MP
    assert look(data).refused is None


# -- in processes -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [1, 2])
def test_results_are_in_order(tmp_path: Path, workers: int) -> None:
    paths = []
    for number in range(30):
        path = tmp_path / f"{number}.png"
        path.write_bytes(image_bytes(number) if number % 7 else b"broken")
        paths.append(path)
    with ImageChecker(workers, 16, PIXELS, expected_bytes=1 << 30) as checker:
        found = list(checker.check(iter(paths)))
    assert [path for path, _ in found] == paths
    assert [inspection.refused is not None for _, inspection in found] == [number % 7 == 0 for number in range(30)]


@pytest.mark.parametrize("killers", [{0}, {5, 6, 29}])
def test_an_image_that_kills_its_decoder_costs_only_itself(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, killers: set[int]
) -> None:
    monkeypatch.setattr("stages.download.checking.inspect_file", crash_or_inspect)
    paths = []
    for number in range(30):
        path = tmp_path / f"{number}.png"
        path.write_bytes(b"kills" if number in killers else image_bytes(number))
        paths.append(path)
    with ImageChecker(2, 16, PIXELS, expected_bytes=1 << 30) as checker:
        found = list(checker.check(iter(paths)))
    assert [path for path, _ in found] == paths
    refused = {number for number, (_, inspection) in enumerate(found) if inspection.refused}
    assert refused == killers
    assert all("crashes the decoder" in str(found[number][1].refused) for number in killers)
