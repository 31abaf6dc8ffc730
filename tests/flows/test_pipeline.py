"""The pipeline as a real Prefect flow against a real Prefect server, over the real stages."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from prefect import flow
from prefect.client.orchestration import get_client

from flows import pipeline
from flows.pipeline import pipeline_flow, stage_task
from stages.config import Config
from stages.core.errors import LoralineError, TransientError
from stages.core.events import Recorder, StageFinished, StageReused
from stages.pipeline import Pipeline
from tests.pictures import draw_pictures, small_config
from tests.servers.prefect import prefect_in_this_process

pytestmark = pytest.mark.slow
ALL = ["download[blots]", "bucket[blots]", "latents[blots]", "embeds", "train", "publish"]


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_in_this_process():
        yield


@pytest.fixture
def config(tmp_path: Path) -> Config:
    return small_config(tmp_path, draw_pictures(tmp_path / "images"))


def run(config: Config, force: list[str] | None = None) -> tuple[str, Recorder]:
    from flows.reporting import shown_on

    recorder = Recorder()
    with shown_on(recorder):
        place = pipeline_flow(config, force or [])
    return place, recorder


def reused(recorder: Recorder) -> set[str]:
    return {event.stage for event in recorder.events if isinstance(event, StageReused)}


def finished(recorder: Recorder) -> set[str]:
    return {event.stage for event in recorder.events if isinstance(event, StageFinished)}


def to_run(config: Config) -> dict[str, str]:
    """What the plan would run, and why."""
    return {step.node.label: "; ".join(step.reasons) for step in Pipeline.open(config).plan() if step.action == "run"}


def losing_the_first(run_stage: Callable[..., str]) -> Callable[..., str]:
    """The first call of it fails as a stage does that is killed."""
    calls: list[Any] = []

    def run(*arguments: Any, **more: Any) -> str:
        calls.append(arguments)
        if len(calls) == 1:
            raise TransientError("killed")
        return run_stage(*arguments, **more)

    return run


def test_what_is_forced_is_forced_once_in_a_run(config: Config) -> None:
    @flow
    def twice() -> list[str | None]:
        tries = [stage_task("download[blots]", config, [], True, return_state=True) for _ in range(2)]
        return [state.name for state in tries]

    assert twice() == ["Completed", "Reused"]


def test_the_whole_pipeline_then_nothing_then_only_what_is_new(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, recorder = run(config)
    assert finished(recorder) == set(ALL)
    assert "<html" in Path(place).read_text(encoding="utf-8")
    assert (tmp_path / "published" / "pytorch_lora_weights.safetensors").exists()

    _, recorder = run(config)
    assert reused(recorder) == set(ALL)
    assert finished(recorder) == set()
    assert {"Reused", "Completed"} <= _task_states()

    # Forced, and its first try is lost: what is in the store already is not taken for what the second one made.
    once_more = config.model_copy(update={"flow": config.flow.model_copy(update={"retries": 1})})
    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "run_stage", losing_the_first(pipeline.run_stage))
        _, recorder = run(once_more, force=["bucket"])
    assert finished(recorder) == {"bucket[blots]"}, "the same crops: nothing after them is done again"

    changed = config.model_copy(update={"train": config.train.model_copy(update={"learning_rate": 5e-4})})
    planned = to_run(changed)
    assert set(planned) == {"train", "publish"}
    assert "learning_rate 0.0001 -> 0.0005" in planned["train"]
    _, recorder = run(changed)
    assert finished(recorder) == {"train", "publish"}

    (tmp_path / "images" / "picture-001.txt").write_text("a different blot", encoding="utf-8")
    expected = {"download[blots]", "embeds", "train", "publish"}
    assert set(to_run(config)) == expected
    _, recorder = run(config)
    assert finished(recorder) == expected

    draw_pictures(tmp_path / "images", 1, start=50)
    assert set(to_run(config)) == set(ALL)


def _task_states() -> set[str]:
    with get_client(sync_client=True) as client:
        return {task_run.state.name for task_run in client.read_task_runs() if task_run.state}


def test_a_failure_names_its_stage_and_the_report_tells_it(config: Config, tmp_path: Path) -> None:
    broken = config.model_copy(update={"train": config.train.model_copy(update={"train_batch_size": 64})})
    with pytest.raises(LoralineError, match=r"bucket\[blots\]"):
        run(broken)
    html = (tmp_path / "store" / "runs" / "small" / "report.html").read_text(encoding="utf-8")
    assert "not run" in html.lower()
    records = sorted((tmp_path / "store" / "runs" / "small" / "history").glob("*/*.json"))
    actions = {json.loads(path.read_text())["label"]: json.loads(path.read_text())["action"] for path in records}
    assert actions["download[blots]"] == "ran"
    assert "train" not in actions
