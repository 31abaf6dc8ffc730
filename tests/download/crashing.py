"""A stand-in for a decoder with a bug. By itself in a file, so that a worker process that runs it imports little."""

from __future__ import annotations

import os
from pathlib import Path

from stages.download.images import Inspection, inspect


def crash_or_inspect(path: Path, minimum_edge: int, maximum_pixels: int) -> Inspection:
    """One file kills its process; all others are inspected."""
    data = path.read_bytes()
    if data == b"kills":
        os.kill(os.getpid(), 9)
    return inspect(data, minimum_edge, maximum_pixels)
