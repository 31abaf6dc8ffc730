"""What the page tells of the training: curves, pictures before and after, how noise levels were drawn."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from statistics import NormalDist
from typing import TYPE_CHECKING, Any

from markupsafe import Markup

from stages.core.artifact import Manifest
from stages.core.store import Store
from stages.report import wording
from stages.report.charts import Line, Point, line_chart, smoothed, usual_range
from stages.report.measured import Drawn, End, Evaluation, Measured, read_finished
from stages.report.missing import Gaps
from stages.report.pictures import Album, Thumbnail

if TYPE_CHECKING:  # no stage's room imports another's; only the type is named
    from stages.train.config import SigmaSection

PICTURE_EDGE = 384
ROUND_EDGE = 160
PROMPTS = 12  # shown; the artifact has the rest
ROUNDS = 8  # between the first and the last, evenly taken


@dataclass(frozen=True)
class Chart:
    title: str
    svg: Markup
    legend: list[tuple[str, str]]
    note: str = ""


@dataclass(frozen=True)
class Round:
    step: int
    picture: Thumbnail


@dataclass(frozen=True)
class Pair:
    """The same prompt and seed before and after; `between` are the rounds along the way."""

    prompt: str
    before: Round | None
    after: Round | None
    between: list[Round]


@dataclass(frozen=True)
class TrainingView:
    """The training's part of the page; a chart that could not be drawn is not in `charts` but among the gaps."""

    charts: list[Chart]
    pairs: list[Pair]
    prompts_more: int
    steps: int | None
    loss_first: float | None
    loss_last: float | None
    held_out: int
    held_out_first: float | None
    held_out_last: float | None
    published: float | None = None
    """Held-out loss of the adapter that was published before, on the same pictures."""
    end: End | None = None
    """How far it got, where it has not finished."""

    @property
    def versus_published(self) -> float | None:
        """By how much the held-out loss is above that of the adapter published before, as a share of it."""
        if not self.published or self.held_out_last is None:
            return None
        return self.held_out_last / self.published - 1

    @property
    def held_out_change(self) -> float | None:
        """Relative change of the held-out loss over the training; negative is better."""
        if not self.held_out_first or self.held_out_last is None:
            return None
        return self.held_out_last / self.held_out_first - 1


def view_training(manifest: Manifest, sigmas: SigmaSection, store: Store, album: Album, gaps: Gaps) -> TrainingView:
    """Puts the part of a finished training together out of its artifact."""
    return view_measured(read_finished(store, manifest, gaps), sigmas, store, album, gaps)


def view_measured(measured: Measured, sigmas: SigmaSection, store: Store, album: Album, gaps: Gaps) -> TrainingView:
    """Puts a training's part together out of what it wrote down."""
    log, held_out, before = measured.log, measured.rounds, measured.before
    loss = curve(log, "loss")
    charts: list[Chart | None] = []
    # The axis of an unfinished training goes to where it was to end: so it shows how far it got.
    steps = (0.0, float(measured.end.total)) if measured.end else None
    if loss:
        charts.append(gaps.attempt("loss curve", smoothed_chart, "Training loss", "loss", loss, steps))
    if held_out:
        charts.append(gaps.attempt("held-out curve", held_out_chart, held_out, measured.held_out, before, steps))
    shaped = [entry for entry in held_out if entry.by_sigma]
    if len(shaped) > 1:
        charts.append(gaps.attempt("held-out loss by noise level", by_sigma_chart, shaped, before))
    charts.append(gaps.attempt("noise levels", sigma_chart, sigmas))
    rates, norms = curve(log, "lr"), curve(log, "grad_norm")
    if rates:
        charts.append(gaps.attempt("learning rate", plain_chart, "Learning rate", rates, steps))
    if norms:
        charts.append(gaps.attempt("gradient norm", smoothed_chart, "Gradient norm", "norm", norms, steps))
    pairs, more = gaps.attempt("validation pictures", read_pairs, store, measured.pictures, album, gaps) or ([], 0)
    mean = smoothed(loss)
    return TrainingView(
        charts=[chart for chart in charts if chart is not None],
        pairs=pairs,
        prompts_more=more,
        steps=int(log[-1]["step"]) if log else None,
        loss_first=mean[0][1] if mean else None,
        loss_last=mean[-1][1] if mean else None,
        held_out=measured.held_out,
        held_out_first=held_out[0].loss if len(held_out) > 1 else None,
        held_out_last=held_out[-1].loss if held_out else None,
        published=before.loss if before is not None and math.isfinite(before.loss) else None,
        end=measured.end,
    )


