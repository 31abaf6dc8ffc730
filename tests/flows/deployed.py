"""Driven by tests/flows/test_deployments.py in a process of its own, since Prefect reads its settings at import.

python -m tests.flows.deployed deploy POOL          makes a deployment of every flow on that pool
python -m tests.flows.deployed run CONFIG [FORCE]   runs the pipeline's deployment, waits, prints JSON
python -m tests.flows.deployed watch CONFIG [MIN]   runs the sensor's deployment, waits, prints JSON
"""

from __future__ import annotations

import json
import sys
import time
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments import run_deployment
from prefect.deployments.runner import EntrypointType

from flows.pipeline import pipeline_flow
from flows.stage import stage_flow
from flows.watch import watch_flow
from stages.registry import STAGES

DEADLINE_S = 420


def deploy(pool: str) -> None:
    named = [(stage_flow, stage.name) for stage in STAGES] + [(pipeline_flow, "pipeline"), (watch_flow, "watch")]
    for flow, name in named:
        deployment = flow.to_deployment(name, work_pool_name=pool, entrypoint_type=EntrypointType.MODULE_PATH)
        deployment.apply(work_pool_name=pool)


def wait(run_id: UUID) -> FlowRun:
    deadline = time.monotonic() + DEADLINE_S
    with get_client(sync_client=True) as client:
        while True:
            run = client.read_flow_run(run_id)
            if run.state is not None and run.state.is_final():
                return run
            if time.monotonic() > deadline:
                raise TimeoutError(f"{run.name} is {run.state}")
            time.sleep(1)


def start(deployment: str, parameters: dict[str, Any]) -> FlowRun:
    return run_deployment(deployment, parameters=parameters, timeout=0)  # type: ignore[return-value]


def told(run: FlowRun) -> dict[str, Any]:
    assert run.state is not None
    return {
        "id": str(run.id),
        "state": run.state.name,
        "type": run.state.type.value,
        "message": run.state.message or "",
    }


def stage_runs() -> list[dict[str, Any]]:
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(limit=200)
    return [
        {"name": run.name, "state": run.state.name if run.state else None, "key": run.idempotency_key}
        for run in runs
        if run.parameters.get("label")
    ]


def main() -> None:
    command, *rest = sys.argv[1:]
    if command == "deploy":
        deploy(rest[0])
        return
    with open(rest[0], encoding="utf-8") as file:  # noqa: PTH123
        config = json.load(file)
    if command == "run":
        result = told(wait(start("loraline/pipeline", {"config": config, "force": rest[1:]}).id))
    elif command == "start":
        result = told(start("loraline/pipeline", {"config": config}))
    elif command == "watch":
        minimum = int(rest[1]) if len(rest) > 1 else 1
        result = told(wait(start("watch/watch", {"config": config, "minimum_new_images": minimum}).id))
    else:
        raise SystemExit(f"no such command: {command}")
    print(json.dumps({**result, "stages": stage_runs()}))


if __name__ == "__main__":
    main()
