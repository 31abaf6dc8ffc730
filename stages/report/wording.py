"""Numbers, times and free texts as a person reads them."""

from __future__ import annotations

import re
from typing import Any

from markupsafe import Markup

# Control characters, lone surrogates and direction overrides: in a caption they could turn the page around.
_UNWANTED = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028\u2029\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_URL = re.compile(r"(?P<scheme>\b[a-z][a-z0-9+.\-]*://)(?:[^/\s@]+@)?(?P<rest>[^\s?#]*)(?P<query>\?[^\s]*)?")
_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{8,}")


def clean(value: Any) -> Any:
    """A value on its way into the page: free text loses what no reader should get, markup of ours stays as it is."""
    if isinstance(value, Markup) or not isinstance(value, str):
        return value
    return _UNWANTED.sub("\ufffd", value)


def without_secrets(text: str) -> str:
    """An error's text without what URLs may carry (user names, signatures in queries) and without access tokens."""

    def plain(match: re.Match[str]) -> str:
        return match["scheme"] + match["rest"] + ("?..." if match["query"] else "")

    return _TOKEN.sub("hf_...", _URL.sub(plain, text))


def shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1].rstrip() + "…"


def number(value: float) -> str:
    """A measured number with about four digits: '0.2817', '12.3', '1e-4', '1,204'."""
    if value == 0:
        return "0"
    size = abs(value)
    if size < 1e-3 or size >= 1e7:
        mantissa, _, exponent = f"{value:.2e}".partition("e")
        return f"{mantissa.rstrip('0').rstrip('.')}e{int(exponent)}"
    if size >= 100 or float(value).is_integer():
        return f"{value:,.0f}"
    return f"{value:.4g}"


def count(value: int) -> str:
    return f"{value:,}"


def plural(value: int, noun: str) -> str:
    """'1 image', '200 images', '2 data sets'."""
    return f"{value:,} {noun}" + ("" if value == 1 else "s")


def duration(seconds: float) -> str:
    """'0.4 s', '42 s', '3 min 05 s', '2 h 14 min'."""
    if seconds < 10:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def size(number_of_bytes: int) -> str:
    """'812 B', '4.2 MB', '1.3 GB'; units of 1000."""
    value = float(number_of_bytes)
    for unit in ("B", "kB", "MB", "GB"):
        if value < 1000:
            return f"{value:.0f} {unit}" if unit == "B" else f"{value:.1f} {unit}"
        value /= 1000
    return f"{value:.1f} TB"


def percent(share: float) -> str:
    """'+4 %', '−33 %'."""
    sign = "−" if share < 0 else "+"
    return f"{sign}{abs(share) * 100:.0f} %"


def heading(name: str) -> str:
    """A count's or a setting's name for people: 'distinct_captions' -> 'distinct captions'."""
    return name.replace("_", " ")
