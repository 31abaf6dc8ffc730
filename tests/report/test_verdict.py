"""What the page tells of the quality gate: the decision at the top, the numbers of both adapters."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest

from stages.core.artifact import NamedFile
from stages.report.build import RunRecord, build_report
from tests.report.conftest import Run
from tests.report.test_report import Page, check_is_safe

BEFORE = "ab" * 32
WORDS = "Not published: the held-out loss is 0.2685, 3.3 % worse than the 0.26 of the adapter before (abababababab)."


def compared(run: Run, loss: float | None, info: dict[str, Any]) -> list[RunRecord]:
    """The run's records with an evaluation that measured an adapter before, and a publish stage that says this."""
    train, publish = run.record("train"), run.record("publish")
    assert train.manifest
    assert publish.manifest
    store = run.pipeline.store
    record = json.loads(store.read_blob(train.manifest.file("evaluation.json")))
    levels = {sigma: value + 0.01 for sigma, value in record["rounds"][-1]["by_sigma"].items()}
    record["previous"] = {"fingerprint": BEFORE, "loss": loss, "by_sigma": levels}
    blob = store.put_bytes(json.dumps(record).encode(), ".json")
    other = [file for file in train.manifest.files if file.name != "evaluation.json"]
    files = [*other, NamedFile(**blob.model_dump(), name="evaluation.json")]
    return run.replaced(
        replace(train, manifest=train.manifest.model_copy(update={"files": files})),
        replace(publish, manifest=publish.manifest.model_copy(update={"info": info})),
    )


def test_a_refusal_is_told_at_the_top_with_both_numbers(finished: Run) -> None:
    info = {"target": "hub", "published": False, "decision": WORDS, "current": {"train": BEFORE}}
    page = Page(build_report(finished.pipeline, compared(finished, 0.26, info)))
    check_is_safe(page)
    top = page.text[: page.text.index("Timeline")]
    assert f"not published {WORDS}" in top
    assert "Published to" not in page.text
    assert "against published +3 % 0.2685, before 0.26" in page.text
    assert "the adapter published before, 0.26" in page.text
    assert page.html.count("the adapter published before") == 2, "on both held-out charts"
    pills = [span["class"] for span in page.all("span") if span.get("class", "").startswith("pill")]
    assert pills[:2] == ["pill done", "pill partial"]


def test_a_publication_that_was_compared_is_told_as_well(finished: Run) -> None:
    publish = finished.record("publish").manifest
    assert publish
    words = "Published: the held-out loss is 0.2685, 4.1 % better than the 0.28 of the adapter before (abababababab)."
    info = {**publish.info, "published": True, "decision": words}
    page = Page(build_report(finished.pipeline, compared(finished, 0.28, info)))
    check_is_safe(page)
    assert f"published {words}" in page.text
    assert "Published to" in page.text
    assert "−4 %" in page.text


@pytest.mark.parametrize(
    ("decision", "told"),
    [
        ("Published; no quality gate is set (publish.maximum_regression).", False),
        ("<script>alert('held-out loss')</script>\u202e", True),
    ],
)
def test_only_what_says_something_is_told_and_it_is_escaped(finished: Run, decision: str, told: bool) -> None:
    page = Page(build_report(finished.pipeline, compared(finished, None, {"published": True, "decision": decision})))
    check_is_safe(page)
    assert ('class="verdict"' in page.html) == told
    assert "against published" not in page.text
    assert "the adapter published before" not in page.text
