"""A stage's events, as Prefect shows them: log lines and one progress artifact for each long task."""

from __future__ import annotations

import logging
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from uuid import UUID

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.exceptions import MissingContextError
from prefect.logging import get_run_logger

from stages.core.events import (
    Both,
    Event,
    Message,
    Metric,
    Picture,
    Progress,
    Reporter,
    StageFailed,
    StageFinished,
    StageReused,
    StageStarted,
)

UPDATE_EVERY_S = 2.0

# What `loraline run` shows on its own terminal, beside what goes to Prefect. One process, one terminal.
_terminal: list[Reporter] = []


@contextmanager
def shown_on(reporter: Reporter) -> Iterator[None]:
    """Events of stages that this process runs also go to this reporter."""
    _terminal.append(reporter)
    try:
        yield
    finally:
        _terminal.remove(reporter)


class PrefectReporter:
    """Events as log lines and progress artifacts of the current run.

    Args:
        name: of the configuration: its artifacts are told from others' by it.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.logger = get_run_logger()
        self._bars: dict[str, UUID] = {}
        self._shown: dict[str, float] = {}

    def emit(self, event: Event) -> None:
        match event:
            case StageStarted():
                self.logger.info("%s: %s", event.stage, event.reason)
            case StageReused():
                self.logger.info("%s: reused, %s", event.stage, event.reason)
            case StageFinished():
                self.logger.info("%s: %s in %.1f s", event.stage, event.summary, event.seconds)
            case StageFailed():
                self.logger.error("%s: %s", event.stage, event.error)
            case Message():
                self.logger.log(logging.getLevelName(event.level.upper()), "%s", event.text)
            case Picture():
                self.logger.info("%s: picture %s", event.stage, event.caption)
            case Metric():
                pass  # the progress artifact carries the latest numbers, TensorBoard all of them
            case Progress():
                self._show(event)

    def _show(self, event: Progress) -> None:
        now = time.monotonic()
        # 'held-out loss, step 250' is the same bar again: a training of days has a handful of bars, not thousands.
        bar = event.task.partition(",")[0]
        finished = event.done >= event.total
        if not finished and now - self._shown.get(bar, -UPDATE_EVERY_S) < UPDATE_EVERY_S:
            return
        self._shown[bar] = now
        share = 100.0 * event.done / event.total if event.total else 100.0
        rate = f", {event.rate:.1f} {event.unit}/s" if event.rate else ""
        text = f"{event.task}: {event.done:,} of {event.total:,} {event.unit}{rate} {event.note}".strip()
        try:
            if bar in self._bars:
                update_progress_artifact(artifact_id=self._bars[bar], progress=share, description=text)
            else:
                key = artifact_key(self.name, event.stage, bar)
                made = create_progress_artifact(progress=share, key=key, description=text)
                self._bars[bar] = made  # type: ignore[assignment]
        except Exception as error:  # showing progress must never cost the work that it shows
            self.logger.debug("progress artifact: %s", error)


def artifact_key(*parts: str) -> str:
    """A key as Prefect wants it: lower-case letters, digits and dashes."""
    return re.sub(r"[^a-z0-9]+", "-", "-".join(parts).lower()).strip("-")


def reporter_for_run(name: str) -> Reporter:
    """Where the events of the current run go: Prefect, and the terminal of `loraline run`.

    Outside a run (a unit test that calls a task's function) only the terminal.

    Args:
        name: of the configuration.
    """
    try:
        return Both(PrefectReporter(name), *_terminal)
    except MissingContextError:
        return Both(*_terminal)
