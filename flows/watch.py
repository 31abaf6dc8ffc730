"""The sensor: looks at the sources, cheaply and on a schedule; starts the pipeline only when there is something new.

One listing (or one look-up of a revision) for each data set, compared with what the store says was downloaded last. A
check that starts nothing says why, in its state.
"""

from __future__ import annotations

from typing import Any

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

from stages.config import Config
from stages.core.fingerprint import digest_of
from stages.pipeline import Node, Pipeline

CHANGED = "loraline.dataset.changed"
_ALIVE = [StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING, StateType.CANCELLING, StateType.PAUSED]


@flow(name="watch", flow_run_name="watch {config[name]}", persist_result=False)
def watch_flow(
    config: dict[str, Any],
    minimum_new_images: int = 1,
    pipeline: str = "loraline/pipeline",
    retrain_from_published: bool = False,
) -> State[str]:
    """Starts the pipeline if a source has changed since the last download.

    Args:
        config: a configuration as plain values (see `loraline schema`).
        minimum_new_images: with fewer new images than this (and no other change than new images), nothing is started.
        pipeline: the pipeline's deployment, as 'flow/deployment'.
        retrain_from_published: measure the new adapter against the one published last (`train.previous`), so that
            `publish.maximum_regression` can refuse it and `train.warm_start` can start from it.
    """
    logger = get_run_logger()
    opened = Pipeline.open(Config.model_validate(config))
    changes, new_images, other_change = [], 0, False
    states: dict[str, Any] = {}
    for node in opened.nodes_of("download"):
        now = opened.spec(node)
        last = opened.last(node)
        states[node.label] = now["source"]
        if last is None:
            changes.append(f"{node}: never downloaded")
            other_change = True
            continue
        reasons = opened.stage("download").explain(last.spec, now)
        if not reasons:
            continue
        grown = int(now["source"]["images"]) - int(last.spec["source"]["images"])
        new_images += max(0, grown)
        other_change = other_change or grown <= 0
        changes += [f"{node}: {reason}" for reason in reasons]
    what = "; ".join(changes)
    if not changes:
        return _skip(f"nothing has changed: {_sizes(states)}")
    if not other_change and new_images < minimum_new_images:
        return _skip(f"{new_images} new images, fewer than {minimum_new_images}: {what}")
    running = _alive(opened.config.name)
    if running:
        return _skip(
            f"a run of this configuration is under way ({', '.join(running)}); it is looked at again next time. {what}"
        )
    logger.info("changed: %s", what)
    for node, state in zip(opened.nodes_of("download"), states.values(), strict=True):
        emit_event(
            CHANGED,
            resource={"prefect.resource.id": f"loraline.dataset.{opened.config.name}.{node.dataset}"},
            payload={"images": state["images"], "revision": state.get("commit") or state["pixels"]},
        )
    run = run_deployment(
        pipeline,
        parameters={"config": pinned(config, states, opened.published() if retrain_from_published else None)},
        # The same change starts one run, however often and from however many sensors it is seen.
        idempotency_key=f"watch:{opened.config.name}:{digest_of([config, states])}",
        tags=[f"config:{opened.config.name}"],
        as_subflow=False,
        timeout=0,
    )
    return Completed(name="Started", message=f"{what}; started {run.name}", data=str(run.id))  # type: ignore[union-attr]


def pinned(config: dict[str, Any], states: dict[str, Any], previous: str | None = None) -> dict[str, Any]:
    """The configuration with every Hub data set at the commit that was seen, so that the run is about exactly that; and
    with the train artifact that it is measured against, where there is one."""
    datasets = []
    for dataset in config["datasets"]:
        commit = states[Node("download", dataset["id"]).label].get("commit")
        source = {**dataset["source"], "revision": commit} if commit else dataset["source"]
        datasets.append({**dataset, "source": source})
    train = {"train": {**config.get("train", {}), "previous": previous}} if previous else {}
    return {**config, "datasets": datasets, **train}


def _skip(reason: str) -> State[str]:
    get_run_logger().info("skipped: %s", reason)
    return Completed(name="Skipped", message=reason, data="")


def _sizes(states: dict[str, Any]) -> str:
    return ", ".join(f"{label} {state['images']} images" for label, state in states.items())


def _alive(name: str) -> list[str]:
    """Names of pipeline runs of that configuration that have not ended."""
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["loraline"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=FlowRunFilterStateType(any_=_ALIVE))),
        )
    return [run.name for run in runs if run.parameters.get("config", {}).get("name") == name]
