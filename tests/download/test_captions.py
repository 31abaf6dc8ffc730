"""Captions: whatever stands in a file, out comes one clean line or a reason."""

from __future__ import annotations

import re

import pytest

from stages.download.captions import MAXIMUM_BYTES, from_filename, from_text, text_path


@pytest.mark.parametrize(
    ("data", "text"),
    [
        (b"a cat", "a cat"),
        (b"  a cat \r\n", "a cat"),
        (b"\n\n  \n a cat\n", "a cat"),
        (b"\xef\xbb\xbfa cat", "a cat"),
        ("a cat".encode("utf-16"), "a cat"),
        ("a cat".encode("utf-16-be").join([b"\xfe\xff", b""]), "a cat"),
        (b"a\x00 cat\x07\tsits\x1b[0m", "a cat sits [0m"),
        ("a\u2028b".encode(), "a"),
        ("кот 猫 🐈‍⬛".encode(), "кот 猫 🐈‍⬛"),
        (b"a" * 10_000, "a" * 10_000),
    ],
)
def test_texts(data: bytes, text: str) -> None:
    caption = from_text(data)
    assert caption.refused is None
    assert caption.text == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b" \n\t\r\n \x00", "empty"),
        (b"\xef\xbb\xbf", "empty"),
        (b"caf\xe9", "not UTF-8 .byte 3"),
        (b"\xff\xfea", "not UTF-8"),
        (b"a" * 10_001, "10,001 characters"),
        (b"a\n" * MAXIMUM_BYTES, "bytes"),
    ],
)
def test_refused_texts(data: bytes, reason: str) -> None:
    caption = from_text(data)
    assert caption.refused is not None
    assert re.search(reason, caption.refused)


def test_the_first_line_counts_and_the_others_are_counted() -> None:
    caption = from_text(b"first\n\nsecond\nthird\n")
    assert (caption.text, caption.dropped_lines) == ("first", 2)


def test_filenames() -> None:
    assert from_filename("sub/a_red__ring.v2.png").text == "a red ring.v2"
    assert from_filename("sub/___.png").refused is not None
    assert text_path("sub/a.b.png") == "sub/a.b.txt"
