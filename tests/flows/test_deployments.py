"""Every stage in its own process through its own deployment: a real Prefect server, a real worker, a real S3 server.

Nothing is shared between the stages but the bucket: each run gets its own configuration as parameters.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from stages.config import Config
from stages.pipeline import Node, Pipeline
from tests.pictures import draw_pictures, small_config
from tests.servers.prefect import ROOT, PrefectServer, prefect_server
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.slow, pytest.mark.kill, pytest.mark.deployments]
POOL = "stages"
ALL = ["download[blots]", "bucket[blots]", "latents[blots]", "embeds", "train", "publish"]


class Site:
    """A server with deployments, a bucket, and the driver that talks to them in a process of its own."""

    def __init__(self, server: PrefectServer, s3: S3Server, folder: Path) -> None:
        self.server, self.s3, self.folder = server, s3, folder
        self.environment = {**server.environment(), **s3.environment(), "OMP_NUM_THREADS": "1"}

    def config(self, **changes: Any) -> Config:
        images = self.folder / "images"
        if not images.exists():
            draw_pictures(images, 12)
        fields = {
            "store": {"url": f"s3://{self.s3.bucket}/store"},
            "flow": {"executor": "deployment", "retries": 0},
            "latents": {"batch_size": 1},
            **changes,
        }
        return small_config(self.folder, images, **fields)

    def call(self, command: str, config: Config, *rest: str) -> dict[str, Any]:
        answer = subprocess.run(
            [sys.executable, "-m", "tests.flows.deployed", command, self._file(config), *rest],
            env={**os.environ, **self.environment},
            cwd=ROOT,
            capture_output=True,
            text=True,
            timeout=500,
            check=False,
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        result: dict[str, Any] = json.loads(answer.stdout.splitlines()[-1])
        return result

    def _file(self, config: Config) -> str:
        path = self.folder / f"config-{time.time_ns()}.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        return str(path)

    def made(self, config: Config) -> dict[str, str]:
        pipeline = Pipeline.open(config)
        return {node.label: made.fingerprint for node in pipeline.order if (made := pipeline.last(node)) is not None}


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[PrefectServer]:
    with prefect_server(tmp_path_factory.mktemp("prefect")) as running:
        yield running


@pytest.fixture
def site(server: PrefectServer, moto: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Site:
    made = Site(server, moto.with_new_bucket(), tmp_path)
    for key, value in moto.environment().items():
        monkeypatch.setenv(key, value)
    return made


@pytest.fixture(scope="module")
def _deployed(server: PrefectServer) -> None:
    env = {**os.environ, **server.environment()}
    prefect = [sys.executable, "-m", "prefect"]
    pool = [*prefect, "work-pool", "create", POOL, "--type", "process", "--overwrite"]
    subprocess.run(pool, env=env, cwd=ROOT, check=True, capture_output=True)
    subprocess.run([sys.executable, "-m", "tests.flows.deployed", "deploy", POOL], env=env, cwd=ROOT, check=True)


def names(runs: list[dict[str, Any]]) -> list[str]:
    return sorted(run["name"] for run in runs)


@pytest.mark.usefixtures("_deployed")
def test_each_stage_in_its_own_process_then_only_what_failed(site: Site, tmp_path: Path) -> None:
    config = site.config(latents={"batch_size": 1, "workers": 2})
    blocked = tmp_path / "published"
    blocked.write_text("a file where publish wants a folder")
    with site.server.worker(POOL, site.environment):
        first = site.call("run", config)
        assert first["type"] == "FAILED"
        assert "publish" in first["message"]
        assert "published" in first["message"]
        expected = ["bucket[blots]", "download[blots]", "embeds", "latents[blots] 0/2", "latents[blots] 1/2"]
        before = [run for run in first["stages"] if run["state"] == "Completed"]
        assert [name for name in names(before) if name in expected] == expected

        blocked.unlink()
        second = site.call("run", config)
        assert second["type"] == "COMPLETED", second
        new = [run["name"] for run in second["stages"] if run not in first["stages"]]
        assert new == ["publish"]
        assert set(site.made(config)) == set(ALL)

        third = site.call("run", config)
        assert third["type"] == "COMPLETED"
        assert third["stages"] == second["stages"], "a stage was started although everything was there"


@pytest.mark.usefixtures("_deployed")
def test_a_machine_that_dies_in_the_middle_of_latents(site: Site) -> None:
    draw_pictures(site.folder / "images", 60)
    config = site.config()
    with site.server.worker(POOL, site.environment) as worker:
        started = site.call("start", config)
        assert started["type"] in ("SCHEDULED", "PENDING", "RUNNING")
        _wait_for_memos(site, 2)
        os.killpg(worker.pid, signal.SIGKILL)
        worker.wait()
    kept = _memos(site)
    assert Pipeline.open(config).last(Node("latents", "blots")) is None
    # Another worker, and the same parameters again: the server still believes that the first runs are alive.
    with site.server.worker(POOL, site.environment):
        fresh = config.model_copy(update={"flow": config.flow.model_copy(update={"executor": "inline"})})
        again = site.call("run", fresh)
        assert again["type"] == "COMPLETED", again
    times = _memos(site)
    assert {name: times[name] for name in kept} == kept, "a finished shard was encoded again"
    assert set(site.made(config)) == set(ALL)


def _memos(site: Site) -> dict[str, Any]:
    listing = site.s3.client().list_objects_v2(Bucket=site.s3.bucket, Prefix="store/memo/latents/")
    return {entry["Key"]: entry["LastModified"] for entry in listing.get("Contents", [])}


def _wait_for_memos(site: Site, count: int) -> None:
    deadline = time.monotonic() + 300
    while len(_memos(site)) < count:
        assert time.monotonic() < deadline, "latents never began"
        time.sleep(0.05)


@pytest.mark.usefixtures("_deployed")
def test_two_pipelines_at_once_share_their_stage_runs(site: Site) -> None:
    config = site.config()
    with site.server.worker(POOL, site.environment, limit=6):
        first, second = site.call("start", config), site.call("start", config)
        ended = [_wait_until_ended(site, run["id"]) for run in (first, second)]
        assert ended == ["COMPLETED", "COMPLETED"]
        result = site.call("run", config)
    own = [run["name"] for run in result["stages"] if _is_of(site, run, config)]
    assert sorted(own) == sorted(set(own)), "a stage ran twice"
    assert set(own) == set(ALL)


def _is_of(site: Site, run: dict[str, Any], config: Config) -> bool:
    fingerprints = set(site.made(config).values())
    return str(run["key"]).split(":")[0] in fingerprints


def _wait_until_ended(site: Site, run_id: str) -> str:
    code = (
        "import sys; from uuid import UUID; from tests.flows.deployed import wait;"
        "print(wait(UUID(sys.argv[1])).state.type.value)"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code, run_id],
        env={**os.environ, **site.environment},
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=500,
        check=True,
    )
    return answer.stdout.strip()


@pytest.mark.usefixtures("_deployed")
def test_the_sensor_starts_a_run_only_when_something_is_new(site: Site) -> None:
    config = site.config(flow={"executor": "inline", "retries": 0})
    with site.server.worker(POOL, site.environment):
        assert site.call("watch", config)["state"] == "Started"
        busy = site.call("watch", config)
        assert (busy["state"], "is under way" in busy["message"]) == ("Skipped", True), busy
        _wait_until_published(site, config, 1)
        unchanged = site.call("watch", config)
        assert (unchanged["state"], "nothing has changed" in unchanged["message"]) == ("Skipped", True)
        draw_pictures(site.folder / "images", 2, start=100)
        few = site.call("watch", config, "5")
        assert (few["state"], "fewer than 5" in few["message"]) == ("Skipped", True)
        assert site.call("watch", config, "2")["state"] == "Started"
        _wait_until_published(site, config, 2)


def _wait_until_published(site: Site, config: Config, count: int) -> None:
    deadline = time.monotonic() + 400
    while True:
        listing = site.s3.client().list_objects_v2(Bucket=site.s3.bucket, Prefix="store/artifacts/publish/")
        if len(listing.get("Contents", [])) >= count:
            break
        assert time.monotonic() < deadline, "never published"
        time.sleep(1)
    time.sleep(3)


@pytest.mark.usefixtures("_deployed")
def test_cancelling_the_pipeline_cancels_its_stage_runs(site: Site) -> None:
    draw_pictures(site.folder / "images", 60)
    config = site.config()
    with site.server.worker(POOL, site.environment):
        started = site.call("start", config)
        _wait_for_memos(site, 1)
        cancel = [sys.executable, "-m", "prefect", "flow-run", "cancel", started["id"]]
        subprocess.run(cancel, env={**os.environ, **site.environment}, cwd=ROOT, check=True, capture_output=True)
        assert _wait_until_ended(site, started["id"]) == "CANCELLED"
        deadline = time.monotonic() + 90
        while True:
            own = [run for run in site.call("watch", config, "1000000")["stages"] if run["name"] == "latents[blots]"]
            assert own, "latents never had a run of its own"
            if all(run["state"] in ("Cancelled", "Crashed") for run in own):
                break
            assert time.monotonic() < deadline, own
            time.sleep(2)
        assert Pipeline.open(config).last(Node("train")) is None
