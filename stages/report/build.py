"""report.html: one self-contained page about a run, made from the store alone.

No script, nothing from the network: pictures are data: URIs, charts are inline SVG, and a content security policy
holds the page to it. Whatever comes from a data set or an error message is escaped.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined, select_autoescape

from stages.core.artifact import Manifest
from stages.core.filesystem import LocalFiles
from stages.pipeline import Node, Pipeline
from stages.report import wording
from stages.report.charts import swatch
from stages.report.datasets import CROPS, SHEETS, DatasetView, view_dataset
from stages.report.measured import TRAIN, find_unfinished
from stages.report.missing import Gaps
from stages.report.pictures import Album
from stages.report.provenance import (
    base_layers,
    origins,
    outcome,
    published,
    training_facts,
    verdict,
    versions,
)
from stages.report.record import Action, RunRecord, manifests_of, records_in_store
from stages.report.timeline import rows
from stages.report.training import TrainingView, view_measured, view_training

__all__ = ["Action", "RunRecord", "build_report", "records_in_store", "report_is_about", "report_place", "write_report"]

FOLDER = Path(__file__).parent
MOST_DATASETS = 20


def build_report(pipeline: Pipeline, records: Sequence[RunRecord], error: str | None = None) -> str:
    """The page as HTML. Works for a run that failed midway: what there is, is shown.

    Args:
        pipeline: the configuration and its store.
        records: what became of each node.
        error: why the run failed, where it did.
    """
    album, gaps = Album(), Gaps()
    manifests = manifests_of(pipeline, list(records))
    config = pipeline.config
    train, publish = manifests.get(TRAIN), manifests.get(Node("publish"))
    training = _training(pipeline, manifests, album, gaps)
    views = [
        gaps.attempt(f"data set {dataset.id}", _dataset, pipeline, dataset.id, manifests, album, gaps)
        for dataset in config.datasets[:MOST_DATASETS]
    ]
    datasets = [view for view in views if view is not None]
    failed = [record for record in records if record.action == "failed"]
    state, sentence = outcome(records, error)
    made_from, origins_more = origins(manifests)
    style = (FOLDER / "style.css").read_text(encoding="utf-8")
    return (
        _environment()
        .get_template("report.html.j2")
        .render(
            name=config.name,
            base_model=config.model.pretrained_model_name_or_path,
            base_revision=config.model.revision,
            state=state,
            outdated=any(record.outdated for record in records),
            sentence=sentence,
            learned=_learned(training, manifests),
            error=wording.shortened(wording.without_secrets(error), 4000) if error else None,
            failed=failed,
            error_is_told=bool(error) and any(record.reason and record.reason in str(error) for record in failed),
            published=published(config.publish, publish),
            verdict=verdict(config.publish, publish),
            tiles=_tiles(records, manifests, datasets, training),
            timeline=rows(records),
            timeline_more=max(0, len(records) - len(rows(records))),
            training=training,
            is_trained=train is not None,
            datasets=datasets,
            datasets_more=max(0, len(config.datasets) - MOST_DATASETS),
            embeds=manifests.get(Node("embeds")),
            facts=training_facts(config.train, train),
            base_layers=gaps.attempt("table of the base's layers", base_layers, train) or [],
            origins=made_from,
            origins_more=origins_more,
            versions=versions(manifests),
            store_url=wording.without_secrets(pipeline.store.url),
            gaps=gaps.found,
            left_out=wording.plural(album.left_out, "picture") if album.left_out else "",
            made_at=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            style=style,
            style_digest=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode("ascii"),
            swatch=swatch,
        )
    )


def write_report(
    pipeline: Pipeline,
    records: Sequence[RunRecord],
    error: str | None = None,
    copy_to: Path | None = None,
    run: str | None = None,
) -> str:
    """Builds the page and puts it into the store at runs/<name>/report.html, replacing that of an earlier run.

    Args:
        copy_to: also write it to this local file.
        run: also keep it at runs/<name>/history/<run>/report.html.

    Returns:
        Where a person opens it: the copy, or the file of a local store, or its address in the store.
    """
    data = build_report(pipeline, records, error).encode("utf-8", errors="replace")
    pipeline.store.files.put_bytes(_path(pipeline), data)
    if run is not None:
        pipeline.store.files.put_bytes(f"runs/{pipeline.config.name}/history/{run}/report.html", data)
    about = {record.label: record.manifest.fingerprint if record.manifest else None for record in records}
    pipeline.store.put_json(_about_path(pipeline), about)
    if copy_to is not None:
        copy_to.parent.mkdir(parents=True, exist_ok=True)
        copy_to.write_bytes(data)
        return str(copy_to)
    return _place(pipeline)


def report_place(pipeline: Pipeline) -> str | None:
    """Where the report of this configuration's last run is; None where there is none."""
    return _place(pipeline) if pipeline.store.files.size(_path(pipeline)) is not None else None


def report_is_about(pipeline: Pipeline) -> dict[str, str | None]:
    """Fingerprints of the artifacts that the last report shows, by label; empty where there is no report."""
    found = pipeline.store.get_json(_about_path(pipeline))
    return found if isinstance(found, dict) else {}


def _about_path(pipeline: Pipeline) -> str:
    return f"runs/{pipeline.config.name}/report.json"


def _path(pipeline: Pipeline) -> str:
    return f"runs/{pipeline.config.name}/report.html"


