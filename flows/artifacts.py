"""What Prefect's page of a run shows beside its logs: counts as a table, curves and pictures, where the report is.

Showing must never cost the work that it shows: what cannot be drawn or sent is a warning in the log.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Callable, Sequence

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from prefect.logging import get_run_logger

from flows.reporting import artifact_key
from stages.core.artifact import Manifest
from stages.pipeline import Pipeline
from stages.report.missing import Gaps
from stages.report.pictures import Album
from stages.report.record import RunRecord
from stages.report.training import Pair, view_training

PICTURES_BYTES = 600_000
# The page's style sheet is not there inside an <img>: the few rules that a chart needs travel with it.
_CHART_STYLE = (
    "text{font:12px sans-serif;fill:#5c6472}.grid{stroke:#e2e5ea}.axis{stroke:#c3c8d0}.curve{fill:none;stroke-width:2}"
    ".main{stroke:#4453d6}.second{stroke:#0b8a72}.faint{stroke:#b9c0ee}.mark{stroke:none}circle.main{fill:#4453d6}"
    "circle.second{fill:#0b8a72}.area{stroke:none;fill:#4453d6;opacity:.12}.paper{fill:#fff}"
)


def show_training(pipeline: Pipeline, manifest: Manifest) -> None:
    """Curves, and the validation pictures before and after, as one page of Markdown."""
    album, gaps = Album(PICTURES_BYTES), Gaps()
    view = view_training(manifest, pipeline.config.train.sigmas, pipeline.store, album, gaps)
    parts = [f"## {pipeline.config.name}: training", ""]
    for chart in view.charts:
        parts += [f"### {_plain(chart.title)}", "", f"![{_plain(chart.title)}]({_svg_uri(str(chart.svg))})", ""]
    if view.pairs:
        parts += ["### Before and after", "", "| prompt | before | after |", "|---|---|---|"]
        parts += [_row(pair) for pair in view.pairs]
    parts += [f"\n*{gap.what}: {gap.why}*" for gap in gaps.found]
    create_markdown_artifact(
        "\n".join(parts),
        key=artifact_key(pipeline.config.name, "training"),
        description="Loss curves, and the validation prompts before and after training",
    )


def show_run(pipeline: Pipeline, records: Sequence[RunRecord], report: str) -> None:
    """The run as a table, and where its report is."""
    name = pipeline.config.name
    rows = [
        {
            "stage": record.label,
            "outcome": record.action,
            "seconds": round(record.seconds, 1),
            "made of": _counts(record.manifest),
            "refused": len(record.manifest.refused) if record.manifest else "",
            "MB": round(_bytes(record.manifest) / 1e6, 1) if record.manifest else "",
            "why": record.reason,
        }
        for record in records
    ]
    create_table_artifact(rows, key=artifact_key(name, "stages"), description=f"What became of each stage of {name}")
    if report.startswith(("http://", "https://")):
        create_link_artifact(report, link_text="report.html", key=artifact_key(name, "report"))
    else:
        text = f"The report of this run is at\n\n    {report}\n\nA browser cannot open it from here: fetch it first."
        create_markdown_artifact(text, key=artifact_key(name, "report"), description="Where report.html is")


def attempted(what: str, show: Callable[[], None]) -> None:
    """Shows something, or says in the log why not."""
    try:
        show()
    except Exception as error:
        get_run_logger().warning("%s could not be shown: %s: %s", what, type(error).__name__, error)


def _counts(manifest: Manifest | None) -> str:
    return (
        ", ".join(f"{count:,} {name.replace('_', ' ')}" for name, count in manifest.counts.items() if count)
        if manifest
        else ""
    )


def _bytes(manifest: Manifest) -> int:
    return sum(blob.bytes for blob in [*manifest.shards, *manifest.files])


def _svg_uri(svg: str) -> str:
    styled = svg.replace("<svg ", '<svg xmlns="http://www.w3.org/2000/svg" width="480" ', 1)
    opened = styled.index(">") + 1
    # On paper of its own: the pages around it may be dark, and an <img> does not know.
    paper = '<rect class="paper" width="100%" height="100%"/>'
    styled = f"{styled[:opened]}<style>{_CHART_STYLE}</style>{paper}{styled[opened:]}"
    return "data:image/svg+xml;base64," + base64.b64encode(styled.encode()).decode("ascii")


def _row(pair: Pair) -> str:
    def cell(found: object) -> str:
        picture = getattr(found, "picture", None)
        return f"![]({picture.uri})" if picture is not None else "-"

    return f"| {_plain(pair.prompt)} | {cell(pair.before)} | {cell(pair.after)} |"


def _plain(text: str) -> str:
    """Text from a data set as Markdown that means nothing but itself."""
    return re.sub(r"([\\`*_{}\[\]()<>#+\-.!|~])", r"\\\1", " ".join(text.split()))
