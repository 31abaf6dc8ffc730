"""docker/compose.yaml, live: the commands at its head, with everything up and the demo through all of it."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.registry import STAGES
from tests.docker.conftest import REVISION, provide_bases
from tests.docker.engine import BASE_IMAGE, ROOT, Engine

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(2400)]

PROJECT = "loraline-test"
SERVICES = {"postgres", "s3", "server", "worker-cpu", "worker-gpu"}


@dataclass(frozen=True)
class Compose:
    """A compose program, and the file as it is given to it."""

    command: list[str]
    environment: dict[str, str]
    folder: Path

    def run(self, *arguments: str) -> str:
        """What it printed.

        Raises:
            AssertionError: it failed.
        """
        answer = subprocess.run(
            [*self.command, "--project-name", PROJECT, "--file", "compose.json", *arguments],
            cwd=self.folder,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            check=False,
        )
        assert answer.returncode == 0, f"{arguments}\n{answer.stdout[-6000:]}"
        return answer.stdout


@pytest.fixture(scope="module")
def stand_ins(engine: Engine, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Images of PostgreSQL and of an S3 server, by the variables that name them: the given ones, else stand-ins."""
    names = {}
    context = tmp_path_factory.mktemp("context") / "stand-ins"
    shutil.copytree(Path(__file__).parent / "stand-ins", context)
    shutil.copy(ROOT / "docker" / "constraints.txt", context)
    for service in ("postgres", "s3"):
        variable = f"{service.upper()}_IMAGE"
        names[variable] = os.environ.get(variable, f"loraline-{service}:test")
        if variable not in os.environ:
            provide_bases(engine)
            options = ["--network", "host", "--target", service, "--tag", names[variable]]
            engine.run("build", *options, "--build-arg", f"BASE_IMAGE={BASE_IMAGE}", str(context))
    return names


@pytest.fixture(scope="module")
def compose(
    engine: Engine, image: str, stand_ins: dict[str, str], tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Compose]:
    """The program and the file; whatever they made is gone afterwards."""
    folder = tmp_path_factory.mktemp("compose")
    command = _program(engine)
    tree = yaml.safe_load((ROOT / "docker" / "compose.yaml").read_text(encoding="utf-8"))
    # Older programs know neither a project's name nor that keys with x- may be anywhere; the project is named above.
    tree = {key: value for key, value in tree.items() if key in ("services", "volumes")}
    for service in tree["services"].values():
        if "build" in service:
            service["build"] |= {"context": str(ROOT), "network": "host"}
            service["build"]["args"] |= engine.build_arguments()
            service["environment"]["OMP_NUM_THREADS"] = "1"  # two on a busy machine may be ten times slower
        service["volumes"] = [_absolute(mount) for mount in service.get("volumes", [])]
    (folder / "compose.json").write_text(json.dumps(tree), encoding="utf-8")
    environment = {
        **os.environ,
        **stand_ins,
        "DOCKER_HOST": engine.host,
        "DOCKER_BUILDKIT": "1",
        "COMPOSE_DOCKER_CLI_BUILD": "1",
        "PATH": f"{Path(engine.client).parent}:{os.environ['PATH']}",
        "LORALINE_IMAGE": image,
        "LORALINE_REVISION": REVISION,
        "PREFECT_PORT": str(_free_port()),
        "S3_PORT": str(_free_port()),
    }
    made = Compose(command, environment, folder)
    try:
        yield made
    finally:
        made.run("down", "--volumes", "--remove-orphans")


def test_up_and_the_demo_through_all_of_it(compose: Compose, engine: Engine) -> None:
    started = time.monotonic()
    compose.run("up", "--build", "--detach")
    up = time.monotonic() - started
    running = {
        container["Config"]["Labels"]["com.docker.compose.service"]
        for container in engine.containers(f"com.docker.compose.project={PROJECT}")
        if container["State"]["Running"]
    }
    assert running == SERVICES

    started = time.monotonic()
    said = compose.run("run", "--rm", "demo")
    print(f"\ncompose: up in {up:.0f} s, the demo in {time.monotonic() - started:.0f} s")
    runs = [run for run in _runs(compose.environment["PREFECT_PORT"]) if not run["parameters"].get("check")]
    assert {run["state_type"] for run in runs} == {"COMPLETED"}, said[-3000:]
    pools = {run["parameters"].get("label", "").partition("[")[0]: run["work_pool_name"] for run in runs}
    assert pools == {"": "cpu", **{stage.name: stage.hardware for stage in STAGES}}
    # Each in a process of its own, in the container of its pool's worker.
    places = {(run["work_pool_name"], run["infrastructure_pid"]) for run in runs}
    assert len(places) == len(runs) == len(STAGES) + 1
    listed = compose.run("exec", "-T", "worker-cpu", "ls", ".loraline/published/demo")
    assert ".safetensors" in listed

    compose.run("down", "--volumes")
    assert engine.containers(f"com.docker.compose.project={PROJECT}") == []
    assert engine.run("volume", "ls", "--quiet", "--filter", f"label=com.docker.compose.project={PROJECT}").stdout == ""


def _program(engine: Engine) -> list[str]:
    """The compose program of this machine; without one the test is skipped."""
    if engine.run("compose", "version", check=False).returncode == 0:
        return [engine.client, "compose"]
    alone = shutil.which("docker-compose")
    if alone is None:
        pytest.skip("there is no docker compose on this machine: apt-get install docker-compose")
    return [alone]


def _absolute(mount: str) -> str:
    return str(ROOT / mount.removeprefix("../")) if mount.startswith("../") else mount


def _free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return int(listener.getsockname()[1])


def _runs(port: str) -> list[dict[str, Any]]:
    address = f"http://127.0.0.1:{port}/api/flow_runs/filter"
    request = urllib.request.Request(address, data=b"{}", headers={"content-type": "application/json"})
    with urllib.request.urlopen(request, timeout=60) as answer:
        return list(json.loads(answer.read()))
