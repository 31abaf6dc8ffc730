"""deploy/automations.yaml on a real server, with real workers that are killed."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from stages.registry import STAGES
from tests.deploy.rendering import FILES, ROOT, template
from tests.deploy.site import Site, applied
from tests.servers.prefect import kill_trees

pytestmark = pytest.mark.timeout(900)
FILE = ROOT / "deploy" / "automations.yaml"
SCRIPT = str(ROOT / "deploy" / "automations.py")
LOST, UNBEGUN, CANCELLED = (entry["name"] for entry in yaml.safe_load(FILE.read_text(encoding="utf-8"))["automations"])


def automation(name: str) -> dict[str, Any]:
    entries = yaml.safe_load(FILE.read_text(encoding="utf-8"))["automations"]
    return next(entry for entry in entries if entry["name"] == name)


@pytest.mark.parametrize("name", FILES)
def test_three_signs_of_life_of_every_run_may_be_lost(name: str) -> None:
    environment = template(name)["variables"]["properties"]["env"]["default"]
    assert 4 * int(environment["PREFECT_FLOWS_HEARTBEAT_FREQUENCY"]) <= automation(LOST)["trigger"]["within"]


def test_every_deployment_has_the_tag_that_is_looked_at() -> None:
    tree = yaml.safe_load((ROOT / "deploy" / "prefect.yaml").read_text(encoding="utf-8"))
    entries = [*tree["deployments"], tree["definitions"]["watch"]]
    assert len(entries) == len(STAGES) + 3
    for entry in entries:
        assert "loraline" in entry["tags"], entry["name"]


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    with applied(tmp_path_factory.mktemp("prefect")) as made:
        yield made


@pytest.fixture(scope="module")
def sleepers(site: Site) -> dict[str, str]:
    """A deployment of the sleeping flow on each pool; their ids."""
    code = (
        "from prefect.deployments.runner import EntrypointType\n"
        "from tests.deploy.sleeper import sleep_flow\n"
        "for pool in ('cpu', 'gpu'):\n"
        "    made = sleep_flow.to_deployment(pool, work_pool_name=pool, tags=['loraline'],\n"
        "                                    entrypoint_type=EntrypointType.MODULE_PATH)\n"
        "    print(pool, made.apply(work_pool_name=pool))\n"
    )
    printed = site.command([sys.executable, "-c", code])
    return dict(line.split() for line in printed.splitlines())


@pytest.mark.slow
@pytest.mark.kill
@pytest.mark.deployments
def test_a_run_whose_machine_is_gone_crashes_and_those_beside_it_do_not(site: Site, sleepers: dict[str, str]) -> None:
    where = {"PYTHONPATH": str(ROOT)}
    with site.server.worker("cpu", where) as doomed, site.server.worker("gpu", where):
        lost = site.start(sleepers["cpu"], {"seconds": 600})
        healthy = site.start(sleepers["gpu"], {"seconds": 200})
        done = site.start(sleepers["gpu"], {"seconds": 0})
        for run in (lost, healthy):
            site.wait_for(run, {"RUNNING"}, 90)
        assert site.wait_for(done, {"COMPLETED"}, 90)["name"] == "Skipped"
        time.sleep(3)
        kill_trees(doomed)
        killed = time.monotonic()
        state = site.wait_for(lost, {"CRASHED"}, 150)
        print(f"crashed {time.monotonic() - killed:.0f} s after it was killed")
        assert "No sign of life" in state["message"]
        assert site.state(healthy)["type"] == "RUNNING"
        # Its last sign of life is older than that of the lost one, and its state's name is none of Prefect's.
        assert site.state(done)["name"] == "Skipped"
        assert site.wait_for(healthy, {"COMPLETED"}, 200)["name"] == "Skipped"


@pytest.mark.slow
@pytest.mark.deployments
def test_a_run_that_never_begins_crashes_and_a_cancelled_one_ends(
    site: Site, sleepers: dict[str, str], tmp_path: Path
) -> None:
    """With ten seconds in the place of an hour and of six minutes; the states are those that dead workers leave."""
    tree = yaml.safe_load(FILE.read_text(encoding="utf-8"))
    for entry in tree["automations"]:
        if entry["name"] != LOST:
            entry["trigger"]["within"] = 10
    hasty = tmp_path / "hasty.yaml"
    hasty.write_text(yaml.safe_dump(tree), encoding="utf-8")
    before = site.automations()
    try:
        printed = site.command([sys.executable, SCRIPT, str(hasty)]).splitlines()
        assert [line.rpartition(" ")[2] for line in printed] == ["unchanged", "updated", "updated"]
        time.sleep(2)  # the server reads them anew
        taken, waiting = (site.start(sleepers["cpu"], {"seconds": 0}) for _ in range(2))
        site.set_state(taken, "PENDING")
        stuck = site.start(sleepers["cpu"], {"seconds": 0})
        for kind in ("PENDING", "RUNNING", "CANCELLING"):
            site.set_state(stuck, kind)
        assert "has not begun" in site.wait_for(taken, {"CRASHED"}, 60)["message"]
        assert "nobody was left" in site.wait_for(stuck, {"CANCELLED"}, 60)["message"]
        assert site.state(waiting)["type"] == "SCHEDULED", "one that no worker has taken yet only waits"
    finally:
        site.command([sys.executable, SCRIPT])
    after = site.automations()
    assert {name: after[name]["id"] for name in before} == {name: before[name]["id"] for name in before}
    assert after[UNBEGUN]["trigger"]["within"] == 3600
    assert after[CANCELLED]["trigger"]["within"] == 360


@pytest.mark.slow
@pytest.mark.deployments
def test_one_that_was_switched_off_stays_off(site: Site) -> None:
    made = site.automations()[CANCELLED]["id"]
    prefect = [sys.executable, "-m", "prefect", "automation"]
    site.command([*prefect, "pause", "--id", made])
    try:
        site.command([sys.executable, SCRIPT])
        assert site.automations()[CANCELLED]["enabled"] is False
    finally:
        site.command([*prefect, "resume", "--id", made])
    assert site.automations()[CANCELLED]["enabled"] is True
