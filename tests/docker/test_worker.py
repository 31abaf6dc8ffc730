"""The pipeline through Prefect's docker worker: a server, two workers, and a container for every run.

The tests share server and bucket: what the first one made, the second need not make again.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from typing import Any

import pytest

from stages.registry import STAGES
from tests.docker.conftest import unavailable
from tests.docker.engine import Engine
from tests.docker.orchestra import Orchestra, named, orchestra, told, wait_s
from tests.docker.running import configuration, secrets
from tests.servers.hub import HubServer
from tests.servers.s3 import S3Server

pytestmark = [pytest.mark.docker, pytest.mark.slow, pytest.mark.timeout(1800)]


@pytest.fixture(scope="module")
def s3(moto: S3Server) -> S3Server:
    return moto.with_new_bucket()


@pytest.fixture(scope="module")
def prefect(
    engine: Engine, image: str, s3: S3Server, hub: HubServer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Orchestra]:
    try:
        import prefect_docker  # noqa: F401
    except ImportError:
        unavailable("there is no prefect-docker: pip install -c docker/constraints.txt -e '.[deploy]'")
    with orchestra(engine, image, secrets(s3, hub), tmp_path_factory.mktemp("orchestra")) as running:
        yield running


@pytest.fixture
def config(s3: S3Server) -> dict[str, Any]:
    record: dict[str, Any] = configuration(s3, "int8-quanto").model_dump(mode="json")
    record["flow"]["executor"] = "deployment"
    return record


def test_every_run_has_a_container_of_its_own_and_a_killed_one_is_replaced(
    prefect: Orchestra, hub: HubServer, config: dict[str, Any]
) -> None:
    started = time.monotonic()
    pipeline = prefect.start(config)
    (train,) = named("train", prefect.wait(pipeline, "train", "RUNNING"))
    # As a machine that is taken away: nobody gets to say goodbye.
    (container,) = prefect.containers(train)
    prefect.engine.run("kill", container["Id"])
    runs = prefect.wait(pipeline, None, "COMPLETED")
    print(f"\nthe whole pipeline, one container killed on the way: {time.monotonic() - started:.0f} s")
    waits = {run["name"]: wait_s(run) for run in runs}
    print(f"from the request to the flow's first line, seconds: {json.dumps(waits)}")

    # Only the stage whose container was killed ran a second time.
    assert sorted(run["state_type"] for run in named("train", runs)) == ["COMPLETED", "CRASHED"]
    assert {run["state_type"] for run in runs if run["name"] != "train"} == {"COMPLETED"}
    worked = [run for run in runs if not run["parameters"].get("check")]
    assert len(worked) == len(STAGES) + 2
    for run in runs:
        (container,) = prefect.containers(run)
        assert container["HostConfig"]["ReadonlyRootfs"], run["name"]
        assert container["HostConfig"]["CapDrop"] == ["ALL"], run["name"]
        assert container["State"]["ExitCode"] == (137 if run["state_type"] == "CRASHED" else 0), run["name"]
    assert any(name.endswith(".safetensors") for name in hub.files("user/blots-lora", kind="model"))

    # Once more: everything is there, so no stage gets a container.
    started = time.monotonic()
    runs = prefect.wait(prefect.start(config), None, "COMPLETED")
    print(f"the pipeline with nothing to do: {time.monotonic() - started:.0f} s")
    assert len(runs) == 1


def test_cancelling_the_pipeline_cancels_the_stage_in_its_container(
    prefect: Orchestra, s3: S3Server, config: dict[str, Any]
) -> None:
    # Longer than any patience: whatever ends it, it is not its last step.
    config["train"] |= {"steps": 100_000, "checkpoint_every": 20}
    before = set(s3.keys("store/runs/"))
    pipeline = prefect.start(config)
    (train,) = named("train", prefect.wait(pipeline, "train", "RUNNING"))
    # In the middle of its work: it has written a checkpoint already.
    while not any(key.endswith("checkpoint.json") for key in set(s3.keys("store/runs/")) - before):
        assert prefect.api(f"flow_runs/{train['id']}")["state_type"] == "RUNNING", prefect.tail()
        time.sleep(1)
    assert all(container["State"]["Running"] for container in prefect.containers(train))

    def states() -> set[str]:
        return {run["state_type"] for run in prefect.runs(pipeline) if run["id"] == pipeline or run["name"] == "train"}

    started = time.monotonic()
    prefect.prefect("flow-run", "cancel", pipeline)
    until = started + 150
    while states() != {"CANCELLED"}:
        assert time.monotonic() < until, f"{told(prefect.runs(pipeline))}\n{prefect.tail()}"
        time.sleep(1)
    print(f"\ncancelled {time.monotonic() - started:.0f} s after it was asked for")
    runs = prefect.runs(pipeline)
    while any(container["State"]["Running"] for run in runs for container in prefect.containers(run)):
        assert time.monotonic() < until, "a container is left"
        time.sleep(1)
    print(f"and no container of it runs any more {time.monotonic() - started:.0f} s after it was asked for")
    worked = [run["name"] for run in runs[1:] if not run["parameters"].get("check")]
    assert worked[-1] == "train", "nothing comes after what was cancelled"
