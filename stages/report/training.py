"""What the page tells of the training: curves, pictures before and after, how noise levels were drawn."""

from __future__ import annotations

import json
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
    """Puts the training's part together out of its artifact."""
    log = gaps.attempt("training log", read_log, store, manifest) or []
    found = gaps.attempt("held-out evaluation", read_evaluation, store, manifest)
    held_out, pictures, before = found or ([], 0, None)
    loss = curve(log, "loss")
    charts: list[Chart | None] = []
    if loss:
        charts.append(gaps.attempt("loss curve", loss_chart, loss))
    if held_out:
        charts.append(gaps.attempt("held-out curve", held_out_chart, held_out, pictures, before))
    if len(held_out) > 1 and held_out[0].by_sigma and held_out[-1].by_sigma:
        charts.append(gaps.attempt("held-out loss by noise level", by_sigma_chart, held_out, before))
    charts.append(gaps.attempt("noise levels", sigma_chart, sigmas))
    for key, title in (("lr", "Learning rate"), ("grad_norm", "Gradient norm")):
        points = curve(log, key)
        if points:
            charts.append(gaps.attempt(title.lower(), plain_chart, title, points))
    pairs, more = gaps.attempt("validation pictures", read_pairs, store, manifest, album, gaps) or ([], 0)
    mean = smoothed(loss)
    return TrainingView(
        charts=[chart for chart in charts if chart is not None],
        pairs=pairs,
        prompts_more=more,
        steps=int(log[-1]["step"]) if log else None,
        loss_first=mean[0][1] if mean else None,
        loss_last=mean[-1][1] if mean else None,
        held_out=pictures,
        held_out_first=held_out[0].loss if held_out else None,
        held_out_last=held_out[-1].loss if held_out else None,
        published=before.loss if before is not None and math.isfinite(before.loss) else None,
    )


# -- records ----------------------------------------------------------------------------------------------------------


def read_log(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    """The lines of train.jsonl, by step.

    Raises:
        KeyError: the artifact has none.
        StoreError, ValueError: it cannot be read.
    """
    lines = store.read_blob(manifest.file("train.jsonl")).splitlines()
    return sorted((json.loads(line) for line in lines if line.strip()), key=lambda record: record["step"])


@dataclass(frozen=True)
class Evaluation:
    """One round of the held-out loss: its mean, and the mean at each noise level (before the shift)."""

    step: int
    loss: float
    by_sigma: list[Point]


def read_evaluation(store: Store, manifest: Manifest) -> tuple[list[Evaluation], int, Evaluation | None]:
    """The rounds of evaluation.json by step, how many pictures are held out, and the round of the adapter published
    before, where it was measured.

    Raises:
        KeyError: the artifact has no evaluation.
        StoreError, ValueError: it cannot be read.
    """
    record = json.loads(store.read_blob(manifest.file("evaluation.json")))
    rounds = [_evaluation(int(entry["step"]), entry) for entry in record["rounds"]]
    previous = record.get("previous") or {}
    before = _evaluation(0, previous) if previous.get("loss") is not None else None
    return sorted(rounds, key=lambda entry: entry.step), len(record.get("held_out", [])), before


def _evaluation(step: int, entry: Mapping[str, Any]) -> Evaluation:
    levels = entry.get("by_sigma", {}).items()
    return Evaluation(step, float(entry["loss"]), sorted((float(sigma), float(loss)) for sigma, loss in levels))


def curve(log: Sequence[Mapping[str, Any]], key: str) -> list[Point]:
    """One number of every line that has it, by step; what is not finite is left out."""
    values = ((int(record["step"]), record.get(key)) for record in log)
    return [(step, float(value)) for step, value in values if isinstance(value, int | float) and math.isfinite(value)]


# -- charts -----------------------------------------------------------------------------------------------------------


def loss_chart(loss: Sequence[Point]) -> Chart:
    raw = Line("each step", loss, "faint")
    mean = Line("smoothed", smoothed(loss), "main")
    limits = usual_range([value for _, value in loss])
    note = "The axis ends at the 99th percentile; higher spikes are drawn at its edge." if limits else ""
    svg = line_chart("Training loss by step", [raw, mean], "step", "loss", limits)
    return Chart("Training loss", svg, [("faint", "each step"), ("main", "smoothed")], note)


def held_out_chart(rounds: Sequence[Evaluation], pictures: int, before: Evaluation | None = None) -> Chart:
    first, last = rounds[0].loss, rounds[-1].loss
    change = f", {wording.percent(last / first - 1)}" if first else ""
    points = [(float(entry.step), entry.loss) for entry in rounds]
    lines, legend = [Line("held out", points, "second", marks=True)], []
    if before is not None:
        lines.insert(0, Line("published before", [(step, before.loss) for step, _ in (points[0], points[-1])], "main"))
        legend.append(("main", f"the adapter published before, {wording.number(before.loss)}"))
    svg = line_chart("Held-out loss by step", lines, "step", "loss")
    what = f"{wording.plural(pictures, 'picture') if pictures else 'pictures'} that training never sees"
    note = f"{wording.number(first)} → {wording.number(last)}{change}. Same noise and noise levels every time."
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


def plain_chart(title: str, points: Sequence[Point]) -> Chart:
    limits = usual_range([value for _, value in points])
    return Chart(title, line_chart(f"{title} by step", [Line(title, points, "main")], "step", "", limits), [])


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


def read_pairs(store: Store, manifest: Manifest, album: Album, gaps: Gaps) -> tuple[list[Pair], int]:
    """Pictures of the first and the last round for each prompt, then those between, as far as the page has room.

    Returns:
        The pairs, and how many prompts were left out.
    """
    records = manifest.info.get("pictures") or []
    by_index: dict[int, list[dict[str, Any]]] = {}
    for record in sorted(records, key=lambda entry: (entry["index"], entry["step"])):
        by_index.setdefault(int(record["index"]), []).append(record)

    def thumbnail(record: Mapping[str, Any], edge: int) -> Round | None:
        def make() -> Thumbnail | None:
            return album.add(store.read_blob(manifest.file(str(record["file"]))), edge)

        picture = gaps.attempt(f"picture {record['file']}", make)
        return Round(int(record["step"]), picture) if picture else None

    shown = list(by_index.values())[:PROMPTS]
    ends = [
        (thumbnail(group[0], PICTURE_EDGE) if len(group) > 1 else None, thumbnail(group[-1], PICTURE_EDGE))
        for group in shown
    ]
    pairs = []
    for group, (before, after) in zip(shown, ends, strict=True):
        middle = group[1:-1]
        taken = middle if len(middle) <= ROUNDS else [middle[index * len(middle) // ROUNDS] for index in range(ROUNDS)]
        between = [made for record in taken if (made := thumbnail(record, ROUND_EDGE)) is not None]
        pairs.append(Pair(wording.shortened(str(group[-1].get("prompt", "")), 600), before, after, between))
    return pairs, len(by_index) - len(shown)
