"""What the pipeline costs above its stages: a run with nothing to do, a plan, and Prefect for each stage.

    python -m benchmarks.pipeline [--rounds 5] [--images 200] [--json result.json]

- `loraline run` and `loraline plan` where everything is in the store, as whole processes, beside a Python that only
  imports the same command line (the reference).
- the flow against a real Prefect server, all stages reused, beside the same look-ups without Prefect; the difference
  divided by the number of stages is Prefect's overhead for each.
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
from collections.abc import Callable
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from stages.core.events import Silent
from stages.pipeline import Pipeline
from tests.pictures import draw_pictures, small_config


def timed(call: Callable[[], Any], rounds: int) -> float:
    """Median seconds of a call, after one that is not counted."""
    call()
    seconds = []
    for _ in range(rounds):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds)


def process(*arguments: str) -> Callable[[], Any]:
    # LORALINE__* and a configured server would change what is measured.
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("LORALINE__", "PREFECT_API"))}
    return lambda: subprocess.run([sys.executable, *arguments], env=kept, check=True, capture_output=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--images", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="loraline-bench-") as name:
        folder = Path(name)
        result = measure(folder, arguments.rounds, arguments.images)
    table = Table(title="pipeline: everything is in the store already")
    for heading in ("what", "seconds", "ratio to the reference"):
        table.add_column(heading, justify="right" if heading != "what" else "left")
    for row in result["rows"]:
        table.add_row(row["what"], f"{row['seconds']:.3f}", f"{row['ratio']:.2f}")
    Console().print(table)
    print(f"Prefect's overhead: {result['prefect_s_per_stage'] * 1000:.0f} ms a stage")
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))


def measure(folder: Path, rounds: int, images: int) -> dict[str, Any]:
    config = small_config(folder, draw_pictures(folder / "images", images), download={"shard_samples": 50})
    path = folder / "config.json"
    path.write_text(config.model_dump_json())
    os.environ["PREFECT_HOME"] = str(folder / "prefect")
    os.environ["PREFECT_LOGGING_LEVEL"] = "WARNING"
    os.environ["PREFECT_SERVER_ANALYTICS_ENABLED"] = "false"
    process("-m", "stages.cli", "run", "--config", str(path))()

    # `-m stages.cli` twice over: what is compared is the work, not the way of starting.
    imports = timed(process("-c", "import stages.cli, flows.cli"), rounds)
    rows = [
        {"what": "import the command line (reference)", "seconds": imports, "ratio": 1.0},
        _row("loraline plan", timed(process("-m", "stages.cli", "plan", "--config", str(path)), rounds), imports),
        _row(
            "loraline run, nothing to do",
            timed(process("-m", "stages.cli", "run", "--config", str(path)), rounds),
            imports,
        ),
    ]

    def look_up() -> None:
        pipeline, manifests = Pipeline.open(config), {}
        for node in pipeline.order:
            made = pipeline.run_node(node, manifests, Silent())
            assert made is not None
            manifests[node] = made

    plain = timed(look_up, rounds)
    from prefect.testing.utilities import prefect_test_harness

    from flows.pipeline import pipeline_flow

    with prefect_test_harness(server_startup_timeout=120):
        flow_s = timed(lambda: pipeline_flow(config), rounds)
    rows += [
        {"what": "look-ups without Prefect (reference)", "seconds": plain, "ratio": 1.0},
        _row("the same as a flow, with its report", flow_s, plain),
    ]
    stages = len(Pipeline.open(config).order)
    return {"rows": rows, "images": images, "stages": stages, "prefect_s_per_stage": (flow_s - plain) / stages}


def _row(what: str, seconds: float, reference: float) -> dict[str, Any]:
    return {"what": what, "seconds": seconds, "ratio": seconds / reference}


if __name__ == "__main__":
    main()
