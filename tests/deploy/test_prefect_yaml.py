"""deploy/prefect.yaml, held against the registry of stages, the flows and the work pools' templates."""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from prefect.cli.deploy._models import PrefectYamlModel
from prefect.flows import load_flow_from_entrypoint

from stages.registry import STAGES
from tests.deploy.rendering import ROOT, template

PREFECT_YAML = ROOT / "deploy" / "prefect.yaml"


@pytest.fixture(scope="module")
def deployments() -> dict[str, dict[str, Any]]:
    tree = yaml.safe_load(PREFECT_YAML.read_text(encoding="utf-8"))
    PrefectYamlModel.model_validate(tree)
    names = [entry["name"] for entry in tree["deployments"]]
    assert len(names) == len(set(names))
    return {entry["name"]: entry for entry in tree["deployments"]}


def test_every_stage_has_one_deployment_on_its_hardware(deployments: dict[str, dict[str, Any]]) -> None:
    of_stages = {name: entry for name, entry in deployments.items() if entry["entrypoint"] == "flows.stage.stage_flow"}
    assert list(of_stages) == [stage.name for stage in STAGES], "in the registry's order"
    for stage in STAGES:
        entry = of_stages[stage.name]
        assert entry["work_pool"]["name"] == stage.hardware, stage.name
        assert entry["description"] == stage.summary, stage.name
    assert set(deployments) - set(of_stages) == {"pipeline", "watch"}


@pytest.mark.parametrize(
    ("name", "full_name"), [("train", "stage/train"), ("pipeline", "loraline/pipeline"), ("watch", "watch/watch")]
)
def test_entry_points_are_flows_with_the_names_that_others_call(
    deployments: dict[str, dict[str, Any]], name: str, full_name: str
) -> None:
    flow = load_flow_from_entrypoint(deployments[name]["entrypoint"])
    assert f"{flow.name}/{name}" == full_name
    assert "config" in inspect.signature(flow.fn).parameters


def test_the_code_is_in_the_image() -> None:
    assert yaml.safe_load(PREFECT_YAML.read_text(encoding="utf-8"))["pull"] == []


def test_images_come_from_the_environment_and_gpus_only_where_they_are_used(
    deployments: dict[str, dict[str, Any]],
) -> None:
    for entry in deployments.values():
        pool, job = entry["work_pool"]["name"], entry["work_pool"]["job_variables"]
        assert job["image"] == {"cpu": "{{ $LORALINE_IMAGE }}", "gpu": "{{ $LORALINE_GPU_IMAGE }}"}[pool]
        assert ("gpus" in job) == (pool == "gpu")


def test_job_variables_are_those_of_the_kubernetes_pools(deployments: dict[str, dict[str, Any]]) -> None:
    for entry in deployments.values():
        known = template(f"kubernetes-{entry['work_pool']['name']}")["variables"]["properties"]
        for key, value in entry["work_pool"]["job_variables"].items():
            assert key in known, key
            assert known[key]["type"] == {str: "string", int: "integer", dict: "object"}[type(value)], key


def test_the_sensor_sleeps_until_it_is_woken_and_never_runs_twice_at_once(
    deployments: dict[str, dict[str, Any]],
) -> None:
    watch = deployments["watch"]
    assert [schedule["active"] for schedule in watch["schedules"]] == [False]
    assert watch["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_nothing_is_said_twice() -> None:
    lines = [line.strip() for line in PREFECT_YAML.read_text(encoding="utf-8").splitlines()]
    assert sum(line.startswith("image:") for line in lines) == 2
    assert sum("flows.stage.stage_flow" in line for line in lines) == 1


@pytest.mark.slow
def test_prefect_takes_all_of_them(tmp_path: Path) -> None:
    """`deploy/apply.sh process` against a server of its own: pools, limits and deployments are there afterwards."""
    environment = {
        **os.environ,
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "PREFECT_HOME": str(tmp_path),
        "PREFECT_SERVER_ALLOW_EPHEMERAL_MODE": "false",
        "PREFECT_LOGGING_LEVEL": "ERROR",
        "LORALINE_REVISION": "abc123",
    }
    server, address = _start_server(environment)
    try:
        environment["PREFECT_API_URL"] = address
        for _ in range(2):  # it may be run again at any time
            applied = subprocess.run(
                ["sh", str(ROOT / "deploy" / "apply.sh"), "process", "2"],
                env=environment,
                capture_output=True,
                text=True,
            )
            assert applied.returncode == 0, applied.stdout + applied.stderr
        found = {entry["name"]: entry for entry in _post(address, "deployments/filter")}
        assert set(found) == {*(stage.name for stage in STAGES), "pipeline", "watch"}
        assert {entry["version"] for entry in found.values()} == {"abc123"}
        assert found["train"]["work_pool_name"] == "gpu"
        assert found["train"]["pull_steps"] in ([], None)
        assert found["train"]["job_variables"]["memory"] == "64G"
        assert "config" in found["pipeline"]["parameter_openapi_schema"]["properties"]
        pools = {entry["name"]: entry for entry in _post(address, "work_pools/filter")}
        assert pools["gpu"]["concurrency_limit"] == 2
        assert pools["cpu"]["concurrency_limit"] is None
    finally:
        server.terminate()
        server.wait(60)


def _start_server(environment: dict[str, str]) -> tuple[subprocess.Popen[bytes], str]:
    import socket
    import time
    import urllib.request

    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    command = [
        sys.executable,
        "-m",
        "prefect",
        "server",
        "start",
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--no-ui",
    ]
    server = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    address = f"http://127.0.0.1:{port}/api"
    for _ in range(240):
        assert server.poll() is None, "the server ended"
        try:
            with urllib.request.urlopen(f"{address}/health", timeout=5):
                return server, address
        except OSError:
            time.sleep(0.5)
    server.kill()
    raise AssertionError("the server did not come up")


def _post(address: str, path: str) -> list[dict[str, Any]]:
    import urllib.request

    request = urllib.request.Request(
        f"{address}/{path}", data=b"{}", headers={"content-type": "application/json"}, method="POST"
    )
    with urllib.request.urlopen(request, timeout=30) as answer:
        return list(json.loads(answer.read()))
