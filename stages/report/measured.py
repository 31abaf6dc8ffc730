"""What a training wrote down: its log, its held-out losses, its pictures.

One that finished has them in its artifact; one that did not has left them in the store:

    runs/train-<fingerprint>/metrics.jsonl                         every step so far; in a bucket, up to a checkpoint
    runs/train-<fingerprint>/checkpoints/<step>/checkpoint.json    everything up to that step, pictures too
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from stages.core.artifact import Blob, Manifest, NamedFile
from stages.core.store import Store
from stages.pipeline import Node, Pipeline
from stages.report.charts import Point
from stages.report.missing import Gaps

TRAIN = Node("train")
RUN_DIGITS = 16  # of the fingerprint, in the name of a training's folder


@dataclass(frozen=True)
class Evaluation:
    """One round of the held-out loss: its mean, and the mean at each noise level (before the shift)."""

    step: int
    loss: float
    by_sigma: list[Point]


@dataclass(frozen=True)
class Drawn:
    """A validation picture. `blob` says where its bytes are, or raises KeyError."""

    step: int
    index: int
    prompt: str
    name: str
    blob: Callable[[], Blob]


@dataclass(frozen=True)
class End:
    """How far a training got that has not finished: `done` of `total` steps. The next run goes on after that of its
    last checkpoint, where there is one."""

    done: int
    total: int
    checkpoint: int | None

    @property
    def words(self) -> str:
        got = f"It got to step {self.done:,} of {self.total:,}" if self.done else "It was cut off in its first step"
        if self.checkpoint is None:
            return f"{got} and left no checkpoint: run again, it begins anew."
        return f"{got}. Run again, it goes on after step {self.checkpoint:,}, its last checkpoint."


@dataclass(frozen=True)
class Measured:
    """All of it. `log` and `rounds` are by step; `held_out` counts the pictures that are held out, 0 where that is not
    known; `before` is the round of the adapter published before; `end` is None for a finished training."""

    log: list[dict[str, Any]]
    rounds: list[Evaluation]
    held_out: int
    before: Evaluation | None
    pictures: list[Drawn]
    end: End | None = None


# -- a finished training ----------------------------------------------------------------------------------------------


def read_finished(store: Store, manifest: Manifest, gaps: Gaps) -> Measured:
    """Out of the artifact; what cannot be read is noted and left out."""
    log = gaps.attempt("training log", _read_log, store, manifest) or []
    rounds, held_out, before = gaps.attempt("held-out evaluation", _read_evaluation, store, manifest) or ([], 0, None)
    pictures = [
        _drawn(record, partial(manifest.file, str(record["file"]))) for record in manifest.info.get("pictures") or []
    ]
    return Measured(log, rounds, held_out, before, pictures)


def _read_log(store: Store, manifest: Manifest) -> list[dict[str, Any]]:
    lines = store.read_blob(manifest.file("train.jsonl")).splitlines()
    return sorted((json.loads(line) for line in lines if line.strip()), key=lambda record: record["step"])


def _read_evaluation(store: Store, manifest: Manifest) -> tuple[list[Evaluation], int, Evaluation | None]:
    record = json.loads(store.read_blob(manifest.file("evaluation.json")))
    rounds = [_evaluation(entry) for entry in record["rounds"]]
    return sorted(rounds, key=lambda entry: entry.step), len(record.get("held_out", [])), _before(record)


def _evaluation(entry: Mapping[str, Any]) -> Evaluation:
    levels = entry.get("by_sigma", {}).items()
    curve = sorted((float(sigma), float(loss)) for sigma, loss in levels)
    return Evaluation(int(entry.get("step", 0)), float(entry["loss"]), curve)


def _before(record: Mapping[str, Any]) -> Evaluation | None:
    previous = record.get("previous") or {}
    return _evaluation(previous) if previous.get("loss") is not None else None


def _drawn(record: Mapping[str, Any], blob: Callable[[], Blob]) -> Drawn:
    return Drawn(int(record["step"]), int(record["index"]), str(record.get("prompt", "")), str(record["file"]), blob)


# -- an unfinished one ------------------------------------------------------------------------------------------------


def find_unfinished(pipeline: Pipeline, manifests: Mapping[Node, Manifest]) -> Measured | None:
    """What a training with these settings, of these inputs, left in the store; None where it left nothing.

    Raises:
        LoralineError: the base model's identity, which is part of the training's name, cannot be looked up.
    """
    if any(source not in manifests for source in pipeline.upstream(TRAIN)):
        return None
    if not any(name.startswith("train-") for name in pipeline.store.files.names("runs")):
        return None  # looking at the base model, which may be far, would be for nothing
    fingerprint = pipeline.job(TRAIN, manifests).fingerprint
    return read_unfinished(pipeline.store, f"runs/train-{fingerprint[:RUN_DIGITS]}", pipeline.config.train.steps)


def read_unfinished(store: Store, folder: str, total: int) -> Measured | None:
    """What is in a training's folder: its newest checkpoint's record, and what its journal has beyond.

    Args:
        total: the steps that it was to take.
    """
    checkpoint = _newest_checkpoint(store, folder)
    history = checkpoint["history"] if checkpoint else {}
    steps = {int(record["step"]): record for record in history.get("steps", [])}
    rounds = {int(record["step"]): _evaluation(record) for record in history.get("rounds", [])}
    for record in _journal(store, folder):
        step = int(record["step"])
        if "loss" in record:
            steps.setdefault(step, record)
        elif isinstance(held_out := record.get("held_out_loss"), float) and math.isfinite(held_out):
            rounds.setdefault(step, Evaluation(step, held_out, []))
    if not steps and not rounds:
        return None
    pictures = [
        _drawn(record, partial(NamedFile.model_validate, record["stored"])) for record in history.get("pictures", [])
    ]
    return Measured(
        log=[steps[step] for step in sorted(steps)],
        rounds=[rounds[step] for step in sorted(rounds)],
        held_out=0,
        before=_before(history),
        pictures=pictures,
        end=End(max(steps, default=0), total, int(checkpoint["step"]) if checkpoint else None),
    )


def _newest_checkpoint(store: Store, folder: str) -> dict[str, Any] | None:
    names = store.files.names(f"{folder}/checkpoints")
    for name in sorted((name for name in names if name.isdigit()), reverse=True):
        record = store.get_json(f"{folder}/checkpoints/{name}/checkpoint.json")
        if isinstance(record, dict):  # else it was cut off while it was written: it is none
            return record
    return None


def _journal(store: Store, folder: str) -> list[dict[str, Any]]:
    """The lines of the journal; the last one may be cut off."""
    records = []
    for line in (store.files.read(f"{folder}/metrics.jsonl") or b"").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records
