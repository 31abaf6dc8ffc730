"""`deploy/apply.py process` and `deploy/sensor.py` on a real server: all is there once, repetition loses nothing."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest

from stages.registry import STAGES
from tests.deploy.rendering import ROOT
from tests.deploy.site import APPLY, Site, applied
from tests.pictures import draw_pictures, small_config

pytestmark = [pytest.mark.slow, pytest.mark.deployments, pytest.mark.timeout(900)]
SENSOR = [sys.executable, str(ROOT / "deploy" / "sensor.py")]
PREFECT = [sys.executable, "-m", "prefect", "--no-prompt"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with applied(tmp_path_factory.mktemp("prefect")) as made:
        yield made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("data")


def configuration(folder: Path, name: str) -> Path:
    images = folder / "images"
    if not images.exists():
        draw_pictures(images, 8)
    path = folder / f"{name}.yaml"
    config = small_config(folder, images, name=name, flow={"executor": "deployment"})
    path.write_text(config.model_dump_json(), encoding="utf-8")
    return path


def test_everything_is_there_once_however_often_it_is_applied(site: Site) -> None:
    before = site.automations()
    site.apply(gpus=2, LORALINE_REVISION="abc123")
    found = site.deployments()
    assert {*(stage.name for stage in STAGES), "pipeline", "watch"} <= set(found)
    assert len(site.post("deployments/filter")) == len(found)
    assert {entry["version"] for entry in found.values()} == {"abc123"}
    assert found["train"]["work_pool_name"] == "gpu"
    assert found["train"]["pull_steps"] in ([], None)
    assert found["train"]["job_variables"]["memory"] == "64G"
    assert "config" in found["pipeline"]["parameter_openapi_schema"]["properties"]
    pools = site.post("work_pools/filter")
    assert sorted((pool["name"], pool["type"], pool["concurrency_limit"]) for pool in pools) == [
        ("cpu", "process", None),
        ("gpu", "process", 2),
    ]
    assert {name: entry["id"] for name, entry in site.automations().items()} == {
        name: entry["id"] for name, entry in before.items()
    }
    assert len(before) == 3


def test_a_pool_of_another_kind_is_not_turned_into_this_one(site: Site) -> None:
    with pytest.raises(AssertionError, match=r"'cpu' is there already, of type process.*work-pool delete cpu"):
        site.command([*APPLY[:-1], "docker"], {"LORALINE_IMAGE": "registry.example/loraline:1"})
    before = site.post("work_pools/filter")
    with pytest.raises(AssertionError, match="'gpu' is there already"):
        site.command([*APPLY, "7", "--gpu-kind", "docker"], {"LORALINE_IMAGE": "registry.example/loraline:1"})
    assert {pool["updated"] for pool in site.post("work_pools/filter")} == {pool["updated"] for pool in before}


@pytest.mark.parametrize(
    ("script", "url", "complaint"),
    [
        ("apply.py process", "", "PREFECT_API_URL is not set"),
        ("apply.py process", "http://127.0.0.1:9/api", "no Prefect server answers at PREFECT_API_URL="),
        ("sensor.py --renew", "", "PREFECT_API_URL is not set"),
        ("automations.py", "", "PREFECT_API_URL is not set"),
    ],
)
def test_without_a_server_nothing_is_begun(script: str, url: str, complaint: str, tmp_path: Path) -> None:
    environment = {**os.environ, "PREFECT_HOME": str(tmp_path), "PREFECT_API_URL": url}
    name, *arguments = script.split()
    answer = subprocess.run(
        [sys.executable, str(ROOT / "deploy" / name), *arguments], env=environment, capture_output=True, text=True
    )
    assert (answer.returncode, complaint in answer.stderr) == (2, True), answer.stderr
    assert "Traceback" not in answer.stderr
    assert not list(tmp_path.glob("*.db")), "a server of its own was started"


def test_a_limit_of_no_gpu_is_refused(site: Site) -> None:
    with pytest.raises(AssertionError, match="GPUS: at least 1"):
        site.command([*APPLY, "0"])


def test_a_sensor_keeps_its_configuration_and_its_schedule_when_all_is_applied_again(site: Site, folder: Path) -> None:
    path = configuration(folder, "kept")
    site.command([*SENSOR, str(path), "--cron", "5 4 * * *", "--minimum-new-images", "7", "--retrain-from-published"])
    made = site.deployments()["kept"]
    assert made["parameters"]["config"] == json.loads(path.read_text())
    assert made["parameters"]["minimum_new_images"] == 7
    assert made["parameters"]["retrain_from_published"] is True
    assert (made["work_pool_name"], made["version"]) == ("cpu", site.deployments()["pipeline"]["version"])
    (schedule,) = made["schedules"]
    assert (schedule["schedule"]["cron"], schedule["active"]) == ("5 4 * * *", True)

    site.command([*PREFECT, "deployment", "schedule", "pause", "watch/kept", schedule["id"]])
    site.apply(LORALINE_REVISION="newer", LORALINE_IMAGE="registry.example/loraline:2")
    again = site.deployments()["kept"]
    assert (again["id"], again["version"]) == (made["id"], "newer")
    assert again["job_variables"]["image"] == "registry.example/loraline:2"
    assert again["parameters"] == made["parameters"]
    (asleep,) = again["schedules"]
    assert (asleep["schedule"], asleep["active"]) == (schedule["schedule"], False)

    # Another configuration for the same sensor changes nothing else, and does not wake it; a new time does.
    site.command([*SENSOR, str(path), "--set", "seed=5"])
    changed = site.deployments()["kept"]
    assert changed["parameters"]["config"]["seed"] == 5
    assert {**changed["parameters"], "config": made["parameters"]["config"]} == made["parameters"]
    assert changed["schedules"][0]["active"] is False
    site.command([*SENSOR, str(path), "--cron", "6 4 * * *", "--no-retrain-from-published"])
    awakened = site.deployments()["kept"]
    assert awakened["parameters"]["minimum_new_images"] == 7
    assert awakened["parameters"]["retrain_from_published"] is False
    (awake,) = awakened["schedules"]
    assert (awake["schedule"]["cron"], awake["active"]) == ("6 4 * * *", True)


def test_a_sensor_keeps_all_that_its_schedules_say(site: Site, folder: Path) -> None:
    path = configuration(folder, "weekly")
    site.command([*SENSOR, str(path)])
    sensor = site.deployments()["weekly"]["id"]
    weekly = {
        "schedule": {"rrule": "FREQ=WEEKLY;BYDAY=MO", "timezone": "Europe/Vienna"},
        "active": True,
        "max_scheduled_runs": 2,
        "parameters": {"minimum_new_images": 50},
        "slug": "mondays",
    }
    site.post(f"deployments/{sensor}/schedules", [weekly])

    def schedules() -> list[dict[str, Any]]:
        kept = ("schedule", "active", "max_scheduled_runs", "parameters", "slug")
        found = site.deployments()["weekly"]["schedules"]
        return sorted(({key: one[key] for key in kept} for one in found), key=lambda one: str(one["slug"]))

    before = schedules()
    assert {**before[1], "schedule": before[1]["schedule"]["timezone"]} == {**weekly, "schedule": "Europe/Vienna"}
    site.command([*SENSOR, "--renew"])
    assert schedules() == before
    site.command([*SENSOR, str(path), "--set", "seed=5"])
    assert schedules() == before
    site.command([*SENSOR, str(path), "--cron", "6 4 * * *"])
    (only,) = schedules()
    assert only["schedule"]["cron"] == "6 4 * * *"


def test_what_looks_like_a_placeholder_in_a_configuration_is_left_alone(site: Site, folder: Path) -> None:
    path = folder / "literal.yaml"
    config = json.loads(configuration(folder, "plain").read_text())
    prompt = "a {{ sign }} that says {{ $HOME }}, and {{ prefect.variables.none }}"
    config.update(name="literal")
    config["validation"]["prompts"] = [prompt]
    path.write_text(json.dumps(config), encoding="utf-8")
    for command in ([str(path)], ["--renew"]):
        site.command([*SENSOR, *command])
        kept = site.deployments()["literal"]["parameters"]["config"]
        assert kept["validation"]["prompts"] == [prompt]


def test_a_wrong_schedule_is_refused_before_anything_is_changed(site: Site, folder: Path) -> None:
    path = configuration(folder, "wrong")
    site.command([*SENSOR, str(path), "--cron", "5 4 * * *"])
    before = site.deployments()["wrong"]
    with pytest.raises(AssertionError, match=r"--cron: '0 3 \* \*' is no schedule"):
        site.command([*SENSOR, str(path), "--cron", "0 3 * *", "--set", "seed=5"])
    assert site.deployments()["wrong"] == before


def test_a_sensor_needs_a_name_of_its_own(site: Site, folder: Path) -> None:
    with pytest.raises(AssertionError, match="cannot be called 'watch'"):
        site.command([*SENSOR, str(configuration(folder, "watch"))])


def test_a_sensor_that_is_removed_takes_its_trigger_along(site: Site, folder: Path) -> None:
    site.command([*SENSOR, str(configuration(folder, "gone"))])
    trigger = "loraline: gone, a source has changed"
    assert trigger in site.automations()
    site.command([*SENSOR, "--remove", "gone"])
    assert "gone" not in site.deployments()
    assert trigger not in site.automations()
    with pytest.raises(AssertionError, match="there is no sensor 'gone'"):
        site.command([*SENSOR, "--remove", "gone"])


def test_a_second_check_is_cancelled_while_the_first_is_under_way(site: Site, folder: Path) -> None:
    site.command([*SENSOR, str(configuration(folder, "single"))])
    watch = site.deployments()["single"]["id"]
    first, second = site.start(watch, {}), site.start(watch, {})
    site.set_state(first, "PENDING")
    site.post(f"flow_runs/{second}/set_state", {"state": {"type": "PENDING", "name": "Pending"}})
    assert site.state(first)["type"] == "PENDING"
    assert site.state(second)["type"] == "CANCELLED"


def tell(site: Site, resource: str, event: str = "loraline.source.changed") -> None:
    """Any event about any resource."""
    now = datetime.now(UTC).isoformat()
    site.post(
        "events", [{"event": event, "resource": {"prefect.resource.id": resource}, "occurred": now, "id": str(uuid4())}]
    )


def tell_as_the_guide_says(site: Site, name: str) -> None:
    """The `curl` of deploy/README.md, word for word but for the name."""
    guide = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^    (curl --fail .*?)\n\n", guide, re.DOTALL | re.MULTILINE)
    answer = subprocess.run(
        ["sh", "-c", command.replace("source.NAME", f"source.{name}")],
        env={**site.environment, "PREFECT_API_AUTH_STRING": "nobody:asks"},
        capture_output=True,
        text=True,
    )
    assert answer.returncode == 0, answer.stdout + answer.stderr


def wait_for_runs(site: Site, deployment: str, count: int, seconds: float) -> list[dict[str, Any]]:
    deadline = time.monotonic() + seconds
    while len(runs := site.runs_of(deployment)) < count:
        assert time.monotonic() < deadline, f"{len(runs)} runs after {seconds:.0f} s"
        time.sleep(0.5)
    return runs


def test_an_event_starts_one_check_of_the_configuration_that_it_names(site: Site, folder: Path) -> None:
    for name in ("cats", "cats-and-dogs"):
        site.command([*SENSOR, str(configuration(folder, name))])
    cats, dogs = (site.deployments()[name]["id"] for name in ("cats", "cats-and-dogs"))
    with site.server.worker("cpu", {}):
        time.sleep(2)  # the server reads its automations anew
        # Foreign ones first: events are judged in their order, so whatever they start is there before the last run is.
        tell(site, "loraline.source.mice")
        tell(site, "somebody.elses.source")
        tell(site, "loraline.source.cats", event="loraline.dataset.changed")
        tell_as_the_guide_says(site, "cats")
        for _ in range(5):  # files of one upload
            tell(site, "loraline.source.cats.photos")
        (run,) = wait_for_runs(site, cats, 1, 30)
        assert run["parameters"]["config"] == json.loads((folder / "cats.yaml").read_text())
        state = site.wait_for(run["id"], {"COMPLETED"}, 120)
        assert (state["name"], "never downloaded" in state["message"]) == ("Started", True), state
    assert len(site.runs_of(cats)) == 1, "a burst of events is one check"
    assert site.runs_of(dogs) == []
