"""Every odd kind of image file: read right, or refused with a reason. References are computed here by hand."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image, ImageCms

from stages.bucket.geometry import RefusedError, Rules
from stages.bucket.pixels import Crop, make_crop
from stages.bucket.png import encode_png
from tests.bucket.raw import encoded, gradient

RULES = Rules(
    resolution=64,
    resolution_type="pixel",
    crop=True,
    crop_aspect="square",
    crop_style="center",
    minimum_image_size=0,
    maximum_image_size=None,
    target_downsample_size=None,
    maximum_aspect=4,
    alignment=16,
)
DIGEST = "0" * 64


def crop(data: bytes, **changes: Any) -> Crop:
    return make_crop(data, Rules(**{**RULES.__dict__, **changes}), DIGEST)


def pixels(data: bytes, **changes: Any) -> np.ndarray[Any, Any]:
    image = Image.open(io.BytesIO(crop(data, **changes).png))
    assert image.mode == "RGB"
    return np.asarray(image).astype(int)


def flat(mode: str, colour: Any, size: tuple[int, int] = (64, 64)) -> Image.Image:
    return Image.new(mode, size, colour)


def png_file(width: int, height: int, bits: int, kind: int, rows: bytes, extra: bytes = b"") -> bytes:
    """A PNG of any bit depth and colour type, put together by hand. `rows` are unfiltered, without filter bytes."""
    stride = len(rows) // height
    raw = b"".join(b"\0" + rows[start : start + stride] for start in range(0, len(rows), stride))
    header = struct.pack(">IIBBBBB", width, height, bits, kind, 0, 0, 0)
    body = chunk(b"IHDR", header) + extra + chunk(b"IDAT", zlib.compress(raw)) + chunk(b"IEND", b"")
    return b"\x89PNG\r\n\x1a\n" + body


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP"])
def test_exif_orientation_gives_the_upright_picture(orientation: int, kind: str) -> None:
    upright = gradient(200, 120)
    undo = {
        1: None,
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }[orientation]
    stored = upright if undo is None else upright.transpose(undo)
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {"PNG": {}, "JPEG": {"quality": 98, "subsampling": 0}, "WEBP": {"lossless": True}}[kind]
    changes = {"crop_style": "corner", "crop_aspect": "preserve"}
    got = crop(encoded(stored, kind, exif=exif, **options), **changes)
    expected = pixels(encoded(upright), **changes)
    difference = np.abs(np.asarray(Image.open(io.BytesIO(got.png))).astype(int) - expected)
    assert difference.max() <= (6 if kind == "JPEG" else 0)
    assert got.record["original_size"] == [200, 120]
    assert got.record["exif_orientation"] == orientation


def test_a_smooth_picture_is_scaled_as_pillow_scales_it() -> None:
    big = gradient(800, 600)
    expected = np.asarray(big.resize((85, 64), Image.Resampling.LANCZOS).crop((10, 0, 74, 64))).astype(int)
    assert np.abs(pixels(encoded(big)) - expected).max() <= 3
    assert np.abs(pixels(encoded(big)) - expected).mean() < 0.5


def test_a_large_jpeg_that_is_decoded_small_shows_the_same() -> None:
    """1600x1200 is decoded at an eighth; 1601x1201 cannot be, and must give nearly the same picture."""
    fast = pixels(encoded(gradient(1600, 1200), "JPEG", quality=95))
    slow = pixels(encoded(gradient(1601, 1201), "JPEG", quality=95))
    assert np.abs(fast - slow).mean() < 1
    assert np.abs(fast - pixels(encoded(gradient(1600, 1200)))).mean() < 1


def test_fine_stripes_do_not_alias() -> None:
    stripes = np.zeros((640, 640, 3), np.uint8)
    stripes[:, ::2] = 255
    inner = pixels(encoded(Image.fromarray(stripes)))[8:-8, 8:-8]
    assert abs(inner.mean() - 127.5) < 2
    assert inner.std() < 2


def test_grey_kinds() -> None:
    assert (pixels(encoded(flat("L", 77))) == 77).all()
    assert (pixels(encoded(flat("1", 1))) == 255).all()
    grey_HW = np.full((64, 64), 0x8000, np.uint16)
    assert (pixels(encoded(Image.fromarray(grey_HW))) == 128).all()
    ramp_HW = np.repeat(np.linspace(0, 65535, 64).astype(np.uint16)[None], 64, 0)
    expected = np.rint(np.linspace(0, 65535, 64) / 257)
    assert np.abs(pixels(encoded(Image.fromarray(ramp_HW)))[0, :, 0] - expected).max() <= 1
    assert np.abs(pixels(encoded(Image.fromarray(ramp_HW), "TIFF"))[0, :, 0] - expected).max() <= 1


def test_16_bit_colour_and_alpha() -> None:
    rgb = struct.pack(">HHH", 0x1234, 0x8080, 0xFFFF) * 64 * 64
    assert np.abs(pixels(png_file(64, 64, 16, 2, rgb))[0, 0] - [0x12, 0x80, 0xFF]).max() <= 1
    rgba = struct.pack(">HHHH", 0xFFFF, 0, 0, 0x8000) * 64 * 64
    assert np.abs(pixels(png_file(64, 64, 16, 6, rgba))[0, 0] - [255, 127, 127]).max() <= 2
    grey_alpha = struct.pack(">HH", 0, 0x4000) * 64 * 64
    assert np.abs(pixels(png_file(64, 64, 16, 4, grey_alpha))[0, 0] - 191).max() <= 2


def test_transparency_shows_white() -> None:
    assert (pixels(encoded(flat("RGBA", (10, 20, 30, 0)))) == 255).all()
    assert np.abs(pixels(encoded(flat("RGBA", (0, 0, 0, 128)))) - 127).max() <= 1
    assert np.abs(pixels(encoded(flat("LA", (0, 128)))) - 127).max() <= 1
    assert (pixels(encoded(flat("RGBA", (10, 20, 30, 255))))[0, 0] == [10, 20, 30]).all()
    # What lies hidden under transparent pixels does not bleed into their neighbours.
    half = flat("RGBA", (255, 0, 0, 0), (640, 640))
    half.paste((255, 255, 255, 255), (320, 0, 640, 640))
    assert (pixels(encoded(half)) == 255).all()


def test_palettes() -> None:
    image = flat("P", 1)
    image.putpalette([0, 0, 0, 200, 100, 50])
    assert (pixels(encoded(image))[0, 0] == [200, 100, 50]).all()
    assert (pixels(encoded(image, transparency=1)) == 255).all()
    assert np.abs(pixels(encoded(image, transparency=bytes([255, 128])))[0, 0] - [227, 177, 152]).max() <= 1
    assert (pixels(encoded(image, "GIF"))[0, 0] == [200, 100, 50]).all()


def test_colour_keys() -> None:
    assert (pixels(encoded(flat("RGB", (9, 8, 7)), transparency=(9, 8, 7))) == 255).all()
    assert (pixels(encoded(flat("RGB", (9, 8, 6)), transparency=(9, 8, 7)))[0, 0] == [9, 8, 6]).all()
    assert (pixels(encoded(flat("L", 9), transparency=9)) == 255).all()
    assert (pixels(encoded(flat("L", 8), transparency=9)) == 8).all()
    key = chunk(b"tRNS", struct.pack(">HHH", 0x0900, 0x0800, 0x0700))
    rgb = struct.pack(">HHH", 0x0900, 0x0800, 0x0700) * 64 * 64
    assert (pixels(png_file(64, 64, 16, 2, rgb, key)) == 255).all()
    grey = struct.pack(">H", 0x0900) * 64 * 64
    assert (pixels(png_file(64, 64, 16, 0, grey, chunk(b"tRNS", struct.pack(">H", 0x0900)))) == 255).all()
    one_bit = bytes(8 * 64)
    assert (pixels(png_file(64, 64, 1, 0, one_bit, chunk(b"tRNS", struct.pack(">H", 0)))) == 255).all()
    assert (pixels(png_file(64, 64, 1, 0, one_bit, chunk(b"tRNS", struct.pack(">H", 1)))) == 0).all()


def test_cmyk() -> None:
    # No ink is white, full black ink is black: an inverted reading would swap them. Pillow writes as Adobe does.
    for kind in ("JPEG", "TIFF"):
        assert pixels(encoded(flat("CMYK", (0, 0, 0, 0)), kind)).min() >= 253
        assert pixels(encoded(flat("CMYK", (0, 0, 0, 255)), kind)).max() <= 2
        cyan = pixels(encoded(flat("CMYK", (255, 0, 0, 0)), kind))[0, 0]
        assert cyan[0] <= 3
        assert cyan[1:].min() >= 252


def test_animations_give_their_first_frame() -> None:
    frames = [flat("RGB", (200, 0, 0)), flat("RGB", (0, 0, 200))]
    for kind in ("GIF", "WEBP", "PNG"):
        options: dict[str, Any] = {"lossless": True} if kind == "WEBP" else {}
        data = encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=100, **options)
        assert np.abs(pixels(data)[0, 0] - [200, 0, 0]).max() <= 3


def test_a_colour_profile_is_applied() -> None:
    """Adobe RGB's (255, 0, 0) and (0, 255, 0) lie outside sRGB; its mid greens are more vivid than sRGB's."""
    profile = wide_profile()
    got = crop(encoded(flat("RGB", (60, 160, 60)), icc_profile=profile))
    assert got.record["colour_profile"] == "converted"
    red, green, blue = np.asarray(Image.open(io.BytesIO(got.png)))[0, 0]
    assert red < 45
    assert abs(int(green) - 160) < 6
    assert blue < 62
    grey = crop(encoded(flat("L", 120), icc_profile=profile))
    assert grey.record["colour_profile"] == "converted"
    assert np.ptp(np.asarray(Image.open(io.BytesIO(grey.png)))[0, 0]) <= 1


def wide_profile() -> bytes:
    """An ICC profile with Adobe RGB's primaries and gamma 2.2, put together by hand."""

    def fixed(*values: float) -> bytes:
        return b"".join(struct.pack(">i", round(value * 65536)) for value in values)

    def xyz(*values: float) -> bytes:
        return b"XYZ \0\0\0\0" + fixed(*values)

    curve = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(2.2 * 256)) + b"\0\0"
    text = b"wide\0"
    description = b"desc\0\0\0\0" + struct.pack(">I", len(text)) + text + bytes(78 + 3)
    tags = {
        b"desc": description + bytes(-len(description) % 4),
        b"cprt": b"text\0\0\0\0none\0\0\0\0",
        b"wtpt": xyz(0.9642, 1.0, 0.8249),
        b"rXYZ": xyz(0.60974, 0.31111, 0.01947),
        b"gXYZ": xyz(0.20528, 0.62567, 0.06087),
        b"bXYZ": xyz(0.14919, 0.06322, 0.74457),
        b"rTRC": curve,
        b"gTRC": curve,
        b"bTRC": curve,
    }
    table, body = struct.pack(">I", len(tags)), b""
    start = 128 + 4 + 12 * len(tags)
    for name, value in tags.items():
        table += name + struct.pack(">II", start + len(body), len(value))
        body += value
    size = struct.pack(">I", start + len(body))
    header = size + bytes(4) + b"\x02\x10\0\0mntrRGB XYZ " + bytes(12) + b"acsp" + bytes(28)
    header += fixed(0.9642, 1.0, 0.8249)
    return header.ljust(128, b"\0") + table + body


