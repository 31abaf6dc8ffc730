"""The whole pipeline through Prefect's docker worker: a server, two workers, and a container for every run."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from stages.registry import STAGES
from tests.deploy.test_prefect_yaml import _post as post
from tests.deploy.test_prefect_yaml import _start_server as start_server
from tests.docker.engine import ROOT, Engine
from tests.docker.test_stages import configuration, hub  # noqa: F401 (a fixture)
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture
def deploy_folder(image: str, s3: S3Server, hub: HubServer, tmp_path: Path) -> Path:  # noqa: F811
    """A copy of deploy/ as one would have it for this engine: secrets, no GPU, a local image, a locked container."""
    shutil.copytree(ROOT / "deploy", tmp_path / "deploy")
    template = json.loads((ROOT / "deploy" / "work-pools" / "docker-cpu.json").read_text(encoding="utf-8"))
    variables = template["variables"]["properties"]
    secrets = {**s3.environment(), **hub.environment(), "HF_HOME": "/tmp/loraline/huggingface", "OMP_NUM_THREADS": "1"}
    variables["env"]["default"] |= secrets
    variables["image_pull_policy"]["default"] = "Never"
    variables["read_only"]["default"] = True
    variables["tmpfs"]["default"] = {"/tmp": "size=4g"}
    for name in ("docker-cpu", "docker-gpu"):
        (tmp_path / "deploy" / "work-pools" / f"{name}.json").write_text(json.dumps(template), encoding="utf-8")
    return tmp_path / "deploy"


@pytest.fixture
def prefect(engine: Engine, deploy_folder: Path, image: str, tmp_path: Path) -> Iterator[dict[str, str]]:
    """The environment of a client: a server runs, both pools have a docker worker, everything is deployed."""
    pytest.importorskip("prefect_docker", reason="pip install -c docker/constraints.txt '.[deploy]'")
    environment = {
        **{key: value for key, value in os.environ.items() if not key.startswith("AWS_")},
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path / "prefect"),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_LOGGING_LEVEL": "WARNING",
        "PREFECT_WORKER_QUERY_SECONDS": "2",
        "DOCKER_HOST": engine.host,
        "LORALINE_IMAGE": image,
    }
    server, address = start_server(environment)
    workers: list[subprocess.Popen[bytes]] = []
    try:
        environment["PREFECT_API_URL"] = address
        applied = subprocess.run(
            ["sh", str(deploy_folder / "apply.sh"), "docker", "2"], env=environment, capture_output=True, text=True
        )
        assert applied.returncode == 0, applied.stdout + applied.stderr
        with (tmp_path / "workers.log").open("wb") as log:
            for pool in ("cpu", "gpu"):
                command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", pool]
                # A worker hands its own settings to the container, where its folder does not exist.
                own = {key: value for key, value in environment.items() if key != "PREFECT_HOME"}
                own["HOME"] = str(tmp_path)
                workers.append(subprocess.Popen(command, env=own, stdout=log, stderr=log))
        yield environment
    finally:
        # Workers before the server: one whose server is gone outlives a SIGTERM.
        for process in [*workers, server]:
            process.terminate()
            process.wait(60)


def test_every_run_in_a_container_of_its_own(
    engine: Engine,
    prefect: dict[str, str],
    s3: S3Server,
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configuration(s3, "int8-quanto").model_dump(mode="json")
    config["flow"]["executor"] = "deployment"
    before = set(engine.run("ps", "--all", "--quiet").stdout.split())
    started = time.monotonic()
    command = [
        "prefect",
        "deployment",
        "run",
        "loraline/pipeline",
        "--params",
        json.dumps({"config": config}),
        "--watch",
    ]
    ran = subprocess.run(command, env=prefect, capture_output=True, text=True, timeout=1500)
    took = time.monotonic() - started
    log = (tmp_path / "workers.log").read_text(errors="replace")
    assert ran.returncode == 0, ran.stdout[-3000:] + ran.stderr[-1000:] + log[-3000:]

    runs = {run["name"]: run for run in post(prefect["PREFECT_API_URL"], "flow_runs/filter")}
    assert {run["state_type"] for run in runs.values()} == {"COMPLETED"}
    assert len(runs) == len(STAGES) + 1
    made = set(engine.run("ps", "--all", "--quiet").stdout.split()) - before
    containers = json.loads(engine.run("inspect", *made).stdout)
    assert sorted(container["Config"]["Labels"]["io.prefect.flow-run-id"] for container in containers) == sorted(
        run["id"] for run in runs.values()
    )
    assert all(container["HostConfig"]["ReadonlyRootfs"] for container in containers)
    assert all(container["State"]["ExitCode"] == 0 for container in containers)
    assert any(name.endswith(".safetensors") for name in hub.files("user/blots-lora", kind="model"))
    waits = {name: round(_seconds(run["created"], run["start_time"]), 1) for name, run in runs.items()}
    print(
        f"\nthe whole pipeline in {took:.0f} s; from the request to the flow's first line, seconds: {json.dumps(waits)}"
    )

    # Once more: nothing is done again, so no stage gets a container.
    again = subprocess.run(command, env=prefect, capture_output=True, text=True, timeout=600)
    assert again.returncode == 0, again.stdout[-3000:]
    assert len(set(engine.run("ps", "--all", "--quiet").stdout.split()) - before - made) == 1
    engine.run("rm", "--force", *(set(engine.run("ps", "--all", "--quiet").stdout.split()) - before))


def test_a_killed_container_is_noticed_and_only_its_stage_runs_again(
    engine: Engine,
    prefect: dict[str, str],
    s3: S3Server,
    hub: HubServer,  # noqa: F811
    tmp_path: Path,
) -> None:
    config = configuration(s3, "int8-quanto").model_dump(mode="json")
    config["flow"]["executor"] = "deployment"
    before = set(engine.run("ps", "--all", "--quiet").stdout.split())
    command = [
        "prefect",
        "deployment",
        "run",
        "loraline/pipeline",
        "--params",
        json.dumps({"config": config}),
        "--watch",
    ]
    with (tmp_path / "run.log").open("wb") as log:
        running = subprocess.Popen(command, env=prefect, stdout=log, stderr=log)
        try:
            address = prefect["PREFECT_API_URL"]
            for _ in range(600):  # as a machine that is taken away: nobody gets to say goodbye
                train = [run for run in post(address, "flow_runs/filter") if run["name"] == "train"]
                if train and train[0]["state_type"] == "RUNNING":
                    break
                assert running.poll() is None, (tmp_path / "run.log").read_text(errors="replace")[-3000:]
                time.sleep(1)
            found = engine.run(
                "ps", "--quiet", "--filter", f"label=io.prefect.flow-run-id={train[0]['id']}"
            ).stdout.split()
            engine.run("kill", *found)
            assert running.wait(900) == 0, (tmp_path / "run.log").read_text(errors="replace")[-3000:]
        finally:
            if running.poll() is None:
                running.kill()
    states: dict[str, list[str]] = {}
    for run in post(address, "flow_runs/filter"):
        states.setdefault(run["name"], []).append(run["state_type"])
    assert sorted(states.pop("train")) == ["COMPLETED", "CRASHED"]
    assert {name: ["COMPLETED"] for name in states} == states
    assert any(name.endswith(".safetensors") for name in hub.files("user/blots-lora", kind="model"))
    engine.run("rm", "--force", *(set(engine.run("ps", "--all", "--quiet").stdout.split()) - before))


def _seconds(earlier: Any, later: Any) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()
