"""Where everything came from: settings, inputs, digests, versions, code; how the base was held; where it went."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from stages.core.artifact import Manifest
from stages.pipeline import Node
from stages.report import wording
from stages.report.record import RunRecord

if TYPE_CHECKING:  # only the types are named
    from stages.publish.config import PublishSection
    from stages.train.config import TrainSection

MOST_JSON = 8_000  # characters of one stage's settings
MOST_NODES = 60  # stages that are spelled out one by one
MOST_LAYERS = 40


@dataclass(frozen=True)
class Origin:
    """What made one artifact."""

    label: str
    fingerprint: str
    digest: str
    stage_version: int
    created_at: str
    took: str
    code_revision: str
    size: str
    settings: str
    inputs: list[tuple[str, str]]
    files: list[tuple[str, str, str]]
    info: str


@dataclass(frozen=True)
class Published:
    """Where the adapter went. `url` is only set for an http(s) address, so that it is safe to link to."""

    place: str
    url: str | None
    commit: str | None


@dataclass(frozen=True)
class Verdict:
    """What the quality gate decided, and why, in the publish stage's own words."""

    published: bool
    words: str


@dataclass(frozen=True)
class Layers:
    """How one kind of layer of the frozen base is held; `bits` a parameter, with scales and biases."""

    name: str
    count: str
    level: str
    parameters: str
    size: str
    bits: str


@dataclass(frozen=True)
class Version:
    """A library's version; where stages were made with several, each with the stages that were."""

    name: str
    version: str
    stages: str


def origins(manifests: Mapping[Node, Manifest]) -> tuple[list[Origin], int]:
    """One entry for each artifact, and how many were left out."""
    made = [_origin(node, manifest) for node, manifest in list(manifests.items())[:MOST_NODES]]
    return made, len(manifests) - len(made)


def _origin(node: Node, manifest: Manifest) -> Origin:
    members = [*manifest.shards, *manifest.files]
    info = {key: value for key, value in manifest.info.items() if key != "pictures"}
    return Origin(
        label=node.label,
        fingerprint=manifest.fingerprint,
        digest=manifest.digest(),
        stage_version=manifest.stage_version,
        created_at=manifest.created_at or "unknown",
        took=wording.duration(manifest.duration_s),
        code_revision=manifest.code_revision or "unknown",
        size=f"{wording.plural(len(members), 'blob')}, {wording.size(sum(blob.bytes for blob in members))}",
        settings=as_json(manifest.spec),
        inputs=sorted(manifest.inputs.items()),
        files=[(file.name, wording.size(file.bytes), file.sha256) for file in manifest.files[:40]],
        info=as_json(info) if info else "",
    )


def as_json(value: Any) -> str:
    """Settings as indented JSON, cut where one is huge."""
    text = json.dumps(value, indent=2, ensure_ascii=False, sort_keys=True, default=str)
    if len(text) <= MOST_JSON:
        return text
    return f"{text[:MOST_JSON]}\n... cut here; {len(text):,} characters in all are in the artifact's manifest.json"


def versions(manifests: Mapping[Node, Manifest]) -> list[Version]:
    """Library versions; one line each unless stages differ."""
    found: dict[str, dict[str, list[str]]] = {}
    for node, manifest in manifests.items():
        for name, version in manifest.versions.items():
            found.setdefault(name, {}).setdefault(version, []).append(node.label)
    return [
        Version(name, version, "" if len(by_version) == 1 else ", ".join(labels))
        for name, by_version in found.items()
        for version, labels in by_version.items()
    ]


def published(section: PublishSection, manifest: Manifest | None) -> Published | None:
    """Where the adapter went, as the publish stage tells it; a folder is known from the configuration alone. None where
    it went nowhere."""
    if manifest is None or manifest.info.get("published") is False:
        return None
    info = manifest.info
    place = next((str(info[key]) for key in ("repo", "path") if info.get(key)), section.repo or section.path or "?")
    url = str(info.get("url") or "")
    commit = info.get("commit")
    return Published(place, url if url.startswith(("https://", "http://")) else None, str(commit) if commit else None)


