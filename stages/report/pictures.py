"""Pictures inside the page: scaled down, WebP, as data: URIs, and never more bytes in all than the page may have."""

from __future__ import annotations

import base64
import io
from dataclasses import dataclass

from PIL import Image

BUDGET_BYTES = 4_000_000
QUALITY = 80


@dataclass(frozen=True)
class Thumbnail:
    """A picture that fits into the page. `uri` is a data: URI; sizes are in pixels, the original's beside its own."""

    uri: str
    width: int
    height: int
    original_width: int
    original_height: int


class Album:
    """Makes thumbnails until the page's share of bytes is used up.

    Args:
        budget_bytes: bytes of data: URIs in all.
    """

    def __init__(self, budget_bytes: int = BUDGET_BYTES) -> None:
        self.left = budget_bytes
        self.left_out = 0

    def add(self, data: bytes | memoryview, edge: int) -> Thumbnail | None:
        """A thumbnail of at most `edge` pixels on the longer side; None where the budget is used up.

        Raises:
            OSError: the bytes are no picture that Pillow can read.
        """
        with Image.open(io.BytesIO(bytes(data))) as picture:
            original = picture.size
            small = picture.convert("RGB")
        small.thumbnail((edge, edge), Image.Resampling.LANCZOS)
        buffer = io.BytesIO()
        small.save(buffer, "WEBP", quality=QUALITY, method=4)
        uri = "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode("ascii")
        if len(uri) > self.left:
            self.left_out += 1
            return None
        self.left -= len(uri)
        return Thumbnail(uri, *small.size, *original)