def _place(pipeline: Pipeline) -> str:
    files = pipeline.store.files
    return str(files.absolute(_path(pipeline))) if isinstance(files, LocalFiles) else f"{files.root}/{_path(pipeline)}"


def _training(pipeline: Pipeline, manifests: dict[Node, Manifest], album: Album, gaps: Gaps) -> TrainingView | None:
    """The training's part; of one that has not finished, as far as it got. None where there is nothing to show."""
    sigmas, train = pipeline.config.train.sigmas, manifests.get(TRAIN)
    if train is not None:
        return gaps.attempt("training", view_training, train, sigmas, pipeline.store, album, gaps)
    left = gaps.attempt("what the unfinished training left", find_unfinished, pipeline, manifests)
    if left is None:
        return None
    return gaps.attempt("unfinished training", view_measured, left, sigmas, pipeline.store, album, gaps)


def _dataset(
    pipeline: Pipeline, dataset_id: str, manifests: dict[Node, Manifest], album: Album, gaps: Gaps
) -> DatasetView:
    dataset = pipeline.config.dataset(dataset_id)
    bucket = dataset.bucket.applied_to(pipeline.config.bucket)
    unit = {"area": "MP", "pixel": "px on the shorter edge", "pixel_area": "px square edge"}[bucket.resolution_type]
    shape = {"square": "square crops", "preserve": "crops of the nearest aspect"}[bucket.crop_aspect]
    place = {"random": "at a random place", "corner": "from the corner"}.get(bucket.crop_style, "from the middle")
    style = f"{shape}, {place}" if bucket.crop else "each picture's own aspect"
    index = [entry.id for entry in pipeline.config.datasets].index(dataset_id)
    found = {node.stage: manifest for node, manifest in manifests.items() if node.dataset == dataset_id}
    geometry = f"{bucket.resolution:g} {unit} · {style}"
    return view_dataset(dataset, geometry, found, pipeline.store, album, gaps, CROPS if index < SHEETS else 0)


def _learned(training: TrainingView | None, manifests: dict[Node, Manifest]) -> str:
    """What came of the training, in a sentence; empty where nothing did."""
    if training is None or training.steps is None:
        return ""
    crops = sum(shard.samples for node, found in manifests.items() if node.stage == "bucket" for shard in found.shards)
    seen = f" on {wording.plural(crops - training.held_out, 'picture')}" if crops > training.held_out else ""
    text = f"Trained for {wording.plural(training.steps, 'step')}{seen}"
    if training.end is not None:
        text = f"Trained for {training.end.done:,} of {wording.plural(training.end.total, 'step')}"
    if training.held_out_change is None:
        return f"{text}."
    direction = "fell" if training.held_out_change < 0 else "rose"
    first, last = training.held_out_first or 0.0, training.held_out_last or 0.0
    held_out = wording.plural(training.held_out, "picture") if training.held_out else "pictures"
    return (
        f"{text}; the loss on {held_out} held out {direction} from {wording.number(first)} to {wording.number(last)}."
    )


def _tiles(
    records: Sequence[RunRecord],
    manifests: dict[Node, Manifest],
    datasets: Sequence[DatasetView],
    training: TrainingView | None,
) -> list[tuple[str, str, str]]:
    """The run's few headline numbers as (value, label, note)."""

    def samples(stage: str) -> int:
        return sum(shard.samples for node, found in manifests.items() if node.stage == stage for shard in found.shards)

    tiles = []
    if any(node.stage == "bucket" for node in manifests):
        refused = sum(view.refused_total for view in datasets)
        tiles.append((wording.count(samples("bucket")), "crops", f"{refused:,} refused" if refused else "none refused"))
    if Node("embeds") in manifests:
        tiles.append((wording.count(samples("embeds")), "text embeddings", "each text once"))
    if training and training.steps is not None:
        note = ""
        if training.loss_first is not None and training.loss_last is not None:
            note = f"loss {wording.number(training.loss_first)} → {wording.number(training.loss_last)}"
        whole = f"of {wording.plural(training.end.total, 'training step')}" if training.end else "training steps"
        tiles.append((wording.count(training.steps), whole, note))
    if training and training.held_out_change is not None:
        first, last = training.held_out_first or 0.0, training.held_out_last or 0.0
        note = f"{wording.number(first)} → {wording.number(last)}"
        tiles.append((wording.percent(training.held_out_change), "held-out loss", note))
    if training and training.versus_published is not None:
        note = f"{wording.number(training.held_out_last or 0.0)}, before {wording.number(training.published or 0.0)}"
        tiles.append((wording.percent(training.versus_published), "against published", note))
    ran = sum(record.action in ("ran", "failed") for record in records)
    seconds = sum(record.seconds for record in records if record.action in ("ran", "failed"))
    reused = sum(record.action == "reused" for record in records)
    tiles.append((wording.duration(seconds) if ran else "0 s", "of work in this run", f"{ran} ran, {reused} reused"))
    return tiles


def _environment() -> Environment:
    environment = Environment(
        loader=FileSystemLoader(FOLDER),
        autoescape=select_autoescape(default=True, default_for_string=True, enabled_extensions=("j2",)),
        undefined=StrictUndefined,
        finalize=wording.clean,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    filters: dict[str, Any] = {
        "count": wording.count,
        "heading": wording.heading,
        "shortened": wording.shortened,
        "without_secrets": wording.without_secrets,
    }
    environment.filters.update(filters)
    return environment
