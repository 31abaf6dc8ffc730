"""From a file's name, or from the text beside it, to a caption: one clean line, or the reason why there is none."""

from __future__ import annotations

import codecs
import unicodedata
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Literal

Strategy = Literal["filename", "textfile"]

MAXIMUM_LETTERS = 10_000
# A caption file above this is not read at all: UTF-8 needs at most four bytes a letter, and a few lines are allowed.
MAXIMUM_BYTES = 1_000_000


@dataclass(frozen=True)
class Caption:
    """A caption, or why there is none. `dropped_lines` counts further lines of the file that were left out."""

    text: str = ""
    refused: str | None = None
    dropped_lines: int = 0


def from_filename(path: str) -> Caption:
    """The file's name without its suffix, '_' read as a space."""
    return _judged(PurePosixPath(path).stem.replace("_", " "), 0, "the file name holds no caption")


def text_path(path: str) -> str:
    """The caption file that belongs to an image: the same name with '.txt'."""
    return str(PurePosixPath(path).with_suffix(".txt"))


def from_text(data: bytes) -> Caption:
    """The first line of a caption file that is not blank.

    UTF-8, with or without a byte order mark; UTF-16 where its mark says so. Further lines are left out (tools write
    variants there, and joining those would make a caption that nobody wrote) and counted.
    """
    if len(data) > MAXIMUM_BYTES:
        return Caption(refused=f"caption file of {len(data):,} bytes (at most {MAXIMUM_BYTES:,})")
    try:
        if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
            text = data.decode("utf-16")
        else:
            text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        return Caption(refused=f"caption is not UTF-8 (byte {error.start}); save it as UTF-8")
    lines = [line for line in (cleaned(line) for line in text.splitlines()) if line]
    return _judged(lines[0] if lines else "", max(0, len(lines) - 1), "empty caption")


def cleaned(text: str) -> str:
    """One line: control characters and byte order marks become spaces, runs of white space become one space."""
    return " ".join("".join(" " if _is_noise(letter) else letter for letter in text).split())


def _is_noise(letter: str) -> bool:
    return letter == "\ufeff" or unicodedata.category(letter) in ("Cc", "Cs")


def _judged(text: str, dropped_lines: int, if_empty: str) -> Caption:
    text = cleaned(text)
    if not text:
        return Caption(refused=if_empty)
    if len(text) > MAXIMUM_LETTERS:
        return Caption(refused=f"caption of {len(text):,} characters (at most {MAXIMUM_LETTERS:,})")
    return Caption(text, dropped_lines=dropped_lines)
