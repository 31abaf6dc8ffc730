"""Running stages elsewhere: each through its own deployment, on the work pool, image and hardware that are named there.

The fingerprint of the artifact is the idempotency key of its run, so two pipelines that need the same artifact at the
same time share one run; an attempt number steps past runs that ended. A tag says which pipeline started a run: that one
cancels it, the others only wait for it.
"""

from __future__ import annotations

import logging
import re
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterIdempotencyKey
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound, PrefectHTTPStatusError
from prefect.runtime import flow_run
from prefect.states import Cancelling
from prefect.utilities.urls import url_for

from flows.child import is_leaving
from flows.stage import ARTIFACT, TRANSIENT
from stages.core.errors import ConfigError, LoralineError, PreemptedError, TransientError
from stages.core.events import Message, Reporter
from stages.core.fingerprint import digest_of
from stages.core.runner import Slice
from stages.pipeline import Node

T = TypeVar("T")
POLL_S = 1.0
# A run that nobody takes for this long is told about once: a pool without a worker looks like a slow start otherwise.
PATIENCE_S = 120.0
# How long the server may be away: each call already tries for about a minute by itself.
AWAY_S = 600.0
MOST_ATTEMPTS = 50

CANCELLED = "the pipeline was cancelled"

_ours: set[UUID] = set()
_lock = threading.Lock()
# Set once the pipeline's runs are being cancelled: one that is on its way to the server at that moment is, too.
_cancelling = threading.Event()


class _Started(NamedTuple):
    """A run that makes an artifact."""

    id: UUID
    ours: bool
    """This pipeline's run started it: in this process, or before it was retried."""
    found: bool = False
    """It was there before this attempt asked for it."""
    leaving: bool = False
    """It was being cancelled then."""

    def says_nothing(self, end: FlowRun) -> bool:
        """Whether its end is none of this attempt's: its machine had died already, or it was cancelled with whoever
        wanted it before."""
        if not self.found or end.state is None:
            return False
        return end.state.is_crashed() or (end.state.is_cancelled() and (self.leaving or not self.ours))


def dispatch(
    node: Node,
    fingerprint: str,
    config: dict[str, Any],
    inputs: Mapping[str, str],
    reporter: Reporter,
    deployment: str,
    shares: Sequence[Slice | None] = (None,),
    force: bool = False,
) -> str | None:
    """Runs a stage through its deployment, whole or in slices at once, and waits for it.

    Args:
        node: the stage and its data set.
        fingerprint: of the artifact that is to be made: with the slice, the idempotency key.
        config: the configuration as plain values, handed over as a parameter.
        inputs: fingerprints of the artifacts to read, by label.
        reporter: hears of waiting and ends.
        deployment: 'flow/deployment'.
        shares: one run for each.
        force: make it again, once in the life of this pipeline's run.

    Returns:
        The fingerprint of the artifact that was made; None after slices.
    Raises:
        ConfigError: there is no such deployment.
        TransientError: a run crashed, or failed in a way that another try may mend.
        LoralineError: a run failed for good (the message is that of the stage), or somebody cancelled it.
    """
    ended: list[FlowRun] = []
    waiting = list(shares)
    while waiting:
        started = {share: _start(node, fingerprint, config, inputs, deployment, share, force) for share in waiting}
        for run in started.values():
            text = "runs through its own deployment" if run.ours else "joins a run of another pipeline"
            reporter.emit(Message(node.label, "info", f"{node} {text}: {_page(run.id)}"))
        finished = _wait(node, [run.id for run in started.values()], reporter)
        waiting = [share for share, run in started.items() if run.says_nothing(finished[run.id])]
        again = {started[share].id for share in waiting}
        ended += [run for run_id, run in finished.items() if run_id not in again]
        for run_id in again:
            text = f"the run {finished[run_id].name} of an earlier attempt broke off; another one is started"
            reporter.emit(Message(node.label, "warning", text))
    failures = [_failure(node, run) for run in ended if run.state is not None and not run.state.is_completed()]
    if failures:
        permanent = [error for error in failures if not error.transient]
        raise (permanent or failures)[0]
    message = ended[0].state.message if len(ended) == 1 and ended[0].state else None
    found = re.search(rf"\({ARTIFACT} ([0-9a-f]{{64}})\)", message or "")
    return found.group(1) if found else None


