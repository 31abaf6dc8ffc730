"""What the benchmarks of the encoding stages share: a stage run in a store of its own, its floor, its peak memory.

The floor is the bare model, called in a loop on tensors that are ready; stage and floor take turns in one process, so a
busy machine slows both. Peak memory is that of a fresh process, for a small and for a ten times larger data set.

There are two sizes. `tiny` is the demo's model: it encodes so fast that what the stage does around it is seen through a
magnifying glass. `real` has the width of Stable Diffusion 3's own models with random weights, which cost exactly what
trained ones cost: its overhead is the one that a person meets.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

from stages.config import Config
from stages.core.artifact import Manifest
from stages.core.config import validate
from stages.core.events import Recorder
from stages.core.runner import Job, execute
from stages.core.stage import Inputs, Setting, Stage
from stages.core.store import Store

MODEL = Path(__file__).parent.parent / "examples" / "demo" / "tiny-sd3"
TARGET = 0.10
REAL_ROUNDS = 2


def arguments(description: str, items: int, unit: str, real_items: int) -> argparse.Namespace:
    """The command line that both benchmarks have."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--items", type=int, default=items, help=f"{unit}s in a round (default {items})")
    parser.add_argument("--rounds", type=int, default=3, help=f"at real size at most {REAL_ROUNDS}")
    parser.add_argument("--size", choices=("tiny", "real", "both"), default="both", help="which models (default both)")
    parser.add_argument("--real-items", type=int, default=real_items, help=f"{unit}s at real size ({real_items})")
    parser.add_argument("--model", default=str(MODEL), help="the tiny one: a folder or Hub repository")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--json", type=Path, help="also write the result here")
    parser.add_argument("--peak", action="store_true", help=argparse.SUPPRESS)  # one run in a child process
    return parser.parse_args()


def config_in(folder: Path, model: str, **sections: Any) -> Config:
    tree = {
        "name": "benchmark",
        "store": {"url": str(folder / "store"), "cache_dir": str(folder / "cache")},
        "model": {"pretrained_model_name_or_path": model},
        "datasets": [{"id": "pictures", "source": {"type": "local", "path": "unused"}}],
        "publish": {"path": "unused"},
        **sections,
    }
    return validate(Config, tree)


def run_stage(stage: Stage, config: Config, upstream: Manifest) -> float:
    """Seconds that the stage takes, from looking for its artifact to the committed manifest; nothing is remembered."""
    store = Store(config.store)
    setting = Setting(config, store, config.datasets[0] if stage.per_dataset else None)
    inputs = Inputs({(upstream.stage, upstream.dataset): upstream})
    job = Job(stage, setting, stage.name, stage.spec(setting), inputs, {upstream.stage: upstream.digest()})
    started = time.perf_counter()
    execute(job, Recorder(), force=True)
    return time.perf_counter() - started


def compare(
    rounds: int, stage: Callable[[], float], load: Callable[[], Any], floor: Callable[[], Any]
) -> dict[str, Any]:
    """Stage, loading and floor in turns: the best round of each, by the clock and by the CPU time of this process
    (which other work on the machine stretches less). Overhead is what the stage takes over floor and loading."""
    stage(), floor()  # imports, page cache, allocator
    best: dict[str, tuple[float, float]] = {}
    for _ in range(rounds):
        for name, work in (("floor", floor), ("load", load), ("stage", stage)):
            seconds = _seconds(work)
            known = best.get(name, seconds)
            best[name] = (min(known[0], seconds[0]), min(known[1], seconds[1]))
    wall, cpu = ({name: seconds[clock] for name, seconds in best.items()} for clock in (0, 1))
    return {
        **{f"{name}_s": seconds for name, seconds in wall.items()},
        **{f"{name}_cpu_s": seconds for name, seconds in cpu.items()},
        "overhead": wall["stage"] / (wall["floor"] + wall["load"]) - 1,
        "overhead_cpu": cpu["stage"] / (cpu["floor"] + cpu["load"]) - 1,
        "rounds": rounds,
        "target": TARGET,
    }


def _seconds(work: Callable[[], Any]) -> tuple[float, float]:
    started = time.perf_counter(), time.process_time()
    work()
    return time.perf_counter() - started[0], time.process_time() - started[1]


def peak_mb() -> float:
    """Highest resident memory of this process so far, in 10^6 bytes. (getrusage's would be the parent's, if higher: a
    child inherits it.)"""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024 / 1e6
    raise OSError("/proc/self/status has no VmHWM: peak memory is measured on Linux only")


def peak_of(module: str, options: argparse.Namespace, items: int) -> float:
    """Peak memory of one run of the stage over so many items, in a fresh process."""
    command = [
        sys.executable,
        "-m",
        module,
        "--peak",
        "--size",
        "tiny",
        "--items",
        str(items),
        "--model",
        options.model,
    ]
    command += ["--device", options.device, "--batch-size", str(options.batch_size)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    return float(output.strip().splitlines()[-1])


def report(name: str, unit: str, options: argparse.Namespace, results: dict[str, dict[str, Any]]) -> None:
    """A table for each size for people, JSON for machines: the tiny size's numbers, and those of `real` below that."""
    for size, result in results.items():
        _table(f"{name}, {size} size", unit, options, result)
    record: dict[str, Any] = {"benchmark": name, "unit": unit, **results.get("tiny", {})}
    if "real" in results:
        record["real"] = results["real"]
    text = json.dumps(record)
    print(text)
    if options.json:
        options.json.write_text(text + "\n")


def _table(title: str, unit: str, options: argparse.Namespace, result: dict[str, Any]) -> None:
    rate = result["items"] / result["stage_s"]
    print(f"{title}: {result['items']} {unit}s, batches of {options.batch_size}, best of {result['rounds']} rounds")
    print("                                clock     CPU")
    for title, key in (("bare model, ready tensors", "floor"), ("loading the model", "load"), ("the stage", "stage")):
        print(f"  {title:26} {result[f'{key}_s']:8.2f} {result[f'{key}_cpu_s']:7.2f} s")
    overheads = f"{100 * result['overhead']:8.1f} {100 * result['overhead_cpu']:7.1f} %"
    print(f"  {'overhead':26} {overheads}   target {100 * TARGET:.0f} %; {rate:.1f} {unit}s/s")
    if "peak_mb" not in result:
        return
    print(
        f"  peak memory                 {result['peak_mb']:8.0f} MB   with 10 times the data "
        f"{result['peak_10x_mb']:.0f} MB ({result['peak_10x_mb'] / result['peak_mb']:.2f} times)"
    )


def sizes(options: argparse.Namespace) -> tuple[str, ...]:
    return ("tiny", "real") if options.size == "both" else (options.size,)


def reshaped(folder: Path, components: dict[str, Any], kept: Sequence[str]) -> Path:
    """A model folder of other sizes: the tiny one's index and `kept` folders, and new components of random weights.

    Args:
        components: a model (of diffusers or transformers) by the name of its folder.
    """
    from diffusers.utils import logging as of_diffusers
    from transformers.utils import logging as of_transformers

    of_diffusers.disable_progress_bar()
    of_transformers.disable_progress_bar()
    shutil.copy(MODEL / "model_index.json", folder)
    for name in kept:
        shutil.copytree(MODEL / name, folder / name)
    for name, model in components.items():
        model.save_pretrained(folder / name)
    return folder


def folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="loraline-benchmark-")
