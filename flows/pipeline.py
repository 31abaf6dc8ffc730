"""The pipeline as a Prefect flow: one task a stage and data set, latents and embeds side by side.

The store's manifests are the one truth about what is done: Prefect's own result cache stays off, a task's result is
the small reference of an artifact, and a run that failed is simply run again.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

from prefect import flow, task
from prefect.cache_policies import NO_CACHE
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State, TaskRun
from prefect.futures import PrefectFuture
from prefect.logging import get_run_logger
from prefect.runtime import flow_run
from prefect.states import Completed
from prefect.tasks import Task, exponential_backoff

from flows import child, dispatch
from flows.artifacts import attempted, show_run, show_training
from flows.child import ask_all, is_leaving, run_stage, stop_all
from flows.dispatch import cancel_all, check_there, was_cancelled
from flows.pinning import pinned
from flows.reporting import reporter_for_run
from stages.config import Config
from stages.core.artifact import ArtifactRef, Manifest
from stages.core.errors import ConfigError, LoralineError
from stages.core.events import Reporter, StageFailed, StageReused
from stages.core.runner import Job, Slice, describe
from stages.pipeline import Node, Pipeline
from stages.report.build import write_report
from stages.report.record import Action, RunRecord

# Artifacts by node label.
Made = dict[str, ArtifactRef]
RETRY_DELAYS_S = exponential_backoff(backoff_factor=10)


def _is_worth_a_retry(task_: Task[Any, Any], run: TaskRun, state: State[Any]) -> bool:
    """Only what is transient: the network, a killed process. Bad settings and bad data stay bad."""
    if is_leaving():
        return False
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
def stage_task(label: str, config: Config, upstream: list[Made], force: bool) -> State[Made]:
    """One stage: looked up in the store, and run in a process of its own where it is not there.

    Args:
        label: the stage and its data set.
        config: the run's configuration, with revisions pinned.
        upstream: what the nearest stages before this one made, and what that was made from.
        force: make it again.

    Returns:
        As the state's data, all of `upstream` and the stage's own artifact.
    """
    pipeline = Pipeline.open(config)
    node = pipeline.node(label)
    made_before = {name: reference for made in upstream for name, reference in made.items()}
    reporter, started_at = reporter_for_run(config.name), time.time()

    def note(action: Action, reason: str, manifest: Manifest | None = None) -> None:
        seconds = time.time() - started_at
        _write_record(pipeline, RunRecord(label, action, reason, seconds, manifest, started_at))

    try:
        # Asked for once: this run may be a retry of one that has done it.
        force = force and not _has_made(pipeline, label)
        manifests = {pipeline.node(name): pipeline.store.resolve(found) for name, found in made_before.items()}
        pipeline.foresee(node, manifests)
        job = pipeline.job(node, manifests)
        found = None if force else job.lookup()
        if found is not None:
            pipeline.remember(node, found)
            reporter.emit(StageReused(label, describe(found)))
            note("reused", "unchanged", found)
            text = f"in the store: {describe(found)}"
            return Completed(name="Reused", message=text, data={**made_before, label: found.reference()})
        reasons = "asked to" if force else "; ".join(pipeline.changes(node, job)) or "was not finished"
        given = {name: reference.fingerprint for name, reference in made_before.items()}
        made = _make(pipeline, node, job, given, reporter, force)
    except LoralineError as error:
        reporter.emit(StageFailed(label, str(error), error.transient))
        note("failed", str(error))
        raise
    except Exception as error:  # a defect, or Prefect's own trouble: the report tells of it like of any other
        reporter.emit(StageFailed(label, f"{type(error).__name__}: {error}", False))
        note("failed", f"{type(error).__name__}: {error}")
        raise
    pipeline.remember(node, made)
    note("ran", reasons, made)
    if node.stage == "train":
        attempted("the training's curves and pictures", lambda: show_training(pipeline, made))
    return Completed(message=describe(made), data={**made_before, label: made.reference()})


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
        made_there = dispatch.dispatch(node, job.fingerprint, values, given, reporter, name, shares, force)
        fingerprint = made_there or job.fingerprint
        if shares != [None]:
            fingerprint = run_stage(node, config, given, reporter, merge=True)
        made = pipeline.store.manifest(node.stage, fingerprint)
    if made is None:
        raise LoralineError(f"{node}: ended well, but its artifact is not in {pipeline.store.url}")
    return made


@task(
    task_run_name="check {label}",
    retry_delay_seconds=RETRY_DELAYS_S,
    retry_jitter_factor=0.5,
    retry_condition_fn=_is_worth_a_retry,
    cache_policy=NO_CACHE,
    persist_result=False,
)
def check_task(label: str, config: Config) -> Made:
    """Has a stage that comes later look, where it will run, whether it could: before a GPU works for it in vain."""
    pipeline, reporter, started_at = Pipeline.open(config), reporter_for_run(config.name), time.time()
    node = pipeline.node(label)
    try:
        name = config.flow.deployment.format(stage=node.stage)
        check_there(node, config.model_dump(mode="json"), reporter, name)
    except LoralineError as error:
        reporter.emit(StageFailed(label, str(error), error.transient))
        _write_record(pipeline, RunRecord(label, "failed", str(error), time.time() - started_at, None, started_at))
        raise
    return {}


@task(task_run_name="report", cache_policy=NO_CACHE, persist_result=False)
def report_task(config: Config, error: str | None) -> str:
    """Writes report.html; says where it is."""
    pipeline = Pipeline.open(config)
    records = _read_records(pipeline)
    place = write_report(pipeline, records, error, run=str(flow_run.get_id()))
    attempted("the table of stages", lambda: show_run(pipeline, records, place))
    return place


@flow(name="loraline", flow_run_name="{config.name}", persist_result=False)
def pipeline_flow(config: Config, force: list[str] | None = None) -> str:
    """Captioned images in, a published LoRA out; redoes only what is not in the store.

    Args:
        config: the whole run: what a configuration file holds.
        force: stages to make again whatever the store holds: 'train', or 'latents[photos]' for one data set.

    Returns:
        Where the report is.
    Raises:
        LoralineError: names every stage that failed.
    """
    child.start_over()
    dispatch.start_over()
    pipeline, names = pinned(Pipeline.open(config)), set(force or [])
    _known(pipeline, names)
    # Everything that will run here is checked before the first of it does: a wrong setting of the last stage is found
    # now. What runs elsewhere is checked there, since this machine may have no GPU and other credentials.
    steps = pipeline.plan()
    pipeline.judge(steps)
    planned = [step.node for step in steps if step.action == "run" or names & {step.node.stage, step.node.label}]
    attempted("what this run does, in its name", lambda: _name_run(pipeline, planned))
    pipeline.check([node for node in planned if pipeline.config.flow.executor_of(node.stage) == "inline"])
    futures: dict[Node, PrefectFuture[Any]] = {}
    retries = pipeline.config.flow.retries
    task_, check = stage_task.with_options(retries=retries), check_task.with_options(retries=retries)
    checked: dict[Node, list[Node]] = {}
    for node in planned:
        for gate in _gates(pipeline, node, planned):
            checked.setdefault(gate, []).append(node)
    checks: dict[Node, PrefectFuture[Any]] = {}
    try:
        for node in dict.fromkeys(node for nodes in checked.values() for node in nodes):
            checks[node] = check.with_options(name=f"check {node.label}").submit(node.label, pipeline.config)
        for node in pipeline.order:
            # Futures become results when the task starts; handing them over is what draws the graph. Only the nearest
            # ones: each brings what it was made from, so that a stage can judge all of its data before it starts.
            upstream: list[Any] = [futures[source] for source in pipeline.nearest(node)]
            upstream += [checks[later] for later in checked.get(node, [])]
            forced = bool(names & {node.stage, node.label})
            # Until a task starts, Prefect's pages show the name of its function.
            futures[node] = task_.with_options(name=node.label).submit(node.label, pipeline.config, upstream, forced)
        for future in [*checks.values(), *futures.values()]:
            future.wait()
    except BaseException as reason:  # cancelled, evicted or interrupted: the stages save what they have
        ask_all()
        try:
            # A person at a terminal (`loraline run`) means all of it. The server would not know of that yet.
            if isinstance(reason, KeyboardInterrupt) or was_cancelled():
                cancel_all()
        finally:
            stop_all()
        raise
    ended = [*checks.items(), *futures.items()]
    failures = {node: _error(future.state) for node, future in ended if _went_wrong(future.state)}
    error = "; ".join(str(failure) for failure in failures.values()) or None
    place = "no report: it could not be written, see the log"
    try:
        place = report_task(pipeline.config, error)
    except Exception as trouble:  # the stages are what counts: a good run stays good, and a failure keeps its reason
        get_run_logger().error("report.html could not be written: %s: %s", type(trouble).__name__, trouble)
    if failures:
        # The kind that no retry can mend decides, where there is one.
        worst = min(failures.values(), key=lambda failure: failure.transient)
        names_ = ", ".join(node.label for node in failures)
        raise type(worst)(f"{len(failures)} of {len(futures)} stages failed ({names_}). {error}\nReport: {place}")
    return place


def _gates(pipeline: Pipeline, node: Node, planned: Sequence[Node]) -> list[Node]:
    """The first stages on a GPU that would work in vain if this node, which comes after them and runs on another
    machine, turned out not to be able to run."""
    if pipeline.config.flow.executor_of(node.stage) != "deployment":
        return []  # checked here already
    heavy = [source for source in pipeline.ancestors(node) if pipeline.stage(source.stage).hardware == "gpu"]
    if not set(heavy) & set(planned):
        return []
    return [source for source in heavy if not set(pipeline.ancestors(source)) & set(heavy)]


def _name_run(pipeline: Pipeline, planned: Sequence[Node]) -> None:
    """A list of runs says what each of them is for: 'photos: train, publish'; they are found by a tag, too."""
    stages = list(dict.fromkeys(node.stage for node in planned))
    what = "everything" if len(stages) == len(pipeline.stages) else ", ".join(stages) or "nothing to do"
    tags = {*(flow_run.get_tags() or []), f"config:{pipeline.config.name}"}
    with get_client(sync_client=True) as client:
        client.update_flow_run(UUID(str(flow_run.get_id())), name=f"{pipeline.config.name}: {what}", tags=sorted(tags))


def _known(pipeline: Pipeline, names: set[str]) -> None:
    valid = {name for node in pipeline.order for name in (node.stage, node.label)}
    if names - valid:
        raise ConfigError(
            f"force: {', '.join(sorted(names - valid))}: no such stage; there are {', '.join(sorted(valid))}"
        )


def _went_wrong(state: State[Any]) -> bool:
    # One that waits for a failed one is left as it was: it did not go wrong, it never began.
    return state.is_failed() or state.is_crashed() or state.is_cancelled()


def _error(state: State[Any]) -> LoralineError:
    """What a task failed with, as an error of ours."""
    found = state.result(raise_on_failure=False)
    if isinstance(found, LoralineError):
        return found
    return LoralineError(str(found) if isinstance(found, Exception) else str(state.message))


def _record_path(pipeline: Pipeline, label: str) -> str:
    return f"runs/{pipeline.config.name}/history/{flow_run.get_id() or 'local'}/{label}.json"


def _write_record(pipeline: Pipeline, record: RunRecord) -> None:
    """Tells the report what became of a node: through the store, since its task may have run anywhere."""
    pipeline.store.put_json(_record_path(pipeline, record.label), record.to_json())


def _has_made(pipeline: Pipeline, label: str) -> bool:
    """Whether this flow run, before it was retried, has made a node's artifact."""
    found = pipeline.store.get_json(_record_path(pipeline, label))
    return found is not None and found["action"] in ("ran", "reused")


def _read_records(pipeline: Pipeline) -> list[RunRecord]:
    records = []
    for node in pipeline.order:
        found = pipeline.store.get_json(_record_path(pipeline, node.label))
        if found is None:
            records.append(RunRecord(node.label, "not run", "an earlier stage failed"))
        else:
            records.append(RunRecord.from_json(found, pipeline.store))
    return records
