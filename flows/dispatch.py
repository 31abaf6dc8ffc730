"""Running stages elsewhere: each through its own deployment, on the work pool, image and hardware that are named there.

The fingerprint of the artifact is the idempotency key of its run, so two pipelines that need the same artifact at the
same time share one run; an attempt number steps past runs that ended badly.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.deployments import run_deployment
from prefect.exceptions import ObjectNotFound
from prefect.states import Cancelling

from flows.stage import TRANSIENT
from stages.core.errors import ConfigError, LoralineError, TransientError
from stages.core.events import Message, Reporter
from stages.core.runner import Slice
from stages.pipeline import Node

POLL_S = 2.0
# A run that nobody takes for this long is told about once: a pool without a worker looks like a slow start otherwise.
PATIENCE_S = 120.0
MOST_ATTEMPTS = 50

_dispatched: set[UUID] = set()
_lock = threading.Lock()


def dispatch(
    node: Node,
    fingerprint: str,
    config: dict[str, Any],
    inputs: Mapping[str, str],
    reporter: Reporter,
    deployment: str,
    shares: Sequence[Slice | None] = (None,),
    force: bool = False,
) -> None:
    """Runs a stage through its deployment, whole or in slices at once, and waits for it.

    Args:
        node: the stage and its data set.
        fingerprint: of the artifact that is to be made: with the slice, the idempotency key.
        config: the configuration as plain values, handed over as a parameter.
        inputs: fingerprints of the artifacts to read, by label.
        reporter: hears of waiting and ends.
        deployment: 'flow/deployment'.
        shares: one run for each.
        force: make it again; never joins a run that is there already.

    Raises:
        ConfigError: there is no such deployment.
        TransientError: a run crashed, was cancelled, or failed in a way that another try may mend.
        LoralineError: a run failed for good; the message is that of the stage.
    """
    runs = [_start(node, fingerprint, config, inputs, deployment, share, force) for share in shares]
    try:
        failures = _wait(node, [run.id for run in runs], reporter)
    finally:
        with _lock:
            _dispatched.difference_update(run.id for run in runs)
    if failures:
        permanent = [error for error in failures if not error.transient]
        raise (permanent or failures)[0]


def cancel_all() -> None:
    """Cancels every run that this process waits for: cancelling a parent does not reach them by itself."""
    with _lock:
        runs = list(_dispatched)
    if not runs:
        return
    with get_client(sync_client=True) as client:
        for run in runs:
            client.set_flow_run_state(run, Cancelling(message="the pipeline was cancelled"))


def _start(
    node: Node,
    fingerprint: str,
    config: dict[str, Any],
    inputs: Mapping[str, str],
    deployment: str,
    share: Slice | None,
    force: bool,
) -> FlowRun:
    parameters = {
        "label": node.label,
        "config": config,
        "inputs": dict(inputs),
        "force": force,
        "slice": str(share) if share else None,
    }
    name = f"{node.label} {share}" if share else node.label
    key = f"{fingerprint}:{share or 'whole'}" + (f":forced-{time.time_ns()}" if force else "")
    for attempt in range(MOST_ATTEMPTS):
        try:
            run: FlowRun = run_deployment(  # type: ignore[assignment]
                deployment,
                parameters=parameters,
                idempotency_key=f"{key}:{attempt}",
                flow_run_name=name,
                tags=[f"config:{config['name']}", f"stage:{node.stage}"],
                timeout=0,
            )
        except ObjectNotFound:
            raise ConfigError(
                f"{node}: there is no deployment {deployment}: make it with `prefect deploy --all` from deploy/, or "
                f"set flow.executor: inline"
            ) from None
        # A run that has ended already is one of an earlier try: its artifact is not there, or nobody would ask.
        if run.state is None or not run.state.is_final():
            with _lock:
                _dispatched.add(run.id)
            return run
    raise LoralineError(f"{node}: {MOST_ATTEMPTS} runs of this artifact ended badly; look at them before trying again")


def _wait(node: Node, runs: Sequence[UUID], reporter: Reporter) -> list[LoralineError]:
    """Waits for all; what became of those that did not complete."""
    failures: list[LoralineError] = []
    waiting, since, told = set(runs), time.monotonic(), False
    with get_client(sync_client=True) as client:
        while waiting:
            for run_id in sorted(waiting):
                run = _read(lambda run_id=run_id: client.read_flow_run(run_id))  # type: ignore[misc]
                state = run.state
                if state is None:
                    continue
                if state.is_final():
                    waiting.discard(run_id)
                    if not state.is_completed():
                        failures.append(_failure(node, run))
                elif state.type == StateType.SCHEDULED and not told and time.monotonic() - since > PATIENCE_S:
                    told = True
                    pool = run.work_pool_name or "its work pool"
                    text = f"no worker of {pool} has taken this run for {PATIENCE_S:.0f} s: is one running?"
                    reporter.emit(Message(node.label, "warning", text))
            if waiting:
                time.sleep(POLL_S)
    return failures


def _read(call: Callable[[], FlowRun]) -> FlowRun:
    """One answer of the server; a server that restarts must not fail the stage that is running elsewhere."""
    for attempt in range(30):
        try:
            return call()
        except ObjectNotFound:
            raise
        except Exception:
            if attempt == 29:
                raise
            time.sleep(POLL_S)
    raise AssertionError("not reached")


def _failure(node: Node, run: FlowRun) -> LoralineError:
    state = run.state
    assert state is not None
    message = state.message or f"{node}: ended as {state.name}"
    if state.is_crashed():
        return TransientError(f"{node}: its run {run.name} crashed ({message})")
    if state.is_cancelled():
        return TransientError(f"{node}: its run {run.name} was cancelled")
    return TransientError(message) if state.name == TRANSIENT else LoralineError(message)
