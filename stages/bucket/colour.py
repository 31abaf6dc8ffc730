"""Colour: every kind of pixel that image files hold, brought to 8-bit sRGB."""

from __future__ import annotations

from functools import lru_cache
from io import BytesIO
from typing import Any

from PIL import Image, ImageCms

from stages.bucket.geometry import RefusedError

GROUND = (255, 255, 255)
"""What shows through transparent pixels: white, as on most pages."""


def flatten(image: Image.Image) -> Image.Image:
    """A loaded picture as 'RGB', 'L' or 'CMYK' with 8 bits a channel: no palette, no transparency.

    16-bit grey keeps its upper 8 bits (rounded); transparent pixels are laid over white.

    Raises:
        RefusedError: pixels of a kind whose range or colours nobody knows.
    """
    transparency = image.info.get("transparency")
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        return _deep_grey(image, transparency)
    if image.mode in ("RGBA", "RGBa", "LA", "La", "PA") or transparency is not None:
        return _over_ground(_with_alpha(image, transparency))
    if image.mode == "P":
        if image.palette is not None and image.palette.mode != "RGB":
            return _over_ground(image.convert("RGBA"))
        return image.convert("RGB")
    if image.mode == "1":
        return image.convert("L")
    if image.mode in ("RGBX", "YCbCr"):
        return image.convert("RGB")
    if image.mode in ("RGB", "L", "CMYK"):
        return image
    raise RefusedError(f"pixels of kind {image.mode!r} cannot be brought to RGB: save it as a PNG or JPEG")


def _with_alpha(image: Image.Image, transparency: Any) -> Image.Image:
    if image.mode in ("RGBa", "La"):
        return image.convert("RGBA" if image.mode == "RGBa" else "LA").convert("RGBA")
    if image.mode == "RGB" and isinstance(transparency, tuple) and max(transparency) > 255:
        # A 16-bit colour key, with the pixels cut to their upper 8 bits already.
        image.info["transparency"] = tuple(value >> 8 for value in transparency)
    elif image.mode == "1":
        # Pillow keeps 1-bit pixels as 0 and 255, and the key as 0 or 1.
        key = 255 if transparency else 0
        image = image.convert("L")
        image.info["transparency"] = key
    return image.convert("RGBA")


def _over_ground(rgba: Image.Image) -> Image.Image:
    alpha = rgba.getchannel("A")
    if alpha.getextrema() == (255, 255):
        return rgba.convert("RGB")
    ground = Image.new("RGB", rgba.size, GROUND)
    ground.paste(rgba.convert("RGB"), mask=alpha)
    return ground


def _deep_grey(image: Image.Image, transparency: Any) -> Image.Image:
    import numpy as np  # late, as all heavy libraries: the command line starts without them

    values_HW = np.asarray(image)
    if image.mode == "F":
        if not (np.isfinite(values_HW).all() and values_HW.min() >= 0 and values_HW.max() <= 1):
            raise RefusedError("floating-point pixels outside 0 to 1: save it with 8 or 16 bits")
        grey_HW = np.rint(values_HW * 255).astype(np.uint8)
    else:
        if values_HW.min() < 0 or values_HW.max() > 0xFFFF:
            raise RefusedError("32-bit pixels beyond 16 bits: save it with 8 or 16 bits")
        grey_HW = ((values_HW.astype(np.uint32) + 128) // 257).astype(np.uint8)
    if isinstance(transparency, int):
        grey_HW = np.where(values_HW == transparency, np.uint8(GROUND[0]), grey_HW)
    return Image.fromarray(grey_HW)


def to_srgb(image: Image.Image, profile: bytes | None) -> tuple[Image.Image, str]:
    """A flat picture as sRGB.

    Args:
        image: 'RGB', 'L' or 'CMYK'.
        profile: the ICC profile that the file brought along, if any.
    Returns:
        The picture, and what was done about its profile: 'none', 'srgb' (it is one), 'converted' or 'ignored' (it is
        damaged, or for another kind of pixels).
    """
    if not profile:
        return image.convert("RGB"), "none"
    try:
        space, transform = _transform(profile, image.mode)
        if transform is None:
            return image.convert("RGB"), "srgb"
        if space == "RGB" and image.mode == "L":
            image = image.convert("RGB")
        converted = ImageCms.applyTransform(image, transform)
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return image.convert("RGB"), "ignored"
    return (image.convert("RGB"), "ignored") if converted is None else (converted, "converted")


@lru_cache(maxsize=8)  # the pictures of a data set often come from a few cameras
def _transform(profile: bytes, mode: str) -> tuple[str, ImageCms.ImageCmsTransform | None]:
    opened = ImageCms.getOpenProfile(BytesIO(profile))
    space = opened.profile.xcolor_space.strip()
    if space == "RGB" and mode != "CMYK" and "srgb" in ImageCms.getProfileDescription(opened).lower():
        return space, None
    return space, ImageCms.buildTransform(
        opened,
        ImageCms.createProfile("sRGB"),
        "RGB" if space == "RGB" and mode == "L" else mode,
        "RGB",
        ImageCms.Intent.RELATIVE_COLORIMETRIC,
        ImageCms.Flags.BLACKPOINTCOMPENSATION,
    )
