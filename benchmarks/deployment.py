"""What orchestration costs: every stage as a run of its own deployment, beside the same command lines by hand.

    python -m benchmarks.deployment [--images 12] [--rounds 3] [--json result.json]

A real Prefect server with deploy/ applied to it, a process worker for each pool, and an S3 server on loopback.

- by hand: `loraline stage NAME`, one after the other (the reference).
- deployment: each stage's run in `flow.executor: deployment`; from its creation to its start, and to its end.
- a run with nothing to do, from its creation to its end.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import datetime
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stages.config import Config
from stages.pipeline import Pipeline
from tests.deploy.site import applied
from tests.flows.site import Site
from tests.servers.s3 import moto_server


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraline-bench-") as name:
        result = measure(Path(name), arguments.images, arguments.rounds)
    table = Table(title="a stage through its deployment (process workers)")
    for heading in ("stage", "its own work", "by hand", "until it starts", "until it ends", "ratio to by hand"):
        table.add_column(heading, justify="right" if heading != "stage" else "left")
    for label, row in result["stages"].items():
        seconds = [row["work_s"], row["by_hand_s"], row["start_s"], row["end_s"]]
        table.add_row(label, *(f"{value:.1f} s" for value in seconds), f"{row['end_s'] / row['by_hand_s']:.1f}")
    Console().print(table)
    print(f"the whole pipeline: {result['pipeline_s']:.0f} s; by hand {result['by_hand_s']:.0f} s")
    print(f"nothing to do: {result['nothing_s']:.1f} s, of which the flow is {result['nothing_flow_s']:.1f} s")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def measure(folder: Path, images: int, rounds: int) -> dict[str, Any]:
    with moto_server() as s3, applied(folder / "prefect") as bare:
        server = bare.server
        os.environ |= s3.environment()
        by_hand = Site(server, s3.with_new_bucket(), folder / "by-hand")
        times = _by_hand(by_hand, by_hand.config(pictures=images))
        site = Site(server, s3.with_new_bucket(), folder / "deployed")
        config = site.config(pictures=images)
        with site.workers():
            whole = _ended(site, config)
            stages = {run["name"]: run for run in site.runs(config) if "label" in run["parameters"]}
            nothing = [_ended(site, config) for _ in range(rounds)]
        pipeline = Pipeline.open(config)
        rows = {}
        for node in pipeline.order:
            run, made = stages[node.label], pipeline.last(node)
            assert made is not None
            rows[node.label] = {
                "work_s": made.duration_s,
                "by_hand_s": times[node.label],
                "start_s": _seconds(run["created"], run["start_time"]),
                "end_s": _seconds(run["created"], run["end_time"]),
            }
    return {
        "stages": rows,
        "by_hand_s": sum(times.values()),
        "pipeline_s": _seconds(whole["created"], whole["end_time"]),
        "nothing_s": statistics.median(_seconds(run["created"], run["end_time"]) for run in nothing),
        "nothing_flow_s": statistics.median(_seconds(run["start_time"], run["end_time"]) for run in nothing),
    }


def _by_hand(site: Site, config: Config) -> dict[str, float]:
    """Seconds of each stage's command line."""
    path = site.folder / "config.json"
    path.write_text(config.model_dump_json(), encoding="utf-8")
    times = {}
    for node in Pipeline.open(config).order:
        command = [sys.executable, "-m", "stages.cli", "stage", node.stage, "--config", str(path)]
        started = time.perf_counter()
        subprocess.run(command, env={**os.environ, **site.environment}, check=True, capture_output=True)
        times[node.label] = time.perf_counter() - started
    return times


def _ended(site: Site, config: Config) -> dict[str, Any]:
    run = site.begin(config)
    assert site.wait(run)["type"] == "COMPLETED", site.run(run)["state"]
    return site.run(run)


def _seconds(earlier: str, later: str) -> float:
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


if __name__ == "__main__":
    main()
