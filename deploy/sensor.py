"""Trains a configuration again whenever its data change: deploys a sensor for it, `watch/<name of the configuration>`.

    python deploy/sensor.py run.yaml [--set SECTION.KEY=VALUE ...] [--cron "0 3 * * *"]
    python deploy/sensor.py --renew            brings every sensor to the image and sizes that are deployed now
    python deploy/sensor.py --remove NAME      takes the sensor away, and what listens to events for it

What a sensor is stands in deploy/prefect.yaml (`definitions.watch`). It takes the image and the revision of the
deployed pipeline, so deploy/apply.sh comes first. May be run again at any time: a sensor that is there keeps its
schedules, asleep or awake, unless --cron gives another one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.responses import DeploymentResponse
from prefect.exceptions import ObjectNotFound

from stages.config import load_config
from stages.core.errors import ConfigError, LoralineError

HERE = Path(__file__).parent
# The deployment without a configuration of its own: apply.sh makes it.
BARE = "watch"


def deployed() -> tuple[DeploymentResponse, dict[str, DeploymentResponse]]:
    """The pipeline's deployment, and those of all sensors by the names of their configurations.

    Raises:
        ConfigError: there is no pipeline yet.
    """
    with get_client(sync_client=True) as client:
        try:
            pipeline = client.read_deployment_by_name("loraline/pipeline")
        except ObjectNotFound:
            raise ConfigError("there is no deployment loraline/pipeline: run deploy/apply.sh first") from None
        sensors = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["watch"])))
    return pipeline, {sensor.name: sensor for sensor in sensors if sensor.name != BARE}


def entry(name: str, parameters: dict[str, Any], schedules: list[dict[str, Any]] | None) -> dict[str, Any]:
    """The sensor of that name, as `prefect deploy` reads it.

    Args:
        name: the configuration's name.
        parameters: of its runs.
        schedules: in the place of those of prefect.yaml; None for these.
    """
    definition = yaml.safe_load((HERE / "prefect.yaml").read_text(encoding="utf-8"))["definitions"]["watch"]
    made: dict[str, Any] = json.loads(json.dumps(definition).replace("NAME", name))
    made["parameters"] = parameters
    if schedules is not None:
        made["schedules"] = schedules
    return made


def schedules_of(sensor: DeploymentResponse) -> list[dict[str, Any]]:
    """Its schedules, as `prefect deploy` reads them."""
    kept = []
    for found in sensor.schedules:
        values = {**found.schedule.model_dump(mode="json"), "active": found.active, "slug": found.slug}
        kept.append({key: value for key, value in values.items() if value is not None})
    return kept


def deploy(entries: list[dict[str, Any]], pipeline: DeploymentResponse) -> int:
    """Has Prefect make or update these deployments, with the pipeline's image and revision; its exit code."""
    image = (pipeline.job_variables or {}).get("image") or "none"
    environment = {**os.environ, "LORALINE_IMAGE": image, "LORALINE_REVISION": pipeline.version or "unknown"}
    with tempfile.TemporaryDirectory(prefix="loraline-sensor-") as folder:
        file = Path(folder) / "prefect.yaml"
        file.write_text(yaml.safe_dump({"name": "loraline", "pull": [], "deployments": entries}), encoding="utf-8")
        command = [sys.executable, "-m", "prefect", "--no-prompt", "deploy", "--all", "--prefect-file", str(file)]
        return subprocess.run(command, env=environment, cwd=HERE.parent, check=False).returncode


def remove(sensor: DeploymentResponse) -> None:
    """Takes a sensor away. Deleting the deployment alone would leave its trigger behind."""
    with get_client(sync_client=True) as client:
        client.delete_resource_owned_automations(f"prefect.deployment.{sensor.id}")
        client.delete_deployment(sensor.id)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file, or an fsspec URL such as s3://bucket/run.yaml")
    parser.add_argument("--set", "-s", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets")
    parser.add_argument("--cron", help="when to look, in UTC; hourly if this is a new sensor")
    parser.add_argument("--minimum-new-images", type=int, default=1, help="fewer start nothing")
    parser.add_argument(
        "--retrain-from-published", action="store_true", help="measure each new adapter against the published one"
    )
    parser.add_argument("--renew", action="store_true", help="every sensor that is there, as it is")
    parser.add_argument("--remove", metavar="NAME", help="the sensor of the configuration of that name")
    arguments = parser.parse_args()
    if [bool(arguments.config), arguments.renew, bool(arguments.remove)].count(True) != 1:
        parser.error("give a configuration, --renew, or --remove NAME")
    try:
        pipeline, sensors = deployed()
        if arguments.renew:
            entries = [entry(name, sensor.parameters, schedules_of(sensor)) for name, sensor in sensors.items()]
            return deploy(entries, pipeline) if entries else 0
        if arguments.remove:
            if arguments.remove not in sensors:
                there = ", ".join(sensors) or "none"
                raise ConfigError(f"--remove: there is no sensor {arguments.remove!r}; there are: {there}")
            remove(sensors[arguments.remove])
            return 0
        config = load_config(arguments.config, arguments.sets)
        if config.name == BARE:
            raise ConfigError(f"name: a sensor cannot be called {BARE!r}, that deployment is there already")
    except LoralineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    schedules = schedules_of(sensors[config.name]) if config.name in sensors else None
    if arguments.cron:
        schedules = [{"cron": arguments.cron, "timezone": "UTC", "active": True}]
    parameters = {
        "config": config.model_dump(mode="json"),
        "minimum_new_images": arguments.minimum_new_images,
        "retrain_from_published": arguments.retrain_from_published,
    }
    return deploy([entry(config.name, parameters, schedules)], pipeline)


if __name__ == "__main__":
    sys.exit(main())
