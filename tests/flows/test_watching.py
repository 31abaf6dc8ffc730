"""The sensor and cancellation: a real Prefect server, real workers, a real S3 server."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from stages.config import Config
from stages.pipeline import Node, Pipeline
from tests.flows.site import FINAL, Site, until
from tests.pictures import draw_pictures

pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.deployments, pytest.mark.timeout(1500)]


def test_the_sensor_starts_a_run_only_when_something_is_new(site: Site) -> None:
    config = site.config(flow={"executor": "inline", "retries": 0})

    def check(**parameters: Any) -> tuple[str, str]:
        state = site.wait(site.begin(config, "watch/watch", **parameters))
        return state["name"], state["message"]

    with site.workers():
        assert check()[0] == "Started"
        busy, why = check()
        assert (busy, "is under way" in why) == ("Skipped", True), why
        first = _pipelines(site, config)
        assert [site.wait(run)["type"] for run in first] == ["COMPLETED"]

        unchanged, why = check()
        assert (unchanged, "nothing has changed" in why) == ("Skipped", True), why

        draw_pictures(site.folder / "images", 2, start=100)
        few, why = check(minimum_new_images=5)
        assert (few, "fewer than 5" in why) == ("Skipped", True), why
        assert check(minimum_new_images=2, retrain_from_published=True)[0] == "Started"
    (second,) = [run for run in _pipelines(site, config) if run not in first]
    published = Pipeline.open(config).store.get_json(f"runs/{config.name}/published.json")
    asked = site.run(second)["parameters"]["config"]
    assert asked["train"]["previous"] == published["train"], "measured against the one before"


def _pipelines(site: Site, config: Config) -> list[str]:
    deployment = site.get("deployments/name/loraline/pipeline")["id"]
    return [run["id"] for run in site.runs(config) if run["deployment_id"] == deployment]


def test_however_a_pipeline_is_stopped_its_stage_runs_end_with_it(site: Site, tmp_path: Path) -> None:
    # One of them elsewhere, and one that runs beside it in the pipeline's own machine.
    flow = {"executor": "inline", "executors": {"latents": "deployment"}, "retries": 0}
    config = site.config(pictures=120, flow=flow)
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    with site.workers():
        # On the server, as the page's button does.
        run = site.begin(config)
        until("a shard of latents", site.memos, every_s=0.2)
        site.prefect("flow-run", "cancel", run)
        assert site.wait(run)["type"] == "CANCELLED"
        first = until("the end of every stage's run", lambda: _ends(site, config), deadline_s=90)
        assert first == [("latents[blots]", "CANCELLED")]

        # At the terminal, by Ctrl-C. What the first one did is not done again.
        done = len(site.memos())
        with subprocess.Popen(
            [sys.executable, "-m", "stages.cli", "run", "--config", str(path)],
            env=site.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            # A shell has what it starts in the background ignore Ctrl-C, these tests perhaps too.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        ) as own:
            try:
                until("another shard of latents", lambda: len(site.memos()) > done, every_s=0.2)
                own.send_signal(signal.SIGINT)
                assert own.wait(90) != 0
            finally:
                own.kill()
        second = until("the end of every stage's run", lambda: _ends(site, config), deadline_s=90)
    assert second == first * 2
    assert Pipeline.open(config).last(Node("latents", "blots")) is None


def _ends(site: Site, config: Config) -> list[tuple[str, str]] | None:
    """Names of the stages' runs and the states in which they ended, once all have."""
    states = [(run["name"], run["state_type"]) for run in site.runs(config) if "label" in run["parameters"]]
    return states if all(state in FINAL for _, state in states) else None