def check_there(node: Node, config: dict[str, Any], reporter: Reporter, deployment: str) -> None:
    """Has a stage look, where it will run, whether it could.

    Raises:
        LoralineError: what is wrong, as `dispatch` raises it.
    """
    parameters = {"label": node.label, "config": config, "check": True}
    run = _create(node, deployment, parameters, None, f"check {node.label}").id
    ended = _wait(node, [run], reporter)[run]
    if ended.state is None or not ended.state.is_completed():
        raise _failure(node, ended)


def cancel_all() -> None:
    """Cancels every run that this pipeline started and that has not ended; those of others that it joined go on.

    Prefect does the same to the children of a cancelled run, but half a minute later, and not to those of an
    interrupted one.
    """
    with _lock:
        _cancelling.set()
        runs = list(_ours)
    _cancel(runs)


def start_over() -> None:
    """A new pipeline begins in this process: that an earlier one was cancelled no longer counts."""
    _cancelling.clear()


def _cancel(runs: Sequence[UUID]) -> None:
    if not runs:
        return
    with get_client(sync_client=True) as client:
        for run in runs:
            try:
                client.set_flow_run_state(run, Cancelling(message=CANCELLED))
            except Exception as error:  # the others are to be cancelled all the same
                logging.getLogger(__name__).error("%s could not be cancelled: %s", _page(run), error)


def was_cancelled() -> bool:
    """Whether somebody cancelled the current flow run; one that was evicted goes on somewhere else.

    A server that cannot be asked leaves with this machine: that is an eviction.
    """
    try:
        with get_client(sync_client=True) as client:
            state = client.read_flow_run(UUID(str(flow_run.get_id()))).state
    except Exception as error:  # it must not hide the reason for leaving
        logging.getLogger(__name__).warning("the Prefect server does not say whether this run was cancelled: %s", error)
        return False
    return state is not None and state.type in (StateType.CANCELLING, StateType.CANCELLED)


def _start(
    node: Node,
    fingerprint: str,
    config: dict[str, Any],
    inputs: Mapping[str, str],
    deployment: str,
    share: Slice | None,
    force: bool,
) -> _Started:
    """Joins the run that makes this artifact in this store, or starts one."""
    where = [config["store"].get(name) for name in ("url", "endpoint_url", "region")]
    key = f"{fingerprint}:{digest_of(where)[:8]}:{share or 'whole'}" + (f":forced-{_pipeline_tag()}" if force else "")
    keys = [f"{key}:{attempt}" for attempt in range(MOST_ATTEMPTS)]
    known = runs_with(keys)
    # What was forced once by this pipeline's run is not forced again where that run is retried.
    standing = [
        run for run in known if run.state is None or not run.state.is_final() or (force and run.state.is_completed())
    ]
    if standing:
        state = standing[0].state
        return _noted(node, standing[0], True, state is not None and state.type == StateType.CANCELLING)
    if len(known) >= MOST_ATTEMPTS:
        raise LoralineError(
            f"{node}: {MOST_ATTEMPTS} runs of this artifact have ended, and it is not in the store; look at them first"
        )
    # A run that has ended is one of an earlier try: its artifact is not there, or nobody would ask.
    taken = {run.idempotency_key for run in known}
    parameters = {
        "label": node.label,
        "config": config,
        "inputs": dict(inputs),
        "force": force,
        "slice": str(share) if share else None,
    }
    # Another pipeline that asks at this very moment gets the same run for the same key.
    chosen = next(one for one in keys if one not in taken)
    name = f"{node.label} {share}" if share else node.label
    return _create(node, deployment, parameters, chosen, name)


def _create(node: Node, deployment: str, parameters: dict[str, Any], key: str | None, name: str) -> _Started:
    """Starts a run of a stage's deployment, or finds the one with that key; as `_start`."""
    if is_leaving():
        raise PreemptedError(f"{node}: not started, this process was asked to stop")
    try:
        run: FlowRun = run_deployment(  # type: ignore[assignment]
            deployment,
            parameters=parameters,
            idempotency_key=key,
            flow_run_name=name,
            tags=[f"config:{parameters['config']['name']}", f"stage:{node.stage}", _pipeline_tag()],
            timeout=0,
        )
    except ObjectNotFound:
        raise ConfigError(
            f"{node}: there is no deployment {deployment}: make it with deploy/apply.py, or set flow.executor: inline"
        ) from None
    except (httpx.HTTPError, PrefectHTTPStatusError) as error:
        raise TransientError(f"{node}: the Prefect server did not take the run ({error})") from error
    return _noted(node, run, _pipeline_tag() not in run.tags)


