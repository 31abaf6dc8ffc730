"""Which runs a pipeline starts, joins, begins again and cancels: a real Prefect server, and no worker."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from typing import Any
from uuid import UUID

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import EntrypointType
from prefect.states import Cancelled, Completed, Crashed, Running, State
from prefect.testing.utilities import prefect_test_harness

from flows import dispatch
from flows.stage import stage_flow
from stages.core.errors import LoralineError, TransientError
from stages.core.events import Recorder
from stages.pipeline import Node

pytestmark = pytest.mark.slow
NODE, DEPLOYMENT = Node("train"), "stage/train"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_test_harness(server_startup_timeout=180):
        with get_client(sync_client=True) as client:
            from prefect.client.schemas.actions import WorkPoolCreate

            client.create_work_pool(WorkPoolCreate(name="gpu", type="process"))
        stage_flow.to_deployment("train", work_pool_name="gpu", entrypoint_type=EntrypointType.MODULE_PATH).apply()
        yield


@pytest.fixture
def config(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    name = tmp_path_factory.mktemp("store").name
    return {
        "name": name.replace("_", "-"),
        "store": {"url": f"s3://bucket/{name}"},
        "model": {"pretrained_model_name_or_path": "someone/model"},
        "datasets": [{"id": "a", "source": {"type": "hub", "repo": "someone/data"}}],
        "publish": {"target": "hub", "repo": "someone/lora"},
    }


@pytest.fixture
def pipeline(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Says in whose name runs are started from here on."""
    monkeypatch.setattr(dispatch, "_ours", set())
    monkeypatch.setattr(dispatch, "POLL_S", 0.2)
    return lambda name: monkeypatch.setattr(dispatch, "_pipeline_tag", lambda: f"pipeline:{name}")


def start(config: dict[str, Any], force: bool = False) -> tuple[UUID, bool]:
    return dispatch._start(NODE, "f" * 64, config, {}, DEPLOYMENT, None, force)


def put(run_id: UUID, state: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, state, force=True)


def read(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


def dispatched(config: dict[str, Any]) -> tuple[threading.Thread, list[Any]]:
    """`dispatch` in a thread; its result or its error comes into the list."""
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(dispatch.dispatch(NODE, "f" * 64, config, {}, Recorder(), DEPLOYMENT))
        except LoralineError as error:
            outcome.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread, outcome


def test_one_starts_a_run_and_another_joins_it(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("one")
    run, ours = start(config)
    assert ours
    pipeline("two")
    assert start(config) == (run, False)
    pipeline("one")
    assert start(config) == (run, True), "retried, it still knows its own"


def test_stores_of_the_same_name_on_two_services_share_nothing(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("one")
    there = {**config, "store": {**config["store"], "endpoint_url": "https://other.example"}}
    assert start(config)[0] != start(there)[0]


def test_only_what_this_pipeline_started_is_cancelled_with_it(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("other")
    theirs, _ = start(config)
    pipeline("one")
    dispatch._ours.clear()
    start(config)
    mine, _ = start(config, force=True)
    put(mine, Running())
    dispatch.cancel_all()
    assert (read(mine).state.type.value, read(mine).state.message) == ("CANCELLING", dispatch.CANCELLED)
    assert read(theirs).state.type.value == "SCHEDULED"


def test_a_forced_run_is_forced_once_by_the_same_pipeline(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("one")
    run, _ = start(config, force=True)
    assert start(config, force=True)[0] == run, "evicted, it joins its own"
    put(run, Completed())
    assert start(config, force=True)[0] == run, "retried, it is content"
    pipeline("two")
    assert start(config, force=True)[0] != run


def test_a_joined_run_that_broke_off_is_started_anew(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("other")
    theirs, _ = start(config)
    pipeline("one")
    thread, outcome = dispatched(config)
    put(theirs, Cancelled(message="with its own pipeline"))
    for _ in range(300):
        own = list(dispatch.runs_with([dispatched_key(theirs, 1)]))
        if own:
            break
        thread.join(0.1)
    put(own[0].id, Completed(message=f"done (artifact {'f' * 64})"))
    thread.join(60)
    assert outcome == ["f" * 64]


def dispatched_key(first: UUID, attempt: int) -> str:
    key = read(first).idempotency_key
    assert key is not None
    return f"{key.rpartition(':')[0]}:{attempt}"


@pytest.mark.parametrize(("state", "again"), [(Crashed(message="exit code 137"), True), (Cancelled(), False)])
def test_a_crash_is_worth_another_try_and_what_a_person_cancelled_is_not(
    config: dict[str, Any], pipeline: Any, state: State[Any], again: bool
) -> None:
    pipeline("one")
    thread, outcome = dispatched(config)
    for _ in range(300):
        if dispatch._ours:
            break
        thread.join(0.1)
    (run,) = dispatch._ours
    put(run, state)
    thread.join(60)
    assert isinstance(outcome[0], TransientError) is again
    assert isinstance(outcome[0], LoralineError)
    assert not dispatch._ours, "an ended run is not cancelled"
