"""`loraline run`: the whole pipeline as a Prefect flow, from a terminal."""

from __future__ import annotations

import os
import signal
import sys
from dataclasses import replace
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape

from stages import retrain
from stages.cli import ConfigOption, SetOption, told_kindly
from stages.config import load_config
from stages.core.console import ConsoleReporter
from stages.core.events import StageReused
from stages.pipeline import Pipeline, Step
from stages.report.build import RunRecord, report_is_about, report_place, write_report


def run(
    config: ConfigOption,
    sets: SetOption = None,
    force: Annotated[
        list[str] | None,
        typer.Option("--force", help="Make this stage again, whatever the store holds; may be repeated."),
    ] = None,
    against_published: Annotated[
        bool,
        typer.Option(
            "--against-published",
            help="Measure the new adapter against the one published last (train.previous): for a warm start and for "
            "the quality gate publish.maximum_regression.",
        ),
    ] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Show Prefect's own log lines too.")] = False,
) -> None:
    """Runs the whole pipeline through Prefect; redoes only what is not in the store."""
    with told_kindly():
        loaded = load_config(config, sets or [])
        pipeline = Pipeline.open(loaded)
        if against_published:
            loaded = retrain.against_published(pipeline)
            pipeline = replace(pipeline, config=loaded)
        console = Console(stderr=True)
        has_server = bool(os.environ.get("PREFECT_API_URL"))
        if not has_server and not force:
            steps = pipeline.plan()
            place = report_place(pipeline)
            if place and all(step.action == "reuse" for step in steps):
                # Without a server nobody would ever see the flow run: starting one only to skip everything is a wait.
                with ConsoleReporter(console) as reporter:
                    for step in steps:
                        reporter.emit(StageReused(step.node.label, "; ".join(step.reasons)))
                if report_is_about(pipeline) != {step.node.label: step.fingerprint for step in steps}:
                    place = write_report(pipeline, reused(pipeline, steps))
                console.print(f"\nNothing to do. Report: [bold]{escape(place)}[/]")
                return
        os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
        os.environ.setdefault("DO_NOT_TRACK", "1")
        # The server that Prefect starts beside a run takes long to come up on a busy machine.
        os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "180")
        # loraline uses no blocks; to look for them it would load every integration of Prefect, every time: 5 s.
        os.environ.setdefault("PREFECT_SERVER_REGISTER_BLOCKS_ON_START", "false")
        os.environ.setdefault("PREFECT_SERVER_MEMOIZE_BLOCK_AUTO_REGISTRATION", "false")
        if not verbose:
            # Prefect's server gets all log lines; this terminal has bars and messages of its own.
            os.environ.setdefault("PREFECT_LOGGING_HANDLERS_CONSOLE_LEVEL", "CRITICAL")
        # Prefect takes seconds to import and reads its settings then: `plan` and `stage` do without.
        from flows.pipeline import pipeline_flow
        from flows.reporting import shown_on

        # `docker stop` and spot evictions send SIGTERM: the flow's stages get to save what they have.
        signal.signal(signal.SIGTERM, _leave)
        with ConsoleReporter(console) as reporter, shown_on(reporter):
            place = pipeline_flow(loaded, force or [])
        console.print(f"\nReport: [bold]{escape(place)}[/]")


def reused(pipeline: Pipeline, steps: list[Step]) -> list[RunRecord]:
    """Records of a run that found everything, and the memory that these artifacts are this configuration's newest."""
    records = []
    for step in steps:
        manifest = pipeline.store.manifest(step.node.stage, step.fingerprint or "")
        if manifest is not None:
            pipeline.remember(step.node, manifest)
        records.append(RunRecord(step.node.label, "reused", "unchanged", manifest=manifest))
    return records


def _leave(number: int, frame: object) -> None:
    sys.exit(128 + number)
