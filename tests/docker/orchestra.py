"""Prefect for the tests with containers: a server, a docker worker for each pool, and everything deployed."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from tests.docker.engine import ROOT, Engine
from tests.servers.prefect import prefect_server

# A worker puts its run's id on the container.
RUN_LABEL = "io.prefect.flow-run-id"
FINAL = {"COMPLETED", "FAILED", "CRASHED", "CANCELLED"}


@dataclass(frozen=True)
class Orchestra:
    """A Prefect server with workers, from outside: the command line and the API."""

    engine: Engine
    environment: dict[str, str]
    log: Path

    def prefect(self, *arguments: str) -> str:
        """What the command line prints.

        Raises:
            AssertionError: it failed.
        """
        answer = subprocess.run(
            ["prefect", "--no-prompt", *arguments], env=self.environment, capture_output=True, text=True, check=False
        )
        assert answer.returncode == 0, answer.stdout + answer.stderr
        return answer.stdout

    def api(self, path: str, body: Mapping[str, Any] | None = None) -> Any:
        """One answer of the API: GET without a body, else POST."""
        url = f"{self.environment['PREFECT_API_URL']}/{path}"
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, headers={"content-type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.loads(answer.read())

    def start(self, config: Mapping[str, Any]) -> str:
        """Starts the pipeline as a person does; the run's id."""
        said = self.prefect("deployment", "run", "loraline/pipeline", "--params", json.dumps({"config": config}))
        return said.partition("UUID: ")[2].split()[0]

    def runs(self, pipeline: str) -> list[dict[str, Any]]:
        """The pipeline's run, then the runs of its stages: all that were made after it and before the next one."""
        runs = sorted(self.api("flow_runs/filter", {}), key=lambda run: run["created"])
        first = next(index for index, run in enumerate(runs) if run["id"] == pipeline)
        after = [index for index, run in enumerate(runs[first + 1 :], first + 1) if "label" not in run["parameters"]]
        return runs[first : after[0] if after else None]

    def wait(self, pipeline: str, stage: str | None, state: str, patience_s: float = 900) -> list[dict[str, Any]]:
        """The pipeline's runs, once a run of a stage, or with None the pipeline's own, is in a state.

        Raises:
            AssertionError: it took too long, or the pipeline's run ended first.
        """
        deadline = time.monotonic() + patience_s
        while True:
            runs = self.runs(pipeline)
            if any(run["state_type"] == state for run in (named(stage, runs) if stage else runs[:1])):
                return runs
            assert runs[0]["state_type"] not in FINAL, f"{told(runs)}\n{self.tail()}"
            assert time.monotonic() < deadline, f"after {patience_s:.0f} s: {told(runs)}\n{self.tail()}"
            time.sleep(1)

    def containers(self, run: Mapping[str, Any]) -> list[dict[str, Any]]:
        """The containers that a run has had."""
        return self.engine.containers(f"{RUN_LABEL}={run['id']}")

    def tail(self) -> str:
        return self.log.read_text(errors="replace")[-3000:]


def named(stage: str, runs: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """The runs of a stage."""
    return [run for run in runs if run["name"] == stage]


def told(runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """The runs' names, states and messages, for whoever reads why a test failed."""
    return [f"{run['name']}: {run['state_name']} ({run['state']['message']})" for run in runs]


def wait_s(run: Mapping[str, Any]) -> float:
    """Seconds from the request for a run to its flow's first line."""
    begin, end = (datetime.fromisoformat(run[name]) for name in ("created", "start_time"))
    return round((end - begin).total_seconds(), 1)


@contextmanager
def orchestra(engine: Engine, image: str, environment: Mapping[str, str], folder: Path) -> Iterator[Orchestra]:
    """Server, workers and deployments, over the files of deploy/.

    Args:
        engine: where the workers start containers.
        image: of all stages.
        environment: what every container is told: secrets.
        folder: for the server's state, and logs.
    """
    deploy = _deploy_folder(folder, environment)
    with prefect_server(folder / "prefect") as server:
        settings = {
            **{key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
            **server.environment(),
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "PREFECT_LOGGING_LEVEL": "WARNING",
            "DOCKER_HOST": engine.host,
            "LORALINE_IMAGE": image,
        }
        applied = subprocess.run(
            [sys.executable, str(deploy / "apply.py"), "docker", "2"],
            env=settings,
            capture_output=True,
            text=True,
            check=False,
        )
        assert applied.returncode == 0, applied.stdout + applied.stderr
        log = folder / "workers.log"
        # A worker hands its own settings to the container, where its folder does not exist.
        own = {key: value for key, value in settings.items() if key != "PREFECT_HOME"} | {"HOME": str(folder)}
        with log.open("wb") as output:
            workers = [
                subprocess.Popen(
                    [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool],
                    env=own,
                    stdout=output,
                    stderr=output,
                )
                for pool in ("cpu", "gpu")
            ]
        try:
            yield Orchestra(engine, settings, log)
        finally:
            # Workers before the server: one whose server is gone outlives a SIGTERM. So may one that still watches the
            # container of a run that was cancelled.
            for worker in workers:
                worker.terminate()
            for worker in workers:
                with suppress(subprocess.TimeoutExpired):
                    worker.wait(10)
                worker.kill()
                worker.wait()
            engine.remove(RUN_LABEL)


def _deploy_folder(folder: Path, environment: Mapping[str, str]) -> Path:
    """A copy of deploy/ as one would have it for this engine: secrets, no GPU, a local image, a locked container."""
    copy = folder / "deploy"
    shutil.copytree(ROOT / "deploy", copy)
    template = json.loads((copy / "work-pools" / "docker-cpu.json").read_text(encoding="utf-8"))
    variables = template["variables"]["properties"]
    variables["env"]["default"] |= {**environment, "OMP_NUM_THREADS": "1"}
    variables["image_pull_policy"]["default"] = "Never"
    variables["read_only"]["default"] = True
    variables["tmpfs"]["default"] = {"/tmp": "size=4g"}
    for name in ("docker-cpu", "docker-gpu"):
        (copy / "work-pools" / f"{name}.json").write_text(json.dumps(template), encoding="utf-8")
    return copy