def test_profiles_that_change_nothing() -> None:
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    got = crop(encoded(flat("RGB", (60, 160, 60)), icc_profile=srgb))
    assert got.record["colour_profile"] == "srgb"
    assert (np.asarray(Image.open(io.BytesIO(got.png)))[0, 0] == [60, 160, 60]).all()
    garbage = crop(encoded(flat("RGB", (60, 160, 60)), "JPEG", quality=98, icc_profile=b"garbage" * 40))
    assert garbage.record["colour_profile"] == "ignored"
    lab = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()
    assert crop(encoded(flat("RGB", (60, 160, 60)), icc_profile=lab)).record["colour_profile"] == "ignored"


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "AVIF", "GIF", "WEBP", "PPM"])
def test_other_formats(kind: str) -> None:
    assert np.abs(pixels(encoded(flat("RGB", (200, 100, 50)), kind))[0, 0] - [200, 100, 50]).max() <= 4


def _changed(data: bytes, place: int, value: bytes) -> bytes:
    return data[:place] + value + data[place + len(value) :]


PNG, JPEG = encoded(gradient(90, 70)), encoded(gradient(90, 70), "JPEG")
BROKEN = {
    "empty": b"",
    "html": b"<!doctype html><html><body>404</body></html>",
    "svg": b'<svg xmlns="http://www.w3.org/2000/svg" width="64" height="64"/>',
    "jpeg cut at half": JPEG[: len(JPEG) // 2],
    "jpeg without its end": JPEG[:-2],
    "jpeg header only": JPEG[:200],
    "png cut at half": PNG[: len(PNG) // 2],
    "png header only": PNG[:40],
    "png with a bad checksum": _changed(PNG, PNG.index(b"IDAT") + 20, b"\xff\xff\xff\xff\xff\xff"),
    "png with a text bomb": png_file(8, 8, 8, 0, bytes(64), chunk(b"zTXt", b"a\0\0" + zlib.compress(bytes(9 << 20)))),
    "png bomb": _changed(
        PNG, 16, struct.pack(">II", 60000, 60000) + PNG[24:29] + struct.pack(
            ">I", zlib.crc32(b"IHDR" + struct.pack(">II", 60000, 60000) + PNG[24:29]))
    ),
    "a long strip": encoded(flat("L", 5, (800, 4))),
    "postscript": b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n%%EndComments\nshowpage\n",
    "floating point": encoded(Image.fromarray(np.full((64, 64), 7.5, np.float32)), "TIFF"),
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_broken_files_are_refused_in_words(name: str) -> None:
    with pytest.raises(RefusedError) as caught:
        crop(BROKEN[name])
    assert len(str(caught.value)) > 15
    assert "BytesIO" not in str(caught.value)


def test_names_and_damaged_metadata_do_not_matter() -> None:
    exif = b"Exif\0\0MM\0\x2a\0\0\0\x08\xff\xff" + bytes(range(60))
    assert pixels(encoded(gradient(90, 70), "JPEG", exif=exif)).shape == (64, 64, 3)
    one = encoded(flat("RGB", (1, 2, 3), (1, 1)))
    assert (pixels(one) == [1, 2, 3]).all()


def test_png_writer_is_read_back_exactly() -> None:
    rng = np.random.default_rng(3)
    for height, width in [(1, 1), (1, 7), (5, 1), (33, 18)]:
        picture = rng.integers(0, 256, (height, width, 3), dtype=np.uint8)
        data = encode_png(picture)
        image = Image.open(io.BytesIO(data))
        image.verify()
        assert (np.asarray(Image.open(io.BytesIO(data))) == picture).all()
        assert data == encode_png(picture.copy())
    with pytest.raises(ValueError, match="not 8-bit"):
        encode_png(np.zeros((4, 4), np.uint8))
