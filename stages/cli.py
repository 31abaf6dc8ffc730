"""The command `loraline`: parses, prints, sets the exit code. What it does is in `stages.pipeline`.

`loraline run` is not in here: it needs Prefect, and comes from `flows` through the entry point group
`loraline.commands`, so that a stage's container can do without it.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from enum import StrEnum
from importlib import metadata
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from stages.config import Config, load_config
from stages.core.console import ConsoleReporter
from stages.core.errors import ConfigError, LoralineError
from stages.core.events import JsonLines, Message, Reporter, StageFailed
from stages.core.preemption import die_with_parent, stop_on_signals
from stages.core.runner import Slice
from stages.core.stage import MapStage
from stages.core.store import StoreSection
from stages.pipeline import Node, Pipeline
from stages.registry import STAGES

ConfigOption = Annotated[
    str,
    typer.Option(
        "--config", "-c", help="The configuration: a YAML file, or an fsspec URL such as s3://bucket/run.yaml."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option("--set", "-s", metavar="SECTION.KEY=VALUE", help="Override one setting; may be repeated."),
]


class Events(StrEnum):
    console = "console"
    json = "json"


EventsOption = Annotated[
    Events, typer.Option("--events", help="How progress is told: bars for a person, or JSON lines for a program.")
]

app = typer.Typer(
    name="loraline",
    help="Captioned images in, a published Stable Diffusion 3 LoRA out: six stages that redo only what has changed.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)


@app.command()
def plan(
    config: ConfigOption,
    sets: SetOption = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the plan as JSON.")] = False,
) -> None:
    """Says which stages a run would do, which it would reuse, and why. Changes nothing."""
    with told_kindly():
        pipeline = Pipeline.open(load_config(config, sets or []))
        steps = pipeline.plan()
        pipeline.judge(steps)
    if as_json:
        records = [
            {"node": step.node.label, "action": step.action, "reasons": step.reasons, "fingerprint": step.fingerprint}
            for step in steps
        ]
        print(json.dumps(records, indent=1))
        return
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "", "why"):
        table.add_column(heading, overflow="fold")
    for step in steps:
        mark = "[green]reuse[/]" if step.action == "reuse" else "[bold cyan]run[/]"
        table.add_row(escape(step.node.label), mark, escape("; ".join(step.reasons)))
    console = Console()
    console.print(table)
    runs = sum(step.action == "run" for step in steps)
    console.print(f"\n{runs} of {len(steps)} to run, {len(steps) - runs} reused." if runs else "\nNothing to do.")


@app.command()
def stage(
    name: Annotated[str, typer.Argument(help=f"One of: {', '.join(stage.name for stage in STAGES)}.")],
    config: ConfigOption,
    sets: SetOption = None,
    dataset: Annotated[
        str | None, typer.Option("--dataset", help="Only this data set, for a stage that runs once per data set.")
    ] = None,
    slice_: Annotated[
        str | None,
        typer.Option("--slice", metavar="I/N", help="Only every N-th shard from I on (0-based); writes no manifest."),
    ] = None,
    merge: Annotated[
        bool, typer.Option("--merge", help="Only put finished slices together and write the manifest.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Make everything again, whatever the store holds.")] = False,
    given: Annotated[
        list[str] | None,
        typer.Option("--input", metavar="STAGE=FINGERPRINT", help="Read exactly this artifact; may be repeated."),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Only look whether it could run: settings, credentials, models.")
    ] = False,
    events: EventsOption = Events.console,
) -> None:
    """Runs one stage alone, from what is in the store. This is what a container runs."""
    die_with_parent()
    with told_kindly(), reporting(events) as reporter, stop_on_signals() as stop:
        pipeline = Pipeline.open(load_config(config, sets or []))
        nodes = _nodes(pipeline, name, dataset)
        inputs = dict(_pair(text) for text in given or [])
        share = Slice.parse(slice_) if slice_ else None
        if (share or merge) and not isinstance(pipeline.stage(name), MapStage):
            raise ConfigError(f"{name} works on everything at once: --slice and --merge are for " + _map_stages())
        if share and (merge or force):
            raise ConfigError(
                "--slice makes a share of the shards, --merge puts them together, --force starts over: one at a time"
            )
        for node in nodes:
            with failure_told(node, reporter):
                if check:
                    pipeline.check([node])
                    reporter.emit(Message(node.label, "info", f"{node}: its settings are in order"))
                    continue
                manifests = pipeline.find_inputs(node, inputs)
                pipeline.run_node(node, manifests, reporter, share, merge, force, stop)


@app.command()
def report(
    config: ConfigOption,
    sets: SetOption = None,
    out: Annotated[Path | None, typer.Option("--out", help="Also write the page to this file.")] = None,
) -> None:
    """Writes report.html from what is in the store, without running anything."""
    from stages.report.build import records_in_store, write_report

    with told_kindly():
        pipeline = Pipeline.open(load_config(config, sets or []))
        print(write_report(pipeline, records_in_store(pipeline), copy_to=out))


@app.command()
def doctor(
    config: Annotated[
        str | None, typer.Option("--config", "-c", help="Also look at the store of this configuration.")
    ] = None,
    sets: SetOption = None,
    store: Annotated[
        str | None, typer.Option("--store", envvar="LORALINE__STORE__URL", help="Also look at this store.")
    ] = None,
    gpu: Annotated[bool, typer.Option("--gpu", help="Fail where no GPU is seen.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as JSON.")] = False,
) -> None:
    """Says whether stages can run on this machine, or in this container, and what is missing."""
    from stages import doctor as examination

    with told_kindly():
        section = load_config(config, sets or []).store if config else None
        if store:
            section = section.model_copy(update={"url": store}) if section else StoreSection(url=store)
    raise typer.Exit(0 if examination.report(examination.Options(gpu, section), as_json) else 1)


@app.command()
def schema() -> None:
    """Prints the configuration's JSON schema, for editors and forms."""
    print(json.dumps(Config.model_json_schema(), indent=2))


