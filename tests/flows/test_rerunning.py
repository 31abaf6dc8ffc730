"""Only what failed is done again: a real Prefect server, real workers, a real S3 server, a process for every stage.

Nothing is shared between the stages but the bucket: each run gets its configuration as parameters.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

import pytest

from stages.pipeline import Node, Pipeline
from tests.flows.site import Site, evict, kill_stage, until
from tests.servers.prefect import prefect_server

pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.deployments]
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
        run = site.begin(config)
        kill_stage(workers, "train")
        state = site.wait(run)
        assert state["type"] == "FAILED"
        assert "train" in state["message"], state
        assert "SIGKILL" in state["message"], state
        assert new() == [
            "bucket[blots]",
            "check publish",
            "check train",
            "download[blots]",
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

        # Nothing is left to do, in however many slices it was done.
        assert site.wait(site.begin(config))["type"] == "COMPLETED"
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


def test_a_machine_that_dies_in_the_middle_of_latents(site: Site) -> None:
    config = site.config(pictures=40)
    with site.workers() as workers:
        site.begin(config)
        until("two shards of latents", lambda: len(site.memos()) >= 2, every_s=0.2)
        for worker in workers:
            os.killpg(worker.pid, signal.SIGKILL)
            worker.wait()
    kept = site.memos()
    assert Pipeline.open(config).last(Node("latents", "blots")) is None
    # Other workers, and the same parameters again: the server still believes that the first runs are alive.
    with site.workers():
        state = site.wait(site.begin(config))
        assert state["type"] == "COMPLETED", state
    times = site.memos()
    assert {name: times[name] for name in kept} == kept, "a finished shard was encoded again"
    assert set(site.made(config)) == set(ALL)
    names = [name for name in site.stage_runs(config).values() if name in ("download[blots]", "bucket[blots]")]
    assert sorted(names) == ["bucket[blots]", "download[blots]"]


def test_two_pipelines_at_once_share_their_stage_runs_and_the_one_in_place_of_an_evicted_one(site: Site) -> None:
    config = site.config(pictures=40, flow={"executor": "deployment", "retries": 1})
    with site.workers() as workers:
        first, second = site.begin(config), site.begin(config)
        until("a shard of latents", site.memos, every_s=0.2)
        (latents,) = [run for run, name in site.stage_runs(config).items() if name == "latents[blots]"]
        evict(workers, latents)
        assert site.wait(latents)["type"] == "CRASHED"
        kept = site.memos()
        assert [site.wait(run)["type"] for run in (first, second)] == ["COMPLETED", "COMPLETED"]
    names = [name for name in site.stage_runs(config).values() if not name.startswith("check")]
    assert sorted(names) == sorted([*ALL, "latents[blots]"]), "a stage ran twice at once"
    times = site.memos()
    assert {name: times[name] for name in kept} == kept, "a finished shard was encoded again"


def test_what_later_stages_would_refuse_is_found_before_a_gpu_works_for_them(site: Site, tmp_path: Path) -> None:
    (tmp_path / "published").write_text("a file where publish wants a folder")
    config = site.config(train={"lora": {"targets": ["to_nowhere"]}})
    with site.workers():
        state = site.wait(site.begin(config))
    assert state["type"] == "FAILED"
    assert f"publish.path: {tmp_path / 'published'} is a file" in state["message"], state
    assert "to_nowhere" in state["message"], state
    expected = ["bucket[blots]", "check publish", "check train", "download[blots]"]
    assert sorted(site.stage_runs(config).values()) == expected
