"""What became of each node of a run: what the report tells of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from stages.core.artifact import ArtifactRef, Manifest
from stages.core.store import Store
from stages.pipeline import Node, Pipeline

Action = Literal["ran", "reused", "failed", "not run"]


@dataclass(frozen=True)
class RunRecord:
    """A node's fate in a run.

    Args:
        label: the node's label, 'bucket[photos]'.
        action: 'ran', 'reused', 'failed' (it was started and did not finish) or 'not run' (it never started).
        reason: why it ran or was reused; for a failed one, the error.
        seconds: how long it took in this run.
        manifest: what it made or found; None where there is nothing.
        started_at: when it started, in seconds since the epoch; told from the manifest where it is not known.
        outdated: the manifest is not what these settings and the newest inputs would make.
    """

    label: str
    action: Action
    reason: str = ""
    seconds: float = 0.0
    manifest: Manifest | None = None
    started_at: float | None = None
    outdated: bool = False

    def __post_init__(self) -> None:
        if self.action not in get_args(Action):
            raise ValueError(f"{self.label}: action {self.action!r}; there are {', '.join(get_args(Action))}")

    @property
    def stage(self) -> str:
        return self.label.partition("[")[0]

    @property
    def dataset(self) -> str | None:
        return self.label.partition("[")[2].removesuffix("]") or None

    def to_json(self) -> dict[str, Any]:
        """A small record that may cross process borders: the manifest becomes a reference."""
        return {
            "label": self.label,
            "action": self.action,
            "reason": self.reason,
            "seconds": self.seconds,
            "started_at": self.started_at,
            "reference": self.manifest.reference().model_dump(mode="json") if self.manifest else None,
        }

    @classmethod
    def from_json(cls, record: Mapping[str, Any], store: Store) -> RunRecord:
        """The inverse of `to_json`; keys that are absent have their defaults, `reference` may be an `ArtifactRef`.

        Raises:
            StoreError: the store does not have the artifact that is referred to.
        """
        reference = record.get("reference")
        manifest = store.resolve(ArtifactRef.model_validate(reference)) if reference is not None else None
        return cls(
            label=record["label"],
            action=record["action"],
            reason=record.get("reason") or "",
            seconds=float(record.get("seconds") or 0.0),
            manifest=manifest,
            started_at=record.get("started_at"),
        )


def records_in_store(pipeline: Pipeline) -> list[RunRecord]:
    """What this configuration's name made last at every node: for a report without a run."""
    records: list[RunRecord] = []
    for node in pipeline.order:
        manifest = pipeline.last(node)
        if manifest is None:
            records.append(RunRecord(node.label, "not run", "never finished under this name"))
            continue
        older = _older(pipeline, node, manifest, {record.label: record for record in records})
        reason = f"found in the store, {older}" if older else "found in the store"
        records.append(RunRecord(node.label, "reused", reason, manifest=manifest, outdated=bool(older)))
    return records


def _older(pipeline: Pipeline, node: Node, manifest: Manifest, before: Mapping[str, RunRecord]) -> str:
    """Why an artifact is not up to date, as far as it can be seen without looking at sources and models."""
    settings = pipeline.stage(node.stage).settings(pipeline.setting(node))
    if any(manifest.spec.get(name) != value for name, value in settings.items()):
        return "made with other settings"
    for name, digest in manifest.inputs.items():
        label, _, facet = name.rpartition(".")
        newest = before.get(label)
        if newest is None or newest.manifest is None:
            continue
        if newest.outdated or newest.manifest.digest(facet) != digest:
            return f"made from an older {label}"
    return ""


def manifests_of(pipeline: Pipeline, records: list[RunRecord]) -> dict[Node, Manifest]:
    """The manifests that there are, by node, in the pipeline's order."""
    by_label = {record.label: record.manifest for record in records if record.manifest is not None}
    return {node: by_label[node.label] for node in pipeline.order if node.label in by_label}
