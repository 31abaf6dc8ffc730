"""Which runs a pipeline starts, joins, begins again and cancels: a real Prefect server, and no worker."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any
from uuid import UUID

import httpx
import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun
from prefect.deployments.runner import EntrypointType
from prefect.states import Cancelled, Cancelling, Completed, Crashed, Running, State

from flows import dispatch
from flows.stage import stage_flow
from stages.core.errors import LoralineError, PreemptedError, TransientError
from stages.core.events import Recorder
from stages.pipeline import Node
from tests.servers.prefect import prefect_in_this_process

pytestmark = pytest.mark.slow
NODE, DEPLOYMENT = Node("train"), "stage/train"


@pytest.fixture(scope="module", autouse=True)
def _server() -> Iterator[None]:
    with prefect_in_this_process():
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
    dispatch.start_over()
    monkeypatch.setattr(dispatch, "POLL_S", 0.2)
    return lambda name: monkeypatch.setattr(dispatch, "_pipeline_tag", lambda: f"pipeline:{name}")


def start(config: dict[str, Any], force: bool = False) -> tuple[UUID, bool]:
    """A run's id, and whether it is this pipeline's own."""
    run = dispatch._start(NODE, "f" * 64, config, {}, DEPLOYMENT, None, force)
    return run.id, run.ours


def put(run_id: UUID, state: State[Any]) -> None:
    with get_client(sync_client=True) as client:
        client.set_flow_run_state(run_id, state, force=True)


def read(run_id: UUID) -> FlowRun:
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run_id)


class Dispatched:
    """`dispatch` in a thread."""

    def __init__(self, config: dict[str, Any]) -> None:
        self.recorder, self.outcome = Recorder(), list[Any]()
        self._thread = threading.Thread(target=self._run, args=(config,), daemon=True)
        self._thread.start()

    def _run(self, config: dict[str, Any]) -> None:
        try:
            self.outcome.append(dispatch.dispatch(NODE, "f" * 64, config, {}, self.recorder, DEPLOYMENT))
        except LoralineError as error:
            self.outcome.append(error)

    def until_it_says(self, text: str, times: int = 1) -> None:
        said = lambda: [event for event in self.recorder.events if text in getattr(event, "text", "")]  # noqa: E731
        for _ in range(300):
            if len(said()) >= times:
                return
            self._thread.join(0.1)
        raise AssertionError(f"not said {times} times: {text}; but: {self.recorder.events}, {self.outcome}")

    def end(self) -> Any:
        """What it returned or raised."""
        self._thread.join(60)
        (found,) = self.outcome
        return found


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


def test_nothing_is_started_once_the_pipeline_is_leaving(
    config: dict[str, Any], pipeline: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipeline("one")
    monkeypatch.setattr(dispatch, "is_leaving", lambda: True)
    with pytest.raises(PreemptedError):
        start(config)
    assert runs_of(config) == []


def test_a_run_that_was_on_its_way_to_the_server_is_cancelled_too(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("one")
    dispatch.cancel_all()
    with pytest.raises(PreemptedError, match=dispatch.CANCELLED):
        start(config)
    (run,) = runs_of(config)
    assert run.state.type.value in ("CANCELLING", "CANCELLED")


def test_a_joined_run_that_broke_off_is_started_anew(config: dict[str, Any], pipeline: Any) -> None:
    pipeline("other")
    theirs, _ = start(config)
    pipeline("one")
    dispatched = Dispatched(config)
    dispatched.until_it_says("joins a run of another pipeline")
    put(theirs, Cancelled(message="with its own pipeline"))
    dispatched.until_it_says("runs through its own deployment")
    (own,) = [run for run in runs_of(config) if run.id != theirs]
    put(own.id, Completed(message=f"done (artifact {'f' * 64})"))
    assert dispatched.end() == "f" * 64


@pytest.mark.parametrize(
    ("before", "end"),
    [(Cancelling(), Cancelled()), (Running(), Crashed(message="no sign of life"))],
    ids=["cancelled with the pipeline", "its machine died"],
)
def test_a_retried_pipeline_outlives_the_end_of_what_it_started_before(
    config: dict[str, Any], pipeline: Any, before: State[Any], end: State[Any]
) -> None:
    pipeline("one")
    earlier, _ = start(config)
    put(earlier, Running())
    put(earlier, before)
    dispatched = Dispatched(config)
    dispatched.until_it_says("runs through its own deployment")
    put(earlier, end)
    dispatched.until_it_says("runs through its own deployment", times=2)
    (own,) = [run for run in runs_of(config) if run.id != earlier]
    put(own.id, Completed(message=f"done (artifact {'f' * 64})"))
    assert dispatched.end() == "f" * 64


def runs_of(config: dict[str, Any]) -> list[FlowRun]:
    with get_client(sync_client=True) as client:
        found = client.read_flow_runs(
            flow_run_filter=FlowRunFilter(tags=FlowRunFilterTags(all_=[f"config:{config['name']}"]))
        )
    return list(found)


@pytest.mark.parametrize(
    ("state", "found", "again"),
    [(Crashed(message="exit code 137"), False, True), (Cancelled(), False, False), (Cancelled(), True, False)],
)
def test_a_crash_is_worth_another_try_and_what_a_person_cancelled_is_not(
    config: dict[str, Any], pipeline: Any, state: State[Any], found: bool, again: bool
) -> None:
    pipeline("one")
    if found:
        start(config)
    dispatched = Dispatched(config)
    dispatched.until_it_says("runs through its own deployment")
    (run,) = dispatch._ours
    put(run, state)
    outcome = dispatched.end()
    assert isinstance(outcome, TransientError) is again
    assert isinstance(outcome, LoralineError)
    assert not dispatch._ours, "an ended run is not cancelled"


def answering(code: int) -> Callable[[], None]:
    """A call of a server that answers with an error."""

    def call() -> None:
        request = httpx.Request("GET", "http://127.0.0.1/api")
        httpx.Response(code, request=request).raise_for_status()

    return call


def test_a_server_that_says_no_is_not_asked_again() -> None:
    with pytest.raises(httpx.HTTPStatusError, match="403"):
        dispatch._read(answering(403))


def test_a_server_that_is_away_is_waited_for_but_not_for_ever(pipeline: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = iter([answering(503), answering(429), lambda: "here"])
    assert dispatch._read(lambda: next(answers)()) == "here"
    monkeypatch.setattr(dispatch, "AWAY_S", 0.5)
    with pytest.raises(TransientError, match="has been away"):
        dispatch._read(answering(503))
    monkeypatch.setattr(dispatch, "is_leaving", lambda: True)
    with pytest.raises(PreemptedError):
        dispatch._read(answering(503))