@app.command()
def stages() -> None:
    """Lists the stages."""
    table = Table(box=None, pad_edge=False)
    for heading in ("stage", "runs on", "reads", "what it does"):
        table.add_column(heading)
    for entry in STAGES:
        table.add_row(entry.name, entry.hardware, ", ".join(need.stage for need in entry.needs) or "-", entry.summary)
    Console().print(table)


def _nodes(pipeline: Pipeline, name: str, dataset: str | None) -> list[Node]:
    names = [entry.name for entry in pipeline.stages]
    if name not in names:
        raise ConfigError(f"{name}: no such stage; there are {', '.join(names)}")
    nodes = pipeline.nodes_of(name)
    if dataset is None:
        return nodes
    chosen = [node for node in nodes if node.dataset == dataset]
    if not chosen:
        valid = ", ".join(node.dataset for node in nodes if node.dataset)
        raise ConfigError(f"--dataset {dataset}: " + (f"there is {valid}" if valid else f"{name} runs once for all"))
    return chosen


def _map_stages() -> str:
    return ", ".join(entry.name for entry in STAGES if isinstance(entry, MapStage))


def _pair(text: str) -> tuple[str, str]:
    label, equals, fingerprint = text.partition("=")
    if not equals:
        raise ConfigError(f"--input {text}: write it as STAGE=FINGERPRINT, such as bucket[photos]=3f2a...")
    return label, fingerprint


@contextmanager
def failure_told(node: Node, reporter: Reporter) -> Iterator[None]:
    """A program that listens hears of the failure too; a person reads the message that `told_kindly` prints."""
    try:
        yield
    except LoralineError as error:
        if isinstance(reporter, JsonLines):
            reporter.emit(StageFailed(node.label, str(error), error.transient))
        raise


@contextmanager
def told_kindly() -> Iterator[None]:
    """Turns an error that is meant for a person into one message and its exit code."""
    try:
        yield
    except LoralineError as error:
        Console(stderr=True).print(f"[bold red]error:[/] {escape(str(error))}", highlight=False, soft_wrap=True)
        raise typer.Exit(error.exit_code) from None


@contextmanager
def reporting(events: Events) -> Iterator[Reporter]:
    """A reporter of the asked kind."""
    if events is Events.json:
        yield JsonLines()
        return
    with ConsoleReporter() as console:
        yield console


def _load_commands() -> None:
    """Commands of other packages (`run`, from flows). One that cannot be imported is named, and the rest goes on."""
    for entry in metadata.entry_points(group="loraline.commands"):
        try:
            app.command(entry.name)(entry.load())
        except ImportError as error:
            if os.environ.get("LORALINE_DEBUG"):
                print(f"loraline: the command {entry.name} is not available: {error}", file=sys.stderr)


def main() -> None:
    """Entry point of the console script."""
    # Tokenizers fork-warn, and progress bars of libraries would break ours.
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    # They warn about torchvision, which nothing here needs, at every import.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("DIFFUSERS_VERBOSITY", "error")
    _load_commands()
    app()


if __name__ == "__main__":
    main()
