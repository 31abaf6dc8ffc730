"""The sensor: looks at the sources, cheaply and on a schedule; starts the pipeline only when there is something new.

One listing (or one look-up of a revision) for each data set, compared with what the store says was downloaded last. A
check that starts nothing says why, in its state.
"""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import State, StateType
from prefect.deployments import run_deployment
from prefect.events import emit_event
from prefect.logging import get_run_logger
from prefect.states import Completed

from flows.dispatch import runs_with
from flows.pinning import pinned
from stages import retrain
from stages.config import Config
from stages.core.fingerprint import digest_of
from stages.pipeline import Node, Pipeline

CHANGED = "loraline.dataset.changed"
MOST_ATTEMPTS = 3  # in a day, of a state that no run gets through with
MOST_RUNS = 100  # of a state that the sources come back to
_ALIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]


@flow(name="watch", flow_run_name="watch {config.name}", persist_result=False)
def watch_flow(
    config: Config,
    minimum_new_images: int = 1,
    pipeline: str = "loraline/pipeline",
    retrain_from_published: bool = False,
) -> State[str]:
    """Starts the pipeline if a source has changed since the last download, or if an earlier run did not get through.

    Args:
        config: the whole run: what a configuration file holds.
        minimum_new_images: with fewer new images than this nothing is started, unless images went or were replaced
            without the data set growing.
        pipeline: the pipeline's deployment, as 'flow/deployment'.
        retrain_from_published: measure the new adapter against the one published last (`train.previous`), so that
            `publish.maximum_regression` can refuse it and `train.warm_start` can start from it.
    """
    opened = pinned(Pipeline.open(config))
    name = opened.config.name
    changes, new_images, other_change = _changes(opened)
    unfinished = not changes and not _is_published(opened)
    if not changes and not unfinished:
        return _skip(f"nothing has changed at the sources: {_sizes(opened)}")
    what = "; ".join(changes) or "nothing has changed, but the adapter of this state was never published"
    if changes and not other_change and new_images < minimum_new_images:
        return _skip(f"{new_images} new images, fewer than {minimum_new_images}: {what}")
    running = _alive(name)
    if running:
        return _skip(f"a run of {name} is under way ({', '.join(running)}); looked at again next time. {what}")
    if retrain_from_published:
        opened = replace(opened, config=retrain.against_published(opened))
    values = opened.config.model_dump(mode="json")
    # The same state starts one run, from however many sensors it is seen; a few, if they end badly.
    sources = [opened.spec(node)["source"] for node in opened.nodes_of("download")]
    keys = [f"watch:{digest_of([values, sources])}:{attempt}" for attempt in range(MOST_RUNS)]
    known = runs_with(keys)
    since = datetime.now(UTC) - timedelta(days=1)
    bad = [run for run in known if run.state and not run.state.is_completed() and run.state.timestamp > since]
    if len(bad) >= MOST_ATTEMPTS:
        return _skip(f"{len(bad)} runs of this very state ended badly within a day: look at them. {what}")
    taken = {run.idempotency_key for run in known}
    free = [key for key in keys if key not in taken]
    if not free:
        return _skip(f"{MOST_RUNS} runs of this very state have ended: start one by hand. {what}")
    get_run_logger().info("changed: %s", what)
    for node in opened.nodes_of("download"):
        state = opened.spec(node)["source"]
        emit_event(
            CHANGED,
            resource={"prefect.resource.id": f"loraline.dataset.{name}.{node.dataset}"},
            payload={"images": state["images"], "revision": state.get("commit") or state["pixels"]},
        )
    run = run_deployment(
        pipeline,
        parameters={"config": values},
        idempotency_key=free[0],
        tags=[f"config:{name}"],
        as_subflow=False,
        timeout=0,
    )
    return Completed(name="Started", message=f"{what}; started {run.name}", data=str(run.id))  # type: ignore[union-attr]


def _changes(pipeline: Pipeline) -> tuple[list[str], int, bool]:
    """What is new at the sources: in words; how many images more; whether there is more to it than new images."""
    changes, new_images, other_change = [], 0, False
    for node in pipeline.nodes_of("download"):
        now, last = pipeline.spec(node), pipeline.last(node)
        if last is None:
            changes.append(f"{node}: never downloaded")
            other_change = True
            continue
        reasons = pipeline.stage("download").explain(last.spec, now)
        grown = int(now["source"]["images"]) - int(last.spec["source"]["images"])
        new_images += max(0, grown)
        other_change = other_change or (bool(reasons) and grown <= 0)
        changes += [f"{node}: {reason}" for reason in reasons]
    return changes, new_images, other_change


def _is_published(pipeline: Pipeline) -> bool:
    """Whether the last publication (or the gate's refusal) is about the data that were downloaded last."""
    published = pipeline.last(Node("publish"))
    if published is None:
        return False
    for node in pipeline.nodes_of("download"):
        downloaded = pipeline.last(node)
        if downloaded is None or published.inputs.get(f"{node.label}.pairs") != downloaded.digest("pairs"):
            return False
    return True


def _skip(reason: str) -> State[str]:
    get_run_logger().info("skipped: %s", reason)
    return Completed(name="Skipped", message=reason, data="")


def _sizes(pipeline: Pipeline) -> str:
    return ", ".join(
        f"{node} {pipeline.spec(node)['source']['images']} images" for node in pipeline.nodes_of("download")
    )


def _alive(name: str) -> list[str]:
    """Names of pipeline runs of that configuration that have not ended."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["loraline"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_ALIVE))),
        )
    # One that a schedule will start some day is not under way.
    begun = [run for run in runs if not (run.auto_scheduled and run.state and run.state.is_scheduled())]
    return [run.name for run in begun if run.parameters.get("config", {}).get("name") == name]
