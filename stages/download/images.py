"""Looking at one image file: can it be decoded whole, and what is it. Runs in workers, so it imports little."""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass
from pathlib import Path

# What counts as an image by its name. Everything else in a source is passed over in silence.
SUFFIXES = frozenset({".jpg", ".jpeg", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"})
# The formats that are tried, whatever the name says, and the member extension that each gets in a shard. A closed list:
# some of Pillow's other readers start external programs.
EXTENSIONS = {
    "JPEG": "jpg",
    "MPO": "jpg",
    "PNG": "png",
    "WEBP": "webp",
    "BMP": "bmp",
    "GIF": "gif",
    "TIFF": "tif",
    "AVIF": "avif",
}
ORIENTATION_TAG = 0x0112


@dataclass(frozen=True)
class Inspection:
    """What was found out about one image file.

    `width` and `height` are pixels as stored, before the EXIF orientation is applied. `refused` says why the file is
    no use, or is None; the fields after `bytes` mean nothing when it is set.
    """

    sha256: str
    bytes: int
    refused: str | None = None
    width: int = 0
    height: int = 0
    format: str = ""
    mode: str = ""
    exif_orientation: int = 1

    @property
    def extension(self) -> str:
        return EXTENSIONS[self.format]


def inspect_file(path: Path, minimum_edge: int, maximum_pixels: int) -> Inspection:
    """Reads and fully decodes an image file.

    Raises:
        OSError: the file cannot be read at all (what it holds never raises).
    """
    return inspect(path.read_bytes(), minimum_edge, maximum_pixels)


def inspect(data: bytes, minimum_edge: int, maximum_pixels: int) -> Inspection:
    """Fully decodes an image; its size is judged by its header, before a pixel is decoded.

    Args:
        data: the file's bytes.
        minimum_edge: refused when the shorter edge has fewer pixels.
        maximum_pixels: refused when width times height is more.
    """
    from PIL import Image, UnidentifiedImageError  # heavy, and not needed to list a source

    sha256 = hashlib.sha256(data).hexdigest()

    def refuse(reason: str) -> Inspection:
        return Inspection(sha256, len(data), refused=reason)

    if not data:
        return refuse("empty file")
    Image.MAX_IMAGE_PIXELS = None  # judged below, by our own limit and before decoding
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about metadata mostly; what matters raises
            with Image.open(io.BytesIO(data), formats=_formats()) as image:
                width, height = image.size
                if width * height > maximum_pixels:
                    return refuse(f"too large: {width}x{height} pixels (download.maximum_megapixels)")
                if min(width, height) < minimum_edge:
                    return refuse(f"too small: {width}x{height} pixels (download.minimum_edge is {minimum_edge})")
                kind, mode = str(image.format), image.mode
                image.load()
                return Inspection(sha256, len(data), None, width, height, kind, mode, _orientation(image))
    except UnidentifiedImageError:
        return refuse("not an image that can be read (wrong or unknown format, or a damaged header)")
    except Exception as error:  # decoders meet hostile bytes here; whatever they raise, this file is no use
        return refuse(f"cannot be decoded: {_in_words(error)}")


def _formats() -> tuple[str, ...]:
    from PIL import Image

    Image.init()
    return tuple(name for name in EXTENSIONS if name in Image.OPEN)


def _orientation(image: object) -> int:
    """The EXIF orientation, 1 to 8; 1 where there is none or the EXIF data is damaged."""
    try:
        value = image.getexif().get(ORIENTATION_TAG, 1)  # type: ignore[attr-defined]
    except Exception:  # damaged metadata of a good picture
        return 1
    return value if isinstance(value, int) and 1 <= value <= 8 else 1


def _in_words(error: Exception) -> str:
    text = " ".join(str(error).split())[:120]
    return text or type(error).__name__
