"""What a stage tells the world while it works, and one small interface to hear it.

A stage emits events; who listens decides what becomes of them: a terminal (rich), JSON lines (containers, tests),
Prefect (in `flows/`). Events are small frozen records, safe to log: no secrets, no data.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, Protocol, TextIO

Level = Literal["debug", "info", "warning", "error"]


@dataclass(frozen=True)
class StageStarted:
    stage: str
    reason: str


@dataclass(frozen=True)
class StageReused:
    """The artifact is already in the store: nothing to do."""

    stage: str
    reason: str
    fingerprint: str = ""


@dataclass(frozen=True)
class StageFinished:
    """`fingerprint` names the artifact; it is empty after a slice, which makes none."""

    stage: str
    seconds: float
    summary: str
    counts: dict[str, int] = field(default_factory=dict)
    fingerprint: str = ""


@dataclass(frozen=True)
class StageFailed:
    stage: str
    error: str
    transient: bool


@dataclass(frozen=True)
class Progress:
    """`done` of `total` `unit`s; `rate` in units a second over the run so far."""

    stage: str
    task: str
    done: int
    total: int
    unit: str
    rate: float = 0.0
    note: str = ""


@dataclass(frozen=True)
class Message:
    stage: str
    level: Level
    text: str


@dataclass(frozen=True)
class Metric:
    """Numbers at a training step."""

    stage: str
    step: int
    values: dict[str, float]


@dataclass(frozen=True)
class Picture:
    """A picture that a person would like to see, as a local file."""

    stage: str
    name: str
    path: str
    caption: str


Event = StageStarted | StageReused | StageFinished | StageFailed | Progress | Message | Metric | Picture


class Reporter(Protocol):
    """Hears events. May be called from any thread, by several at once; must not raise."""

    def emit(self, event: Event) -> None: ...


class Silent:
    """Hears nothing."""

    def emit(self, event: Event) -> None:
        return


class Recorder:
    """Keeps events, for tests."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


class Both:
    """Passes every event on to several reporters."""

    def __init__(self, *reporters: Reporter) -> None:
        self.reporters = reporters

    def emit(self, event: Event) -> None:
        for reporter in self.reporters:
            reporter.emit(event)


class JsonLines:
    """One JSON object a line on a stream: {"event": "Progress", "time": ..., ...}. For containers and flows."""

    def __init__(self, stream: TextIO | None = None, every_s: float = 1.0) -> None:
        self.stream = stream or sys.stdout
        self.every_s = every_s
        self._last: dict[str, float] = {}
        self._lock = threading.Lock()

    def emit(self, event: Event) -> None:
        with self._lock:
            if isinstance(event, Progress) and event.done < event.total:
                now = time.monotonic()
                if now - self._last.get(event.task, -1e9) < self.every_s:
                    return
                self._last[event.task] = now
            record = {"event": type(event).__name__, "time": round(time.time(), 3), **asdict(event)}
            # In one piece: other libraries print to the same stream from other threads.
            self.stream.write(json.dumps(record) + "\n")
            self.stream.flush()


def event_from_json(line: str) -> Event | None:
    """The event of a JSON line, or None where the line is something else (a library's print, a warning)."""
    try:
        record: Any = json.loads(line)
    except ValueError:
        return None
    if not isinstance(record, dict):
        return None
    kinds: dict[str, Any] = {
        kind.__name__: kind
        for kind in (StageStarted, StageReused, StageFinished, StageFailed, Progress, Message, Metric, Picture)
    }
    kind = kinds.get(str(record.pop("event", "")))
    record.pop("time", None)
    try:
        event: Event | None = kind(**record) if kind else None
    except TypeError:
        return None
    return event


class ProgressTask:
    """Counts up one task's work and reports it; made by `progress`. `advance` may be called from any thread."""

    def __init__(self, reporter: Reporter, stage: str, task: str, total: int, unit: str, done: int) -> None:
        self._reporter, self.stage, self.task, self.total, self.unit = reporter, stage, task, total, unit
        self.done = self._start_done = done
        self._start = time.monotonic()
        self._lock = threading.Lock()

    def advance(self, count: int = 1, note: str = "") -> None:
        with self._lock:
            self.done += count
            self._emit(note)

    def _emit(self, note: str) -> None:
        seconds = max(time.monotonic() - self._start, 1e-9)
        rate = (self.done - self._start_done) / seconds
        self._reporter.emit(Progress(self.stage, self.task, self.done, self.total, self.unit, round(rate, 3), note))


@contextmanager
def progress(reporter: Reporter, stage: str, task: str, total: int, unit: str, done: int = 0) -> Iterator[ProgressTask]:
    """Reports progress of `total` units; `done` is what an earlier run had finished already."""
    tracker = ProgressTask(reporter, stage, task, total, unit, done)
    tracker._emit("")
    yield tracker