def verdict(section: PublishSection, manifest: Manifest | None) -> Verdict | None:
    """The decision about publishing; None where the publish stage is not done, or no gate is set and nothing was
    compared, so that there is nothing to tell."""
    if manifest is None or not manifest.info.get("decision"):
        return None
    words = str(manifest.info["decision"])
    told = section.maximum_regression is not None or "held-out loss" in words
    return Verdict(bool(manifest.info.get("published")), words) if told else None


def training_facts(section: TrainSection, manifest: Manifest | None) -> list[tuple[str, str]]:
    """How the frozen base and the adapter are held and were trained, in words."""
    rank, alpha = section.lora.rank, section.lora.alpha if section.lora.alpha is not None else section.lora.rank
    batch = section.train_batch_size * section.gradient_accumulation_steps
    rows = [
        ("base precision", section.base_model_precision),
        ("computed in", {"no": "fp32", "bf16": "bf16"}[section.mixed_precision]),
        ("adapter", f"rank {rank}, alpha {alpha:g}"),
        ("batch", f"{wording.plural(batch, 'picture')} a step"),
    ]
    if section.previous is not None:
        start = f"the adapter of {section.previous[:12]}" if section.warm_start else "a fresh adapter"
        rows.append(("started from", start))
    info = manifest.info if manifest is not None else {}
    known = (
        ("adapter_parameters", "adapter parameters", wording.count),
        ("samples", "pictures shown", wording.count),
        ("epochs", "epochs", wording.number),
        ("device", "device", str),
        ("peak_rss_mb", "peak memory", lambda value: wording.size(int(value * 1e6))),
    )
    rows += [(label, said(info[key])) for key, label, said in known if info.get(key) is not None]
    return [*rows, ("adapted layers", ", ".join(section.lora.targets))]


def base_layers(manifest: Manifest | None) -> list[Layers]:
    """The frozen base by kind of layer, as the train stage noted it; empty where it did not."""
    if manifest is None:
        return []
    records = manifest.info.get("base_layers") or []
    made = [
        Layers(
            name=str(record["layers"]),
            count=wording.count(record["count"]),
            level=str(record["level"]),
            parameters=wording.count(record["parameters"]),
            size=wording.size(record["bytes"]),
            # Buffers (a table of positions) have bytes but are no parameters: there is no such number for them.
            bits=f"{bits:.1f}" if (bits := 8 * record["bytes"] / max(record["parameters"], 1)) <= 64 else "–",
        )
        for record in records[:MOST_LAYERS]
    ]
    parameters, held = (sum(record[key] for record in records) for key in ("parameters", "bytes"))
    count, bits = sum(record["count"] for record in records), 8 * held / max(parameters, 1)
    whole = Layers("all", wording.count(count), "", wording.count(parameters), wording.size(held), f"{bits:.1f}")
    return [*made, whole] if records else []


def outcome(records: Sequence[RunRecord], error: str | None) -> tuple[str, str]:
    """The run in a word (for its colour) and in a sentence."""
    failed = [record for record in records if record.action == "failed"]
    ran = [record for record in records if record.action == "ran"]
    reused = [record for record in records if record.action == "reused"]
    if failed or error:
        where = ", ".join(record.label for record in failed) or "the run"
        kept = len(ran) + len(reused)
        whole = wording.plural(len(records), "stage")
        return "failed", f"It failed at {where}. {kept} of {whole} finished and will not be done again."
    waiting = [record for record in records if record.action == "not run"]
    if waiting:
        return "partial", f"{wording.plural(len(waiting), 'stage')} of {len(records)} did not run yet."
    outdated = [record.label for record in reused if record.outdated]
    if outdated:
        return (
            "partial",
            f"Older than its settings or inputs: {', '.join(outdated)}. The next run brings it up to date.",
        )
    if not ran:
        return "reused", "Nothing had to be done: every stage was found in the store."
    if reused:
        rest = f"{len(reused)} {'was' if len(reused) == 1 else 'were'} found in the store and reused"
        return "done", f"{wording.plural(len(ran), 'stage')} ran, {rest}."
    return "done", f"All {wording.plural(len(ran), 'stage')} ran."
