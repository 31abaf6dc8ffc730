"""deploy/prefect.yaml, held against the registry of stages, the flows and the work pools' templates."""

from __future__ import annotations

import inspect
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
    """All that the file deploys, and the definition of a sensor under its placeholder's name."""
    tree = yaml.safe_load(PREFECT_YAML.read_text(encoding="utf-8"))
    entries = [*tree["deployments"], tree["definitions"]["watch"]]
    PrefectYamlModel.model_validate({**tree, "deployments": entries})
    assert len(entries) == len({entry["name"] for entry in entries})
    return {entry["name"]: entry for entry in entries}


def test_every_stage_has_one_deployment_on_its_hardware(deployments: dict[str, dict[str, Any]]) -> None:
    of_stages = {name: entry for name, entry in deployments.items() if entry["entrypoint"] == "flows.stage.stage_flow"}
    assert list(of_stages) == [stage.name for stage in STAGES], "in the registry's order"
    for stage in STAGES:
        entry = of_stages[stage.name]
        assert entry["work_pool"]["name"] == stage.hardware, stage.name
        assert entry["description"] == stage.summary, stage.name
    assert set(deployments) - set(of_stages) == {"pipeline", "watch", "NAME"}


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


def test_only_a_sensor_with_a_configuration_starts_by_itself(deployments: dict[str, dict[str, Any]]) -> None:
    by_themselves = {name for name, entry in deployments.items() if entry.get("schedules") or entry.get("triggers")}
    assert by_themselves == {"NAME"}
    for name in ("watch", "NAME"):
        assert deployments[name]["concurrency_limit"] == {"limit": 1, "collision_strategy": "CANCEL_NEW"}


def test_no_event_is_missed_between_the_window_of_a_burst_and_the_check(deployments: dict[str, dict[str, Any]]) -> None:
    (trigger,) = deployments["NAME"]["triggers"]
    assert trigger["schedule_after"] >= trigger["within"], "a file that comes after the check has begun would wait"


def test_nothing_is_said_twice() -> None:
    lines = [line.strip() for line in PREFECT_YAML.read_text(encoding="utf-8").splitlines()]
    assert sum(line.startswith("image:") for line in lines) == 2
    assert sum("flows.stage.stage_flow" in line for line in lines) == 1
