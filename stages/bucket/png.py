"""A PNG writer for crops: plain RGB with 8 bits, several times faster than general ones, read by every reader.

All rows use the 'average' filter (each byte less the mean of the ones to its left and above), which is near the best
for photographs and one subtraction over the whole picture; the rest is deflate, by ISA-L. `benchmarks/decode.py` has
the numbers. There is no metadata: the same pixels give the same bytes.
"""

from __future__ import annotations

import struct
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np

SIGNATURE = b"\x89PNG\r\n\x1a\n"
LEVEL = 1
_AVERAGE = 3
_RGB8 = (8, 2, 0, 0, 0)  # bits, colour type, and the only methods of compression, filtering and interlacing in use


def encode_png(pixels_HWC: np.ndarray[Any, np.dtype[np.uint8]]) -> bytes:
    """Pixels (height, width, 3) as the bytes of a PNG file.

    Raises:
        ValueError: not three 8-bit channels.
    """
    import numpy as np  # late, as all heavy libraries: the command line starts without them
    from isal import isal_zlib

    if pixels_HWC.dtype != np.uint8 or pixels_HWC.ndim != 3 or pixels_HWC.shape[2] != 3:
        raise ValueError(f"pixels are {pixels_HWC.dtype} {pixels_HWC.shape}, not 8-bit (height, width, 3)")
    height, width, channels = pixels_HWC.shape
    rows_HW = pixels_HWC.reshape(height, width * channels)
    left_HW, above_HW = np.zeros_like(rows_HW), np.zeros_like(rows_HW)
    left_HW[:, channels:] = rows_HW[:, :-channels]
    above_HW[1:] = rows_HW[:-1]
    filtered_HW = np.empty((height, 1 + width * channels), np.uint8)
    filtered_HW[:, 0] = _AVERAGE
    mean_HW = (left_HW & above_HW) + ((left_HW ^ above_HW) >> 1)  # floor((left + above) / 2) without a ninth bit
    np.subtract(rows_HW, mean_HW, out=filtered_HW[:, 1:])

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", isal_zlib.crc32(kind + data))

    header = chunk(b"IHDR", struct.pack(">II5B", width, height, *_RGB8))
    return SIGNATURE + header + chunk(b"IDAT", isal_zlib.compress(filtered_HW.data, LEVEL)) + chunk(b"IEND", b"")
