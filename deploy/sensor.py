"""Trains a configuration again whenever its data change: deploys a sensor for it, `watch/<name of the configuration>`.

    python deploy/sensor.py run.yaml [--set SECTION.KEY=VALUE ...] [--cron "0 3 * * *"]
    python deploy/sensor.py --renew            brings every sensor to the image and sizes that are deployed now
    python deploy/sensor.py --remove NAME      takes the sensor away, and what listens to events for it

What a sensor is stands in deploy/prefect.yaml (`definitions.watch`). It takes the image and the revision of the
deployed pipeline, so deploy/apply.py comes first. May be run again at any time: of a sensor that is there, what is not
given stays as it was, its schedules (asleep or awake) too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowFilter, FlowFilterName
from prefect.client.schemas.objects import ConcurrencyLimitConfig
from prefect.client.schemas.responses import DeploymentResponse
from prefect.client.schemas.schedules import CronSchedule
from prefect.deployments.runner import EntrypointType
from prefect.events import DeploymentEventTrigger
from prefect.exceptions import ObjectNotFound
from prefect.utilities.templating import apply_values
from pydantic import ValidationError
from server import look_for_server

from flows.watch import watch_flow
from stages.config import load_config
from stages.core.errors import ConfigError, LoralineError

HERE = Path(__file__).parent
# The deployment without a configuration of its own: apply.py makes it.
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
            raise ConfigError("there is no deployment loraline/pipeline: run deploy/apply.py first") from None
        sensors = client.read_deployments(flow_filter=FlowFilter(name=FlowFilterName(any_=["watch"])))
    return pipeline, {sensor.name: sensor for sensor in sensors if sensor.name != BARE}


def deploy(
    name: str,
    parameters: dict[str, Any],
    pipeline: DeploymentResponse,
    known: DeploymentResponse | None = None,
    cron: CronSchedule | None = None,
) -> None:
    """Makes or updates a sensor, on the image and revision of the pipeline.

    Not by `prefect deploy`, which would fill in whatever looks like a placeholder of its own (`{{ $HOME }}`) in the
    configuration's prompts and file names.

    Args:
        name: the configuration's name.
        parameters: of its runs.
        pipeline: the deployment of the pipeline.
        known: the sensor that is there already; it keeps its schedules.
        cron: in the place of its schedules, or of those of prefect.yaml.
    """
    text = json.dumps(yaml.safe_load((HERE / "prefect.yaml").read_text(encoding="utf-8"))["definitions"]["watch"])
    os.environ["LORALINE_IMAGE"] = (pipeline.job_variables or {}).get("image") or "none"
    os.environ["LORALINE_REVISION"] = pipeline.version or "unknown"
    definition = apply_values(json.loads(text.replace("NAME", name)), {})
    made = watch_flow.to_deployment(
        definition["name"],
        parameters=parameters,
        version=definition["version"],
        tags=definition["tags"],
        description=definition["description"],
        concurrency_limit=ConcurrencyLimitConfig(**definition["concurrency_limit"]),
        triggers=[DeploymentEventTrigger(**trigger) for trigger in definition["triggers"]],
        work_pool_name=definition["work_pool"]["name"],
        job_variables=definition["work_pool"]["job_variables"],
        entrypoint_type=EntrypointType.MODULE_PATH,
    )
    if known is None:
        schedules = [cron.model_dump(include={"cron", "timezone"})] if cron else definition["schedules"]
        made.apply(schedules=[{"active": one.pop("active", True), "schedule": one} for one in schedules])
    else:
        # What is unset is not sent, and stays. Sent back, schedules would lose some of their fields on the server.
        made.model_fields_set.difference_update({"schedules", "paused"})
        made.apply()
        if cron:
            with get_client(sync_client=True) as client:
                client.create_deployment_schedules(known.id, [(cron, True)])
                for schedule in known.schedules:
                    client.delete_deployment_schedule(known.id, schedule.id)
    print(f"the sensor watch/{name} is deployed")


def renew() -> None:
    """Brings every sensor to the image, sizes and revision that are deployed now, and leaves all else as it is."""
    pipeline, sensors = deployed()
    for name, sensor in sensors.items():
        deploy(name, sensor.parameters, pipeline, sensor)


def remove(sensor: DeploymentResponse) -> None:
    """Takes a sensor away. Deleting the deployment alone would leave its trigger behind."""
    with get_client(sync_client=True) as client:
        client.delete_resource_owned_automations(f"prefect.deployment.{sensor.id}")
        client.delete_deployment(sensor.id)


def _cron(text: str) -> CronSchedule:
    try:
        return CronSchedule(cron=text, timezone="UTC")
    except ValidationError:
        raise ConfigError(
            f"--cron: {text!r} is no schedule; one is minute, hour, day, month, weekday, such as '5 4 * * *'"
        ) from None


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", nargs="?", help="a YAML file, or an fsspec URL such as s3://bucket/run.yaml")
    parser.add_argument("--set", "-s", action="append", default=[], metavar="SECTION.KEY=VALUE", dest="sets")
    parser.add_argument("--cron", help="when to look, in UTC; hourly if this is a new sensor")
    parser.add_argument("--minimum-new-images", type=int, metavar="N", help="fewer start nothing; 1 if not said")
    parser.add_argument(
        "--retrain-from-published",
        action=argparse.BooleanOptionalAction,
        help="measure each new adapter against the published one, or no longer",
    )
    parser.add_argument("--renew", action="store_true", help="every sensor that is there, as it is")
    parser.add_argument("--remove", metavar="NAME", help="the sensor of the configuration of that name")
    arguments = parser.parse_args()
    if [bool(arguments.config), arguments.renew, bool(arguments.remove)].count(True) != 1:
        parser.error("give a configuration, --renew, or --remove NAME")
    look_for_server(parser)
    try:
        if arguments.renew:
            renew()
            return 0
        pipeline, sensors = deployed()
        if arguments.remove:
            if arguments.remove not in sensors:
                there = ", ".join(sensors) or "none"
                raise ConfigError(f"--remove: there is no sensor {arguments.remove!r}; there are: {there}")
            remove(sensors[arguments.remove])
            return 0
        config = load_config(arguments.config, arguments.sets)
        if config.name == BARE:
            raise ConfigError(f"name: a sensor cannot be called {BARE!r}, that deployment is there already")
        cron = None if arguments.cron is None else _cron(arguments.cron)
    except LoralineError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    known = sensors.get(config.name)
    parameters = {**(known.parameters if known else {}), "config": config.model_dump(mode="json")}
    for option in ("minimum_new_images", "retrain_from_published"):
        if (value := getattr(arguments, option)) is not None:
            parameters[option] = value
    deploy(config.name, parameters, pipeline, known, cron)
    return 0


if __name__ == "__main__":
    sys.exit(main())
