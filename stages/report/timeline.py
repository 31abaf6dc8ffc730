"""The timeline: a row for each node, with a bar for when it ran and how long."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from markupsafe import Markup

from stages.report import wording
from stages.report.charts import bar
from stages.report.record import Action, RunRecord

MOST_ROWS = 200


@dataclass(frozen=True)
class Row:
    label: str
    action: Action
    took: str
    reason: str
    fingerprint: str
    summary: str
    bar: Markup | None


def rows(records: Sequence[RunRecord]) -> list[Row]:
    """Rows in the pipeline's order. Bars stand at their true place where every start is known, else at the left."""
    spans = {record.label: _start(record) for record in records if record.action in ("ran", "failed")}
    known = [start for start in spans.values() if start is not None]
    aligned = bool(known) and len(known) == len(spans)
    begin = min(known) if aligned else 0.0
    ends = [
        (spans[record.label] or begin) - begin + record.seconds if aligned else record.seconds
        for record in records
        if record.label in spans
    ]
    whole = max([*ends, 1e-3])
    made = []
    for record in records[:MOST_ROWS]:
        start = (spans.get(record.label) or begin) - begin if aligned else 0.0
        drawn = bar(start / whole, record.seconds / whole, record.action) if record.label in spans else None
        made.append(
            Row(
                label=record.label,
                action=record.action,
                took=wording.duration(record.seconds) if record.label in spans else "–",
                reason=wording.shortened(wording.without_secrets(record.reason), 400),
                fingerprint=record.manifest.fingerprint[:12] if record.manifest else "",
                summary=_summary(record),
                bar=drawn,
            )
        )
    return made


def _summary(record: RunRecord) -> str:
    if record.manifest is None:
        return ""
    counts = [f"{value:,} {wording.heading(name)}" for name, value in record.manifest.counts.items() if value]
    size = sum(blob.bytes for blob in [*record.manifest.shards, *record.manifest.files])
    earlier = [f"made earlier in {wording.duration(record.manifest.duration_s)}"] if record.action == "reused" else []
    return " · ".join([*counts[:4], wording.size(size), *earlier])


def _start(record: RunRecord) -> float | None:
    """When a node started; told from the manifest's time where the run did not say."""
    if record.started_at is not None:
        return record.started_at
    if record.manifest is None or not record.manifest.created_at:
        return None
    try:
        return datetime.fromisoformat(record.manifest.created_at).timestamp() - record.seconds
    except ValueError:
        return None
