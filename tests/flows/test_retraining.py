"""The sensor's choice of what a retraining is measured against; Prefect itself is not asked here."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from flows import watch
from stages.core.events import Recorder
from stages.pipeline import Pipeline, Published
from tests.pictures import draw_pictures, small_config

TRAINED = "b" * 64


@pytest.mark.parametrize(
    ("asked", "published", "previous"), [(True, True, TRAINED), (True, False, None), (False, True, None)]
)
def test_a_retraining_follows_what_was_published_last(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: bool, published: bool, previous: str | None
) -> None:
    started: list[dict[str, Any]] = []

    def start(name: str, parameters: dict[str, Any], **_: Any) -> SimpleNamespace:
        started.append(parameters["config"])
        return SimpleNamespace(name="a run", id="1")

    monkeypatch.setattr(watch, "run_deployment", start)
    monkeypatch.setattr(watch, "runs_with", lambda keys: [])
    monkeypatch.setattr(watch, "_alive", lambda name: [])
    monkeypatch.setattr(watch, "emit_event", lambda *args, **more: None)
    monkeypatch.setattr(watch, "get_run_logger", lambda: SimpleNamespace(info=lambda *args: None))
    config = small_config(tmp_path, draw_pictures(tmp_path / "images", 4), train={"warm_start": True})
    pipeline = Pipeline.open(config)
    pipeline.run_node(pipeline.order[0], {}, Recorder())
    if published:
        pointer = Published(publish="a" * 64, train=TRAINED)
        pipeline.store.put_json("runs/small/published.json", pointer.model_dump())
    draw_pictures(tmp_path / "images", 2, start=4)
    watch.watch_flow.fn(config, retrain_from_published=asked)
    assert [values["train"]["previous"] for values in started] == [previous]
    assert started[0]["train"]["warm_start"] is True, "it stays as it was configured"
