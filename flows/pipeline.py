"""The pipeline as a Prefect flow: one task a stage and data set, latents and embeds side by side.

The store's manifests are the one truth about what is done: Prefect's own result cache stays off, a task's result is
the small reference of an artifact, and a run that failed is simply run again.
"""

from __future__ import annotations

import time
from typing import Any

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from flows.artifacts import attempted, show_run, show_training
from flows.child import run_stage, stop_all
from flows.dispatch import cancel_all, dispatch
from flows.reporting import reporter_for_run
from stages.config import Config
from stages.core.artifact import ArtifactRef, Manifest
from stages.core.errors import LoralineError
from stages.core.events import Reporter, StageFailed, StageReused
from stages.core.runner import Job, Slice, describe
from stages.pipeline import Node, Pipeline
from stages.report.build import write_report
from stages.report.record import Action, RunRecord

RETRY_DELAYS_S = exponential_backoff(backoff_factor=10)


def _is_worth_a_retry(task_: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Only what is transient: the network, a killed process. Bad settings and bad data stay bad."""
    error = state.result(raise_on_failure=False) if state.is_failed() else None
    return state.is_crashed() or (isinstance(error, LoralineError) and error.transient)


@task(
    task_run_name="{label}",
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def stage_task(label: str, config: dict[str, Any], upstream: dict[str, ArtifactRef], force: bool) -> State[ArtifactRef]:
    """One stage: looked up in the store, and run in a process of its own where it is not there."""
    pipeline = Pipeline.open(Config.model_validate(config))
    node = pipeline.node(label)
    reporter, started_at = reporter_for_run(), time.time()

    def note(action: Action, reason: str, manifest: Manifest | None = None) -> None:
        seconds = time.time() - started_at
        _write_record(pipeline, RunRecord(label, action, reason, seconds, manifest, started_at))

    try:
        manifests = {source: pipeline.store.resolve(upstream[source.label]) for source in pipeline.upstream(node)}
        job = pipeline.job(node, manifests)
        found = None if force else job.lookup()
        if found is not None:
            pipeline.remember(node, found)
            reporter.emit(StageReused(label, describe(found)))
            note("reused", "unchanged", found)
            return Completed(name="Reused", message=f"in the store: {describe(found)}", data=found.reference())
        reasons = "asked to" if force else "; ".join(pipeline.changes(node, job)) or "was not finished"
        given = {name: reference.fingerprint for name, reference in upstream.items()}
        made = _make(pipeline, node, job, given, reporter, force)
    except LoralineError as error:
        reporter.emit(StageFailed(label, str(error), error.transient))
        note("failed", str(error))
        raise
    note("ran", reasons, made)
    if node.stage == "train":
        attempted("the training's curves and pictures", lambda: show_training(pipeline, made))
    return Completed(message=describe(made), data=made.reference())


def _make(pipeline: Pipeline, node: Node, job: Job, given: dict[str, str], reporter: Reporter, force: bool) -> Manifest:
    """Has a stage made by the executor that the configuration names for it; its manifest."""
    config = pipeline.config
    if config.flow.executor_of(node.stage) == "inline":
        # Not job.fingerprint: a source may have moved on since this process looked at it.
        fingerprint = run_stage(node, config, given, reporter, force)
        made = pipeline.store.manifest(node.stage, fingerprint)
    else:
        values, name = config.model_dump(mode="json"), config.flow.deployment.format(stage=node.stage)
        workers = pipeline.workers(node)
        shares = [Slice(index, workers) for index in range(workers)] if workers > 1 and not force else [None]
        dispatch(node, job.fingerprint, values, given, reporter, name, shares, force)
        if shares != [None]:
            run_stage(node, config, given, reporter, merge=True)
        made = job.lookup() or pipeline.last(node)
    if made is None:
        raise LoralineError(f"{node}: ended well, but its artifact is not in {pipeline.store.url}")
    return made


@task(task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report_task(config: dict[str, Any], error: str | None) -> str:
    """Writes report.html; says where it is."""
    pipeline = Pipeline.open(Config.model_validate(config))
    records = _read_records(pipeline)
    place = write_report(pipeline, records, error)
    attempted("the table of stages", lambda: show_run(pipeline, records, place))
    return place


@flow(name="loraline", flow_run_name="{config[name]}", persist_result=False)
def pipeline_flow(config: dict[str, Any], force: list[str] | None = None) -> str:
    """Captioned images in, a published LoRA out; redoes only what is not in the store.

    Args:
        config: a configuration as plain values (see `loraline schema`).
        force: names of stages to make again whatever the store holds.

    Returns:
        Where the report is.
    Raises:
        LoralineError: names every stage that failed.
    """
    pipeline = Pipeline.open(Config.model_validate(config))
    # Everything that will run is checked before the first of it does: a wrong setting of the last stage is found now.
    pipeline.check([step.node for step in pipeline.plan() if step.action == "run"])
    futures: dict[Node, PrefectFuture[Any]] = {}
    task_ = stage_task.with_options(retries=pipeline.config.flow.retries)
    try:
        for node in pipeline.order:
            # Futures become results when the task starts; handing them over is what draws the graph.
            upstream: dict[str, Any] = {source.label: futures[source] for source in pipeline.upstream(node)}
            futures[node] = task_.submit(node.label, config, upstream, node.stage in (force or []))
        for future in futures.values():
            future.wait()
    except BaseException:  # cancelled, terminated or interrupted: the stages save what they have
        cancel_all()
        stop_all()
        raise
    failures: dict[Node, str] = {}
    for node, future in futures.items():
        if future.state.is_failed() or future.state.is_crashed():
            failures[node] = str(future.state.message)
    error = "; ".join(f"{node}: {reason}" for node, reason in failures.items()) or None
    place = report_task(config, error)
    if failures:
        raise LoralineError(f"{len(failures)} of {len(futures)} stages failed. {error}\nReport: {place}")
    return place


def _record_path(pipeline: Pipeline, label: str) -> str:
    return f"runs/{pipeline.config.name}/history/{flow_run.get_id() or 'local'}/{label}.json"


def _write_record(pipeline: Pipeline, record: RunRecord) -> None:
    """Tells the report what became of a node: through the store, since its task may have run anywhere."""
    pipeline.store.put_json(_record_path(pipeline, record.label), record.to_json())


def _read_records(pipeline: Pipeline) -> list[RunRecord]:
    records = []
    for node in pipeline.order:
        found = pipeline.store.get_json(_record_path(pipeline, node.label))
        if found is None:
            records.append(RunRecord(node.label, "not run", "an earlier stage failed"))
        else:
            records.append(RunRecord.from_json(found, pipeline.store))
    return records