def _pipeline_tag() -> str:
    return f"pipeline:{flow_run.get_id()}"


def _noted(node: Node, run: FlowRun, found: bool, leaving: bool = False) -> _Started:
    """Remembers a run of this pipeline as one to cancel with it."""
    ours = _pipeline_tag() in run.tags
    if ours and (run.state is None or not run.state.is_final()):
        with _lock:
            _ours.add(run.id)
            late = _cancelling.is_set()
        if late:
            _cancel([run.id])
            raise PreemptedError(f"{node}: {CANCELLED}")
    return _Started(run.id, ours, found, leaving)


def runs_with(keys: Sequence[str]) -> list[FlowRun]:
    """Runs with one of these idempotency keys."""
    chosen = FlowRunFilter(idempotency_key=FlowRunFilterIdempotencyKey(any_=list(keys)))
    with get_client(sync_client=True) as client:
        found = _read(lambda: client.read_flow_runs(flow_run_filter=chosen))
    return list(found)


def _wait(node: Node, runs: Sequence[UUID], reporter: Reporter) -> dict[UUID, FlowRun]:
    """Waits for all; the runs as they ended."""
    ended: dict[UUID, FlowRun] = {}
    waiting, since, told = set(runs), time.monotonic(), False
    with get_client(sync_client=True) as client:
        while waiting:
            for run_id in sorted(waiting):
                run = _read(lambda run_id=run_id: client.read_flow_run(run_id))  # type: ignore[misc]
                if run.state is None:
                    continue
                if run.state.is_final():
                    waiting.discard(run_id)
                    ended[run_id] = run
                    with _lock:
                        _ours.discard(run_id)
                elif run.state.type == StateType.SCHEDULED and not told and time.monotonic() - since > PATIENCE_S:
                    told = True
                    pool = run.work_pool_name or "its work pool"
                    text = (
                        f"nobody has taken this run for {PATIENCE_S:.0f} s: is a worker of {pool} running, or are all "
                        f"of its places (its concurrency limit) taken?"
                    )
                    reporter.emit(Message(node.label, "warning", text))
            if waiting:
                if is_leaving():
                    raise PreemptedError(f"{node}: no longer waited for, this process was asked to stop")
                time.sleep(POLL_S)
    return ended


def _read(call: Callable[[], T]) -> T:
    """One answer of the server; a server that restarts must not fail the stage that is running elsewhere.

    Raises:
        TransientError: it has not come back.
        PreemptedError: meanwhile this process was asked to stop.
    """
    until = time.monotonic() + AWAY_S
    while True:
        try:
            return call()
        except (httpx.HTTPError, PrefectHTTPStatusError) as error:
            answer = getattr(error, "response", None)
            if answer is not None and answer.status_code < 500 and answer.status_code not in (408, 429):
                raise  # it is there, and says no
            if time.monotonic() > until:
                raise TransientError(f"the Prefect server has been away for {AWAY_S:.0f} s ({error})") from error
            if is_leaving():
                raise PreemptedError("the Prefect server is away, and this process was asked to stop") from error
            time.sleep(POLL_S)


def _page(run_id: UUID) -> str:
    """Where the run's own page is, with its logs; its id where no page is known."""
    return url_for("flow-run", obj_id=run_id) or str(run_id)


def _failure(node: Node, run: FlowRun) -> LoralineError:
    state = run.state
    assert state is not None
    message = state.message or f"{node}: ended as {state.name}"
    if state.is_crashed():
        return TransientError(f"{node}: its run {run.name} crashed ({message})")
    if state.is_cancelled():
        # Whoever stopped it did not mean: begin it again.
        return LoralineError(f"{node}: its run {run.name} was cancelled")
    return TransientError(message) if state.name == TRANSIENT else LoralineError(message)
