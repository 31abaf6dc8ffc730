"""The quality gate: whether a new adapter may take the place of the one that is published, and why, in words."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stages.core.artifact import Manifest
from stages.core.store import Store

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class Losses:
    """Held-out losses of one evaluation: of the new adapter, and of the one before it, on the same pictures.

    Args:
        new: None where no pictures were held out.
        previous: None where there was no adapter before it, or it could not be measured.
        fingerprint: of the train artifact of the adapter before.
        pictures: how many were held out.
        reason: why the one before was not measured.
    """

    new: float | None = None
    previous: float | None = None
    fingerprint: str | None = None
    pictures: int = 0
    reason: str = ""


@dataclass(frozen=True)
class Decision:
    publish: bool
    words: str


def read_losses(store: Store, train: Manifest) -> Losses:
    """The losses that training noted; without an evaluation, none.

    Raises:
        StoreError, CorruptBlobError: the file cannot be read.
    """
    if not any(file.name == EVALUATION for file in train.files):
        return Losses()
    record = json.loads(store.read_blob(train.file(EVALUATION)))
    if not isinstance(record, Mapping):
        return Losses()
    rounds = sorted(record.get("rounds") or [], key=lambda entry: int(entry["step"]))
    before: Mapping[str, Any] = record.get("previous") or {}
    return Losses(
        new=float(rounds[-1]["loss"]) if rounds else None,
        previous=None if before.get("loss") is None else float(before["loss"]),
        fingerprint=before.get("fingerprint"),
        pictures=len(record.get("held_out") or []),
        reason=str(before.get("reason") or ""),
    )


def decide(maximum_regression: float | None, losses: Losses) -> Decision:
    """Whether to publish.

    Args:
        maximum_regression: the largest allowed share by which the new loss may be above the one before; None always
            publishes.
    """
    compared = _compared(losses)
    if maximum_regression is None:
        return Decision(True, f"Published; no quality gate is set (publish.maximum_regression). {compared}".strip())
    if losses.new is None:
        return Decision(True, "Published without comparison: no pictures were held out to judge the new adapter by.")
    if not math.isfinite(losses.new):
        return Decision(False, f"Not published: the new adapter's held-out loss is no number ({losses.new}).")
    if losses.fingerprint is None:
        return Decision(True, "Published without comparison: no adapter before it was named (train.previous).")
    if losses.previous is None:
        reason = losses.reason or "it was not measured"
        return Decision(True, f"Published without comparison with {losses.fingerprint[:12]}: {reason}.")
    if not math.isfinite(losses.previous):
        return Decision(True, f"Published: the held-out loss of {losses.fingerprint[:12]} is no number.")
    good = losses.new <= losses.previous * (1 + maximum_regression)
    allowed = _allowed(maximum_regression)
    verdict = "Published" if good else "Not published"
    return Decision(good, f"{verdict}: {compared[0].lower()}{compared[1:-1]}; {allowed}.")


def _compared(losses: Losses) -> str:
    """'The held-out loss is 0.2712, 1.5 % worse than the 0.2672 of the adapter before (3f2a...), on 12 pictures.'"""
    if losses.new is None or losses.previous is None:
        return ""
    on = f"on {losses.pictures} picture{'' if losses.pictures == 1 else 's'}"
    before = f"{losses.previous:.5g} of the adapter before ({str(losses.fingerprint)[:12]})"
    if losses.new == losses.previous:
        relation = "just as the"
    else:
        word = "worse" if losses.new > losses.previous else "better"
        share = abs(losses.new / losses.previous - 1) if losses.previous else math.inf
        relation = f"{_percent(share)} {word} than the"
    return f"The held-out loss is {losses.new:.5g}, {relation} {before}, {on}."


def _allowed(margin: float) -> str:
    if margin < 0:
        return f"it has to be at least {_percent(-margin)} better"
    return f"up to {_percent(margin)} worse is allowed" if margin else "no worse is allowed"


def _percent(share: float) -> str:
    """'1.5 %', '0.02 %', '120 %'."""
    return f"{100 * share:.2g} %" if share < 1 else f"{100 * share:.0f} %"