def curve(log: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """One number of every line that has it, by step; what is not finite is left out."""
    values = ((int(record["step"]), record.get(key)) for record in log)
    return [(step, float(value)) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


# -- charts -----------------------------------------------------------------------------------------------------------


def smoothed_chart(title: str, label: str, points: Sequence[Point], steps: Point | None = None) -> Chart:
    """A number of each step, and its mean over a window. `steps` are the ends of the axis, where the points do not
    say."""
    raw = Line("each step", points, "faint")
    mean = Line("smoothed", smoothed(points), "main")
    limits = usual_range([value for _, value in points])
    note = "The axis ends at the 99th percentile; higher spikes are drawn at its edge." if limits else ""
    svg = line_chart(f"{title} by step", [raw, mean], "step", label, limits, steps)
    return Chart(title, svg, [("faint", "each step"), ("main", "smoothed")], note)


def held_out_chart(
    rounds: Sequence[Evaluation], pictures: int, before: Evaluation | None = None, steps: Point | None = None
) -> Chart:
    first, last = rounds[0].loss, rounds[-1].loss
    change = f"{wording.number(first)} → {wording.number(last)}"
    if len(rounds) == 1:
        change = f"{wording.number(first)} at step {wording.count(rounds[0].step)}"
    elif first:
        change = f"{change}, {wording.percent(last / first - 1)}"
    points = [(float(entry.step), entry.loss) for entry in rounds]
    lines, legend = [Line("held out", points, "second", marks=True)], []
    if before is not None:
        lines.insert(0, Line("published before", [(step, before.loss) for step, _ in (points[0], points[-1])], "main"))
        legend.append(("main", f"the adapter published before, {wording.number(before.loss)}"))
    svg = line_chart("Held-out loss by step", lines, "step", "loss", x_range=steps)
    what = f"{wording.plural(pictures, 'picture') if pictures else 'pictures'} that training never sees"
    note = f"{change}. Same noise and noise levels every time."
    return Chart("Held-out loss", svg, [("second", what), *legend], note)


def by_sigma_chart(rounds: Sequence[Evaluation], before: Evaluation | None = None) -> Chart:
    """Where along the noise the adapter helps: held-out loss by noise level, first and last round."""
    first, last = rounds[0], rounds[-1]
    lines = [
        Line("before", first.by_sigma, "main", marks=True),
        Line("after", last.by_sigma, "second", marks=True),
    ]
    published = [("faint", "the adapter published before")] if before is not None and before.by_sigma else []
    if published and before is not None:
        lines.insert(0, Line("published before", before.by_sigma, "faint", marks=True))
    title, label = "Held-out loss by noise level", "sigma before the shift (1 is pure noise)"
    svg = line_chart(title, lines, label, "loss", x_range=(0.0, 1.0))
    legend = [("main", f"step {wording.count(first.step)}"), ("second", f"step {wording.count(last.step)}")]
    return Chart(title, svg, [*legend, *published])


def plain_chart(title: str, points: Sequence[Point], steps: Point | None = None) -> Chart:
    limits = usual_range([value for _, value in points])
    return Chart(title, line_chart(f"{title} by step", [Line(title, points, "main")], "step", "", limits, steps), [])


def sigma_chart(section: SigmaSection) -> Chart:
    """How often each noise level is trained at, before and after the shift."""
    plain = sigma_density(section)
    title, label = "Noise levels trained at", section.sampling.replace("_", "-")
    if section.shift == "auto":
        lines = [Line(label, plain, "main", area=True)]
        svg = line_chart(title, lines, "sigma", "density", _from_zero(plain), (0.0, 1.0))
        return Chart(title, svg, [("main", label)], "Before the shift, which grows with the picture's size.")
    shift = float(section.shift)
    shifted = [
        (shift * s / (1 + (shift - 1) * s), density * (1 + (shift - 1) * s) ** 2 / shift) for s, density in plain
    ]
    lines = [Line(label, plain, "faint"), Line("shifted", shifted, "main", area=True)]
    limits = _from_zero([*plain, *shifted])
    svg = line_chart(f"{title}: density of sigma", lines, "sigma (1 is pure noise)", "density", limits, (0.0, 1.0))
    return Chart(title, svg, [("faint", label), ("main", f"shifted by {wording.number(shift)}")])


def _from_zero(points: Sequence[Point]) -> tuple[float, float]:
    # Some of these densities have a pole at an end: the axis shows what is usual.
    ordered = sorted(density for _, density in points)
    return 0.0, min(ordered[-1], 4 * ordered[len(ordered) // 2])


def sigma_density(section: SigmaSection, count: int = 240) -> list[Point]:
    """The density of sigma before the shift, at `count` places within (0, 1)."""
    grid = [(index + 0.5) / count for index in range(count)]
    if section.sampling == "logit_normal":
        normal = NormalDist(section.logit_mean, section.logit_std)
        return [(s, normal.pdf(math.log(s / (1 - s))) / (s * (1 - s))) for s in grid]
    if section.sampling == "beta":
        a, b = section.beta_alpha, section.beta_beta
        log_norm = math.lgamma(a + b) - math.lgamma(a) - math.lgamma(b)
        return [(s, math.exp(log_norm + (a - 1) * math.log(s) + (b - 1) * math.log(1 - s))) for s in grid]
    if section.sampling == "mode":
        scale = section.mode_scale

        def drawn(u: float) -> float:
            return 1 - u - scale * (math.cos(math.pi * u / 2) ** 2 - 1 + u)

        edges = [index / count for index in range(count + 1)]
        pairs = [(drawn(low), drawn(high)) for low, high in pairwise(edges)]
        return sorted(((a + b) / 2, 1 / (count * max(abs(b - a), 1e-6))) for a, b in pairs)
    return [(s, 1.0) for s in grid]


# -- pictures ---------------------------------------------------------------------------------------------------------


def read_pairs(store: Store, drawn: Sequence[Drawn], album: Album, gaps: Gaps) -> tuple[list[Pair], int]:
    """Pictures of the first and the last round for each prompt, then those between, as far as the page has room.

    Returns:
        The pairs, and how many prompts were left out.
    """
    by_index: dict[int, list[Drawn]] = {}
    for picture in sorted(drawn, key=lambda entry: (entry.index, entry.step)):
        by_index.setdefault(picture.index, []).append(picture)

    def thumbnail(picture: Drawn, edge: int) -> Round | None:
        def make() -> Thumbnail | None:
            return album.add(store.read_blob(picture.blob()), edge)

        made = gaps.attempt(f"picture {picture.name}", make)
        return Round(picture.step, made) if made else None

    shown = list(by_index.values())[:PROMPTS]
    ends = [
        (
            thumbnail(group[0], PICTURE_EDGE) if len(group) > 1 or group[0].step == 0 else None,
            thumbnail(group[-1], PICTURE_EDGE) if len(group) > 1 or group[0].step > 0 else None,
        )
        for group in shown
    ]
    pairs = []
    for group, (before, after) in zip(shown, ends, strict=True):
        middle = group[1:-1]
        taken = middle if len(middle) <= ROUNDS else [middle[index * len(middle) // ROUNDS] for index in range(ROUNDS)]
        between = [made for picture in taken if (made := thumbnail(picture, ROUND_EDGE)) is not None]
        pairs.append(Pair(wording.shortened(group[-1].prompt, 600), before, after, between))
    return pairs, len(by_index) - len(shown)
