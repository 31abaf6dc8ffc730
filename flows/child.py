"""A stage in a process of its own: the same command line that a person or a container runs, and its events.

A process a stage frees all of its memory at the end, lets latents and embeds really run side by side, and makes an
out-of-memory kill an exit code instead of the end of the flow.
"""

from __future__ import annotations

import collections
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path

from stages.config import Config
from stages.core.errors import (
    ConfigError,
    InputError,
    LoralineError,
    MissingInputError,
    PreemptedError,
    StoreError,
    TransientError,
)
from stages.core.events import Message, Reporter, StageFailed, StageFinished, StageReused, event_from_json
from stages.core.preemption import DIE_WITH_PARENT
from stages.core.runner import Slice
from stages.pipeline import Node

_ERRORS: dict[int, type[LoralineError]] = {
    error.exit_code: error
    for error in (ConfigError, InputError, MissingInputError, StoreError, TransientError, PreemptedError)
}
_running: set[subprocess.Popen[str]] = set()
_leaving = threading.Event()
# The engine that runs a flow is killed 30 s after SIGTERM: a checkpoint has this long.
GRACE_S = 25


def run_stage(
    node: Node,
    config: Config,
    inputs: Mapping[str, str],
    reporter: Reporter,
    force: bool = False,
    share: Slice | None = None,
    merge: bool = False,
    check: bool = False,
) -> str:
    """Runs one node as `loraline stage` in a child process and passes its events on.

    Args:
        node: the stage and its data set.
        config: the run's configuration, resolved; handed over as a file that only this user can read.
        inputs: fingerprints of the artifacts to read, by node label.
        reporter: hears the child's events.
        force: make everything again.
        share: for a map stage, only this share of its units.
        merge: for a map stage, only put finished shares together.
        check: only look whether it could run.

    Returns:
        The fingerprint of the artifact that it made (or found); empty after a share or a check.
    Raises:
        LoralineError: of the kind that the child's exit code names, with its message.
    """
    if is_leaving():
        raise PreemptedError(f"{node}: not started, this process was asked to stop")
    with tempfile.TemporaryDirectory(prefix="loraline-run-") as folder:
        path = Path(folder) / "config.json"
        path.write_text(config.model_dump_json(), encoding="utf-8")
        command = [sys.executable, "-m", "stages.cli", "stage", node.stage, "--config", str(path), "--events", "json"]
        if node.dataset:
            command += ["--dataset", node.dataset]
        for label, fingerprint in inputs.items():
            command += ["--input", f"{label}={fingerprint}"]
        if force:
            command.append("--force")
        if share:
            command += ["--slice", str(share)]
        if merge:
            command.append("--merge")
        if check:
            command.append("--check")
        # The file is the whole truth: overrides from the environment are in it already.
        environment = {key: value for key, value in os.environ.items() if not key.startswith("LORALINE__")}
        environment[DIE_WITH_PARENT] = "1"
        process = subprocess.Popen(
            command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            env=environment,
            # Whoever stops this process's group, as Prefect's process worker and a terminal do, does not mean the
            # stage: it is asked below, once, and killed only when it takes too long.
            start_new_session=True,
        )
        _running.add(process)
        if is_leaving():  # asked between the look above and this line
            _ask(process)
        tail: collections.deque[str] = collections.deque(maxlen=20)
        listener = threading.Thread(target=_keep_tail, args=(process, tail), daemon=True)
        listener.start()
        failure: StageFailed | None = None
        fingerprint = ""
        try:
            assert process.stdout is not None
            for line in process.stdout:
                event = event_from_json(line)
                if isinstance(event, StageFailed):
                    failure = event
                elif event is not None:
                    reporter.emit(event)
                    if isinstance(event, StageFinished | StageReused):
                        fingerprint = event.fingerprint
                elif line.strip():
                    reporter.emit(Message(node.label, "info", line.rstrip()))
            code = process.wait()
        except BaseException:
            _ask(process)
            _wait(process, time.monotonic() + GRACE_S)
            raise
        finally:
            _running.discard(process)
            listener.join(timeout=5)
    if code != 0:
        raise _error(node, code, failure, list(tail))
    if not fingerprint and share is None and not check:
        raise LoralineError(f"{node}: ended without saying what it made")
    return fingerprint


def _keep_tail(process: subprocess.Popen[str], tail: collections.deque[str]) -> None:
    assert process.stderr is not None
    for line in process.stderr:
        tail.append(line.rstrip())


def is_leaving() -> bool:
    """Whether this process has been asked to stop: nothing new is started then."""
    return _leaving.is_set()


def start_over() -> None:
    """A new flow begins in this process (a test, a notebook): what an earlier one was asked no longer counts."""
    _leaving.clear()


def ask_all() -> None:
    """Asks every stage that this process runs to save what it has and leave; starts no other. Does not wait."""
    _leaving.set()
    for process in list(_running):
        _ask(process)


def stop_all() -> None:
    """As `ask_all`, and waits until all have left; those that take too long are killed."""
    ask_all()
    deadline = time.monotonic() + GRACE_S
    for process in list(_running):
        _wait(process, deadline)


def _ask(process: subprocess.Popen[str]) -> None:
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)


def _wait(process: subprocess.Popen[str], deadline: float) -> None:
    try:
        process.wait(max(0.0, deadline - time.monotonic()))
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _error(node: Node, code: int, failure: StageFailed | None, tail: list[str]) -> LoralineError:
    if failure is not None:
        return _ERRORS.get(code, LoralineError)(failure.error)
    if code < 0:
        name = signal.Signals(-code).name
        hint = " (out of memory? the kernel ends the largest process)" if -code == signal.SIGKILL else ""
        return TransientError(f"{node}: the stage's process was ended by {name}{hint}")
    told = "\n  ".join(line for line in tail if line.strip())
    return _ERRORS.get(code, LoralineError)(f"{node}: exit code {code}\n  {told}")
