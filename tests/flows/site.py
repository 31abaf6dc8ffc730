"""One place for a whole deployment: a real Prefect server with `deploy/` applied to it, workers, and a bucket."""

from __future__ import annotations

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import psutil

from stages.config import Config
from stages.pipeline import Pipeline
from tests.deploy import site as deploy
from tests.pictures import draw_pictures, small_config
from tests.servers.prefect import PrefectServer
from tests.servers.s3 import S3Server

DEADLINE_S = 420
FINAL = ("COMPLETED", "FAILED", "CRASHED", "CANCELLED")


def until(what: str, found: Callable[[], Any], deadline_s: float = DEADLINE_S, every_s: float = 0.5) -> Any:
    """Asks again and again until the answer is true; that answer."""
    deadline = time.monotonic() + deadline_s
    while not (answer := found()):
        assert time.monotonic() < deadline, f"{what}: not within {deadline_s} s"
        time.sleep(every_s)
    return answer


class Site(deploy.Site):
    """A server on which everything is deployed, a bucket of its own, and a folder of pictures."""

    def __init__(self, server: PrefectServer, s3: S3Server, folder: Path) -> None:
        super().__init__(server)
        self.s3, self.folder = s3, folder
        self.environment |= {**s3.environment(), "OMP_NUM_THREADS": "1", "PREFECT_LOGGING_LEVEL": "INFO"}

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

    def begin(self, config: Config, deployment: str = "loraline/pipeline", **parameters: Any) -> str:
        """As `prefect deployment run` does; the id of the run."""
        found = self.get(f"deployments/name/{deployment}")
        return self.start(found["id"], {"config": config.model_dump(mode="json"), **parameters})

    def run(self, run_id: str) -> dict[str, Any]:
        found: dict[str, Any] = self.get(f"flow_runs/{run_id}")
        return found

    def wait(self, run_id: str) -> dict[str, Any]:
        """The state in which a run ended."""
        until(f"the end of {run_id}", lambda: self.state(run_id)["type"] in FINAL)
        return self.state(run_id)

    def runs(self, config: Config) -> list[dict[str, Any]]:
        """All flow runs of this configuration, oldest first."""
        found = self.post("flow_runs/filter", {"limit": 200, "sort": "EXPECTED_START_TIME_ASC"})
        return [run for run in found if run["parameters"].get("config", {}).get("name") == config.name]

    def stage_runs(self, config: Config) -> dict[str, str]:
        """Runs of stages: their ids and names."""
        return {run["id"]: run["name"] for run in self.runs(config) if "label" in run["parameters"]}

    def most_at_once(self, config: Config, pool: str) -> int:
        """How many of these runs a pool has worked on at the same time; each has ended."""
        runs = [run for run in self.runs(config) if run["work_pool_name"] == pool and run["start_time"]]
        return max(sum(other["start_time"] <= run["start_time"] < other["end_time"] for other in runs) for run in runs)

    def prefect(self, *arguments: str) -> None:
        """Prefect's own command line, as a person uses it."""
        self.command([sys.executable, "-m", "prefect", *arguments])

    def retry_as_the_page_does(self, run_id: str) -> None:
        """What the button Retry on the page of a run sends."""
        state = {"type": "SCHEDULED", "name": "AwaitingRetry", "message": "Retry from the UI"}
        answer = self.post(f"flow_runs/{run_id}/set_state", {"state": state})
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
