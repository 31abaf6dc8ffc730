"""One place for a whole deployment: a real Prefect server with `deploy/` applied to it, workers, and a bucket.

The tests talk to the server as its pages do, over HTTP: Prefect's own client reads its settings at import.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import psutil

from stages.config import Config
from stages.pipeline import Pipeline
from tests.pictures import draw_pictures, small_config
from tests.servers.prefect import ROOT, PrefectServer
from tests.servers.s3 import S3Server

DEADLINE_S = 420
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")
GPUS = "2"


def apply(server: PrefectServer) -> None:
    """What deploy/README.md says: pools, deployments and automations, for processes on this machine."""
    env = {**os.environ, **server.environment(), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    command = ["sh", str(ROOT / "deploy" / "apply.sh"), "process", GPUS]
    answer = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
    assert answer.returncode == 0, answer.stdout + answer.stderr


def until(what: str, found: Callable[[], Any], deadline_s: float = DEADLINE_S, every_s: float = 0.5) -> Any:
    """Asks again and again until the answer is true; that answer."""
    deadline = time.monotonic() + deadline_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s} s"
        time.sleep(every_s)
    return answer


class Site:
    """A server on which everything is deployed, a bucket of its own, and a folder of pictures."""

    def __init__(self, server: PrefectServer, s3: S3Server, folder: Path) -> None:
        self.server, self.s3, self.folder = server, s3, folder
        self.environment = {**server.environment(), **s3.environment(), "OMP_NUM_THREADS": "1"}

    # -- what runs --------------------------------------------------------------------------------------------------

    def config(self, pictures: int = 12, **changes: Any) -> Config:
        """The small pipeline over the bucket, every stage through its own deployment, a name of its own."""
        images = self.folder / "images"
        if not images.exists():
            draw_pictures(images, pictures)
        fields = {
            "name": self.s3.bucket,
            "store": {"url": f"s3://{self.s3.bucket}/store"},
            "flow": {"executor": "deployment", "retries": 0},
            "latents": {"batch_size": 1},
            **changes,
        }
        return small_config(self.folder, images, **fields)

    @contextmanager
    def workers(self) -> Iterator[list[subprocess.Popen[bytes]]]:
        """A worker for each pool, each with its own process group."""
        with (
            self.server.worker("cpu", self.environment) as cpu,
            self.server.worker("gpu", self.environment) as gpu,
        ):
            yield [cpu, gpu]

    def made(self, config: Config) -> dict[str, str]:
        """Fingerprints of what is in the store for this configuration, by label."""
        pipeline = Pipeline.open(config)
        return {node.label: made.fingerprint for node in pipeline.order if (made := pipeline.last(node)) is not None}

    def memos(self) -> dict[str, Any]:
        """When each finished shard of latents was written down, by its key."""
        listing = self.s3.client().list_objects_v2(Bucket=self.s3.bucket, Prefix="store/memo/latents/")
        return {entry["Key"]: entry["LastModified"] for entry in listing.get("Contents", [])}

    # -- the server -------------------------------------------------------------------------------------------------

    def call(self, method: str, path: str, **body: Any) -> Any:
        for _ in range(20):
            answer = httpx.request(method, f"{self.server.url}{path}", json=body or None, timeout=30)
            if (
                answer.status_code != httpx.codes.SERVICE_UNAVAILABLE
            ):  # its database is busy: Prefect's client waits, too
                break
            time.sleep(1)
        assert answer.is_success, f"{method} {path}: {answer.status_code} {answer.text}"
        return answer.json() if answer.content else None

    def start(self, config: Config, deployment: str = "loraline/pipeline", **parameters: Any) -> str:
        """As `prefect deployment run` does; the id of the run."""
        found = self.call("GET", f"/deployments/name/{deployment}")
        parameters = {"config": config.model_dump(mode="json"), **parameters}
        run = self.call("POST", f"/deployments/{found['id']}/create_flow_run", parameters=parameters)
        return str(run["id"])

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.call("GET", f"/flow_runs/{run_id}")
        return found

    def wait(self, run_id: str) -> dict[str, Any]:
        """The state in which a run ended."""
        until(f"the end of {run_id}", lambda: self.run(run_id)["state_type"] in FINAL)
        state: dict[str, Any] = self.run(run_id)["state"]
        return state

    def runs(self, config: Config) -> list[dict[str, Any]]:
        """All flow runs of this configuration, oldest first."""
        found = self.call("POST", "/flow_runs/filter", limit=200, sort="EXPECTED_START_TIME_ASC")
        return [run for run in found if run["parameters"].get("config", {}).get("name") == config.name]

    def stage_runs(self, config: Config) -> dict[str, str]:
        """Runs of stages: their ids and names."""
        return {run["id"]: run["name"] for run in self.runs(config) if "label" in run["parameters"]}

    def prefect(self, *arguments: str) -> None:
        """Prefect's own command line, as a person uses it."""
        command = [sys.executable, "-m", "prefect", *arguments]
        env = {**os.environ, **self.environment}
        answer = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True, check=False)
        assert answer.returncode == 0, answer.stdout + answer.stderr

    def retry_as_the_page_does(self, run_id: str) -> None:
        """What the button Retry on the page of a run sends."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        answer = self.call("POST", f"/flow_runs/{run_id}/set_state", state=state)
        assert answer["status"] == "ACCEPT", answer


def kill_stage(workers: list[subprocess.Popen[bytes]], stage: str) -> None:
    """Kills the process of a stage as soon as there is one: out of memory, say."""

    def killed() -> bool:
        for worker in workers:
            for process in psutil.Process(worker.pid).children(recursive=True):
                try:
                    words = process.cmdline()
                    begun = "stages.cli" in words and words[words.index("stages.cli") + 1 :][:2] == ["stage", stage]
                    if begun and "--check" not in words:
                        process.send_signal(signal.SIGKILL)
                        return True
                except psutil.Error:  # it ended meanwhile
                    continue
        return False

    until(f"a process of {stage}", killed, every_s=0.1)


def evict(workers: list[subprocess.Popen[bytes]], run_id: str) -> None:
    """Asks the process of a flow run to leave, as a spot machine or a drained node does."""
    for worker in workers:
        for process in psutil.Process(worker.pid).children():
            if process.environ().get("PREFECT__FLOW_RUN_ID") == run_id:
                process.terminate()
                return
    raise AssertionError(f"no worker has a process for the run {run_id}")
