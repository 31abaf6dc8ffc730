"""Events on a terminal: progress bars with rate and time left, by rich."""

from __future__ import annotations

import threading
from types import TracebackType

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import (
    Progress as Bars,
)

from stages.core.events import (
    Event,
    Message,
    Metric,
    Picture,
    Progress,
    StageFailed,
    StageFinished,
    StageReused,
    StageStarted,
)

_STYLES = {"debug": "dim", "info": "", "warning": "yellow", "error": "bold red"}


class ConsoleReporter:
    """Shows events on a terminal; where the output is not a terminal, as plain lines without bars."""

    def __init__(self, console: Console | None = None) -> None:
        self.console = console or Console(stderr=True)
        self._bars = Bars(
            SpinnerColumn(),
            TextColumn("{task.fields[stage]:<18} {task.description:<14}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[rate]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("[dim]{task.fields[note]}"),
            console=self.console,
            transient=True,
            disable=not self.console.is_terminal,
        )
        self._tasks: dict[tuple[str, str], TaskID] = {}
        self._lock = threading.Lock()

    def __enter__(self) -> ConsoleReporter:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()

    def emit(self, event: Event) -> None:
        with self._lock:
            self._show(event)

    def _show(self, event: Event) -> None:
        match event:
            case Progress():
                self._show_progress(event)
            case StageStarted():
                self._line("▶", "cyan", event.stage, event.reason)
            case StageReused():
                self._line("=", "green", event.stage, f"reused: {event.reason}")
            case StageFinished():
                self._finish_bars(event.stage)
                self._line("✔", "green", event.stage, f"{event.summary} in {event.seconds:.1f} s")
            case StageFailed():
                self._finish_bars(event.stage)
                self._line("✘", "bold red", event.stage, event.error)
            case Message():
                style = _STYLES[event.level]
                self.console.print(
                    f"  {escape(f'{event.stage:<18}')} {escape(event.text)}",
                    style=style,
                    highlight=False,
                    soft_wrap=True,
                )
            case Metric():
                pass  # the progress bar's note carries the latest numbers
            case Picture():
                self.console.print(
                    f"  {escape(f'{event.stage:<18}')} picture: {escape(event.caption)}", style="dim", highlight=False
                )

    def _line(self, mark: str, style: str, stage: str, text: str) -> None:
        self.console.print(
            f"[{style}]{mark}[/] {escape(f'{stage:<18}')} {escape(text)}", highlight=False, soft_wrap=True
        )

    def _show_progress(self, event: Progress) -> None:
        key = (event.stage, event.task)
        rate = f"{event.rate:.1f} {event.unit}/s" if event.rate else ""
        if key not in self._tasks:
            self._tasks[key] = self._bars.add_task(
                event.task, total=event.total, stage=escape(event.stage), rate=rate, note=event.note
            )
        self._bars.update(self._tasks[key], completed=event.done, total=event.total, rate=rate, note=event.note)

    def _finish_bars(self, stage: str) -> None:
        for key in [key for key in self._tasks if key[0] == stage]:
            self._bars.remove_task(self._tasks.pop(key))
