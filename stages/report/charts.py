"""Charts as inline SVG, drawn by hand: no script, no style attribute (the page's policy forbids both), colours from
the page's style sheet so that they follow light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from markupsafe import Markup, escape

from stages.report.wording import number

WIDTH, HEIGHT = 480, 250
LEFT, RIGHT, TOP, BOTTOM = 54, 18, 12, 40
MOST_POINTS = 480

Point = tuple[float, float]


@dataclass(frozen=True)
class Line:
    """One curve. `kind` names its style: 'main', 'faint' (raw values behind a smoothed curve) or 'second'."""

    label: str
    points: Sequence[Point]
    kind: Literal["main", "faint", "second"] = "main"
    marks: bool = False
    area: bool = False


def line_chart(
    title: str,
    lines: Sequence[Line],
    x_label: str,
    y_label: str,
    y_range: tuple[float, float] | None = None,
    x_range: tuple[float, float] | None = None,
) -> Markup:
    """Curves over one pair of axes.

    Args:
        title: told to screen readers.
        lines: at least one with at least one finite point.
        y_range: lowest and highest value of the axis; values beyond are drawn at its edge.
        x_range: the ends of the other axis, where the points do not say.

    Raises:
        ValueError: nothing to draw.
    """
    finite = [
        Line(line.label, [point for point in line.points if math.isfinite(point[1])], line.kind, line.marks, line.area)
        for line in lines
    ]
    everything = [point for line in finite for point in line.points]
    if not everything:
        raise ValueError(f"{title}: no finite value to draw")
    x_low, x_high = x_range or (min(x for x, _ in everything), max(x for x, _ in everything))
    y_low, y_high = y_range or (min(y for _, y in everything), max(y for _, y in everything))
    if x_high <= x_low:
        x_low, x_high = x_low - 0.5, x_high + 0.5
    if y_high <= y_low:
        pad = abs(y_low) * 0.1 or 0.5
        y_low, y_high = max(0.0, y_low - pad) if y_low >= 0 else y_low - pad, y_high + pad
    y_ticks = ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    x_ticks = [tick for tick in ticks(x_low, x_high, 6) if x_low <= tick <= x_high]

    def place(point: Point) -> Point:
        x = LEFT + (point[0] - x_low) / (x_high - x_low) * (WIDTH - LEFT - RIGHT)
        y = min(max(point[1], y_low), y_high)
        return x, HEIGHT - BOTTOM - (y - y_low) / (y_high - y_low) * (HEIGHT - TOP - BOTTOM)

    parts = [f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escape(title)}">']
    for tick, label in zip(y_ticks, labels(y_ticks), strict=True):
        _, y = place((x_low, tick))
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 7}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    base = HEIGHT - BOTTOM
    for tick, label in zip(x_ticks, labels(x_ticks), strict=True):
        x, _ = place((tick, y_low))
        parts.append(f'<line class="axis" x1="{x:.1f}" x2="{x:.1f}" y1="{base}" y2="{base + 4}"/>')
        parts.append(f'<text class="tick" x="{x:.1f}" y="{base + 17}" text-anchor="middle">{label}</text>')
    parts.append(f'<line class="axis" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
    middle = (LEFT + WIDTH - RIGHT) / 2
    parts.append(f'<text class="label" x="{middle}" y="{HEIGHT - 5}" text-anchor="middle">{escape(x_label)}</text>')
    upright = (TOP + base) / 2
    parts.append(
        f'<text class="label upright" transform="translate(12 {upright}) rotate(-90)" text-anchor="middle">'
        f"{escape(y_label)}</text>"
    )
    for line in finite:
        placed = [place(point) for point in thinned(line.points, MOST_POINTS)]
        if not placed:
            continue
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in placed)
        if line.area:
            closing = f"L{placed[-1][0]:.1f} {base}L{placed[0][0]:.1f} {base}Z"
            parts.append(f'<path class="area {line.kind}" d="{path}{closing}"/>')
        if len(placed) > 1:
            parts.append(f'<path class="curve {line.kind}" d="{path}"/>')
        if line.marks or len(placed) == 1:
            parts += [f'<circle class="mark {line.kind}" cx="{x:.1f}" cy="{y:.1f}" r="3.2"/>' for x, y in placed[-60:]]
    parts.append("</svg>")
    return Markup("".join(parts))  # noqa: S704 (numbers of ours; every text above is escaped)


def swatch(kind: str) -> Markup:
    """The little line that explains a colour in a legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 18 8" aria-hidden="true"><path class="curve {}" d="M1 4L17 4"/></svg>'
    ).format(kind)


def bar(start: float, length: float, kind: str) -> Markup:
    """A bar in a table's cell, as shares (0 to 1) of the cell's width; never thinner than the eye can see."""
    length = min(max(length, 0.006), 1.0)
    start = min(max(start, 0.0), 1.0 - length)
    return Markup(
        '<svg class="bar" viewBox="0 0 1000 10" preserveAspectRatio="none" aria-hidden="true">'
        '<rect class="track" width="1000" height="10"/><rect class="{}" x="{}" width="{}" height="10"/></svg>'
    ).format(kind, round(start * 1000), round(length * 1000))


def ticks(low: float, high: float, wanted: int) -> list[float]:
    """Round numbers (1, 2, 2.5, 5 times a power of ten) that span low to high, about `wanted` of them."""
    rough = (high - low) / max(wanted - 1, 1)
    power = 10.0 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= rough * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(index * step, 12) for index in range(first, last + 1)]


def labels(values: Sequence[float]) -> list[str]:
    """Evenly spaced numbers in words, with as many digits as tell them apart."""
    short = [number(value) for value in values]
    if len(set(short)) == len(short) or values[1] <= values[0]:
        return short
    digits = 1 - math.floor(math.log10(values[1] - values[0]))
    exact = [f"{value:.{digits}f}" for value in values]
    return [text.rstrip("0").rstrip(".") for text in exact]


def thinned(points: Sequence[Point], most: int) -> list[Point]:
    """At most about `most` points that look the same: of every run of neighbours, its lowest and its highest."""
    if len(points) <= most:
        return list(points)
    width = math.ceil(2 * len(points) / most)
    kept: list[Point] = [points[0]]
    for start in range(1, len(points) - 1, width):
        window = points[start : min(start + width, len(points) - 1)]
        kept += sorted({min(window, key=lambda point: point[1]), max(window, key=lambda point: point[1])})
    return [*kept, points[-1]]


def smoothed(points: Sequence[Point], weight: float | None = None) -> list[Point]:
    """Exponential moving average without the bias of its start; by default over about a twentieth of the points."""
    if weight is None:
        weight = 1.0 - 1.0 / max(1.0, len(points) / 20)
    mean, norm, out = 0.0, 0.0, []
    for x, y in points:
        if not math.isfinite(y):
            continue
        mean = weight * mean + (1 - weight) * y
        norm = weight * norm + (1 - weight)
        out.append((x, mean / norm))
    return out


def usual_range(values: Sequence[float]) -> tuple[float, float] | None:
    """Lowest value to the 99th percentile: an axis that one spike does not flatten. None where that is the same."""
    ordered = sorted(value for value in values if math.isfinite(value))
    if len(ordered) < 100 or ordered[0] < 0:
        return None
    high = ordered[int(len(ordered) * 0.99)]
    return (ordered[0], high) if ordered[-1] > 1.5 * high else None
