"""Only what failed is done again: a real Prefect server, real workers, a real S3 server, a process for every stage.

Nothing is shared between the stages but the bucket: each run gets its configuration as parameters.
"""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from stages.pipeline import Node, Pipeline
from tests.flows.site import Site, evict, kill_stage, until
from tests.servers.prefect import kill_trees, prefect_server

pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.deployments, pytest.mark.timeout(1500)]
ALL = ["download[blots]", "bucket[blots]", "latents[blots]", "embeds", "train", "publish"]


def test_however_a_run_is_started_again_it_does_only_what_is_not_in_the_store(site: Site, tmp_path: Path) -> None:
    config = site.config(latents={"batch_size": 1, "workers": 2})
    seen: set[str] = set()

    def new() -> list[str]:
        runs = site.stage_runs(config)
        fresh = sorted(name for run_id, name in runs.items() if run_id not in seen)
        seen.update(runs)
        return fresh

    with site.workers() as workers:
        # What later stages would refuse is found before a GPU works for them.
        published = tmp_path / "published"
        published.write_text("a file where publish wants a folder")
        state = site.wait(site.begin(site.config(train={"lora": {"targets": ["to_nowhere"]}})))
        assert state["type"] == "FAILED"
        assert f"publish.path: {published} is a file" in state["message"], state
        assert "to_nowhere" in state["message"], state
        assert new() == ["bucket[blots]", "check publish", "check train", "download[blots]"]
        published.unlink()

        run = site.begin(config)
        kill_stage(workers, "train")
        state = site.wait(run)
        assert state["type"] == "FAILED"
        assert "train" in state["message"], state
        assert "SIGKILL" in state["message"], state
        assert new() == [
            "check publish",
            "check train",
            "embeds",
            "latents[blots] 0/2",
            "latents[blots] 1/2",
            "train",
        ]

        site.prefect("flow-run", "retry", run)
        kill_stage(workers, "publish")
        state = site.wait(run)
        assert state["type"] == "FAILED"
        assert "publish" in state["message"], state
        assert new() == ["check publish", "publish", "train"]

        site.retry_as_the_page_does(run)
        assert site.wait(run)["type"] == "COMPLETED"
        assert new() == ["publish"]
        assert set(site.made(config)) == set(ALL)

        # Begun anew there is nothing left to do, in however many slices it was done.
        assert site.wait(site.begin(site.config(latents={"batch_size": 1, "workers": 3})))["type"] == "COMPLETED"
        assert new() == []
    # Both slices and the captions were ready at the same time, and there are two places.
    assert site.most_at_once(config, "gpu") == 2

    # Prefect's own database is lost, and the machine is another one: the store is the truth.
    path = tmp_path / "run.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    with prefect_server(tmp_path / "another") as server:
        elsewhere = Site(server, site.s3, tmp_path)
        elsewhere.command([sys.executable, "-m", "stages.cli", "run", "--config", str(path)])
        (only,) = elsewhere.runs(config)
        assert (only["state_type"], only["name"]) == ("COMPLETED", f"{config.name}: nothing to do")


def test_a_machine_dies_then_two_pipelines_at_once_share_all_runs_though_one_is_evicted(site: Site) -> None:
    config = site.config(pictures=40, flow={"executor": "deployment", "retries": 1})

    def runs_of_latents() -> list[str]:
        return [run for run, name in site.stage_runs(config).items() if name == "latents[blots]"]

    with site.workers() as workers:
        site.begin(config)
        until("two shards of latents", lambda: len(site.memos()) >= 2, every_s=0.2)
        kill_trees(*workers)
    kept = site.memos()
    assert Pipeline.open(config).last(Node("latents", "blots")) is None
    (lost,) = runs_of_latents()

    # Other workers, and the same parameters again, twice: the server still believes that the first runs are alive.
    with site.workers() as workers:
        assert site.state(lost)["type"] == "RUNNING"
        first, second = site.begin(config), site.begin(config)
        until("another shard of latents", lambda: len(site.memos()) > len(kept))
        assert site.state(lost)["type"] == "CRASHED"
        (latents,) = [run for run in runs_of_latents() if run != lost]
        evict(workers, latents)
        assert site.wait(latents)["type"] == "CRASHED"
        kept |= site.memos()
        assert [site.wait(run)["type"] for run in (first, second)] == ["COMPLETED", "COMPLETED"]
    times = site.memos()
    assert {name: times[name] for name in kept} == kept, "a finished shard was encoded again"
    assert set(site.made(config)) == set(ALL)
    names = [name for name in site.stage_runs(config).values() if not name.startswith("check")]
    times_run = {name: names.count(name) for name in ALL}
    # The machine may have died with embeds on it too.
    assert times_run.pop("embeds") <= 2
    assert times_run.pop("latents[blots]") == 3
    assert set(times_run.values()) == {1}, "a stage ran twice at once"
